"""A small bidirectional transformer on genfast's attention, called as Hugging Face's language models are.

Its layers do not know how they attend: a pass over whole texts, as in training, does so by :func:`whole`
(``genfast.attention`` and an ``AttentionMask``), a pass over a block by :class:`Cache` (``genfast.attention_cached``
and a ``KVCache`` per layer). It is not in ``examples/`` because the demo needs it where only the package is installed;
``examples/block_diffusion_transformer.py`` takes it from here, and has training and decoding written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genfast.attention_mask import AttentionMask
from genfast.kv_cache import KVCache
from genfast.ops.attention import attention
from genfast.ops.attention_cached import attention_cached

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q, k, v)``, each [B, heads, n, D] before positions are rotated in."""


class Answer(NamedTuple):
    """What the transformer returns, by the names that Hugging Face's models have."""

    logits: Tensor
    past_key_values: Cache | None


class Layer(nn.Module):
    """Attention and a feed-forward network.

    Positions enter by rotation (RoPE) and by biases of the queries and keys, which begin so that every head looks at a
    certain distance to the left or right: the network starts as something like an n-gram model and spares itself the
    long search for its neighbours.
    """

    def __init__(self, width: int, heads: int, frequencies: Tensor):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.qkv.bias.data = looks(heads, frequencies).flatten()

    def forward(self, h: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        batch, length, width = h.shape
        # [B, n, heads, D], seen as [B, heads, n, D]: nothing is copied for the attention, nor after it.
        q, k, v = self.qkv(self.norms[0](h)).view(batch, length, 3, self.heads, -1).transpose(1, 3).unbind(2)
        h = h + self.out(attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


def looks(heads: int, frequencies: Tensor, sharpness: float = 0.6) -> Tensor:
    """Biases [3, heads, D] of queries, keys and values (which have none): with them alone, head h gives a key at a
    distance d from where it looks the score ``sharpness * sum(cos(frequencies * d))``."""
    at = torch.tensor([2.0 ** (h // 2) * (-1) ** (h + 1) for h in range(heads)])
    size = 2 * len(frequencies)
    turned, still = torch.polar(torch.tensor(1.0), at[:, None] * frequencies), torch.ones(heads, size // 2) + 0j
    both = torch.view_as_real(torch.stack([turned, still, 0 * still])).flatten(-2)
    return (sharpness * size**0.5) ** 0.5 * both


class Transformer(nn.Module):
    """Scores of the letters 0 ... vocabulary - 1 at every position; the id after them is the mask's.

    Args:
        longest: how many positions a text can have.
        slowest: the fewest radians per position by which a pair of numbers is rotated; the most are 2.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, longest: int, slowest: float = 0.2):
        super().__init__()
        self.bfloat16, self.longest = False, longest
        frequencies = 2 * (slowest / 2) ** torch.linspace(0, 1, width // heads // 2)
        self.embedding = nn.Embedding(vocabulary + 1, width)
        self.layers = nn.ModuleList(Layer(width, heads, frequencies) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary)
        angles = torch.arange(longest)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        return self.cos.device

    @property
    def rope(self) -> tuple[Tensor, Tensor, str]:
        """As :func:`genfast.attention_cached` takes it."""
        return self.cos, self.sin, "interleaved"

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> Answer:
        """
        Args:
            ids: int64 [B, n].
            attention_mask: int [B, n], 0 where there is padding; or bool [B or 1, 1, n, m], what a position sees.
            position_ids: int64 [n] or [B, n]; by default 0 ... n - 1. With a cache they go on from what it holds.
            past_key_values, use_cache: the :class:`Cache` of what has been decided; begin one.
            replace_position: bool [B, m], those of the cached positions that ids stand for.

        Returns:
            logits float32 [B, n, vocabulary + 1], of which the mask's own is minus infinity, and the cache.
        """
        cache = past_key_values
        if cache is None and use_cache:
            cache = Cache(self.longest, self.rope)
        if cache is not None:
            return Answer(self.logits(ids, cache.seeing(ids.shape[1], attention_mask, replace_position)), cache)
        mask = None
        if attention_mask is not None:
            seen = attention_mask.bool()
            mask = AttentionMask.from_dense(seen[:, 0] if seen.dim() == 4 else seen[:, None].expand(*ids.shape, -1))
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)
        return Answer(self.logits(ids, whole(self.rope, position_ids, mask)), None)

    def logits(self, ids: Tensor, attend: Attend) -> Tensor:
        """The layers one after another, attending as they are told to."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            h = self.embedding(ids)
            for i, layer in enumerate(self.layers):
                h = layer(h, partial(attend, i))
            logits = self.head(self.norm(h)).float()
        return F.pad(logits, (0, 1), value=-torch.inf)


def turns(rope: tuple[Tensor, Tensor, str], position_ids: Tensor) -> Tensor:
    """complex64 [B or 1, 1, n, D / 2]: by what :func:`rotated` multiplies the pairs of numbers at positions."""
    cos, sin, _ = rope
    return torch.complex(cos, sin)[position_ids].unsqueeze(-3)


def rotated(x: Tensor, by: Tensor) -> Tensor:
    """The rotation of ``attention_cached``, with gradients: pairs are complex numbers, and it is a product."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)


def whole(rope: tuple[Tensor, Tensor, str], position_ids: Tensor, mask: AttentionMask | None) -> Attend:
    """Attention within a pass over whole texts; gradients go through it."""
    by = turns(rope, position_ids)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(rotated(q, by), rotated(k, by), v, mask=mask)

    return attend


class Cache:
    """Keys and values of what is decided, and attention of further blocks over them.

    With a mask, the blocks of a pass are stored one after another, each as it attends, but for the last one: that still
    changes, so it sees what is stored and itself and leaves no trace. Without a mask a pass is one block, and is stored
    if nothing is yet (Fast-dLLM's first pass over the whole text).
    """

    def __init__(self, longest: int, rope: tuple[Tensor, Tensor, str]):
        self.longest, self.rope, self.length = longest, rope, 0
        self.layers: list[KVCache] = []

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` positions."""
        if length < self.length:
            self.length = length
            for layer in self.layers:
                layer.crop(length)

    def seeing(self, n: int, mask: Tensor | None, replaced: Tensor | None) -> Attend:
        """How a pass over n positions attends.

        Args:
            mask: bool [1, 1, n, m], block causal over the m - n positions that are stored and those of the pass.
            replaced: bool [B, positions], the run of them that the pass rewrites in every row (Fast-dLLM's dual cache).
        """
        if mask is not None:
            ends = self._ends(n, mask)
            self.length += [0, *ends][-2]
            return partial(self.attend, ends, {})
        if replaced is not None:
            return partial(self.attend, [n], dict(write="rewrite", start=int(replaced[0].int().argmax())))
        if self.length:
            return partial(self.attend, [n], {})
        self.length = n
        return partial(self.attend, [n], dict(write="append"))

    def _ends(self, n: int, mask: Tensor) -> list[int]:
        """The positions of a pass at which its blocks end, by what each one sees."""
        expected = [1, 1, n, self.length + n]
        if list(mask.shape) != expected:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}; expected {expected}: with a cache rows begin in the same block"
            )
        if bool(mask.all()):
            return [n]
        seen = mask[0, 0].sum(-1)
        ends = seen.unique_consecutive() - self.length
        blocks = bool((ends.diff() > 0).all()) and int(ends[-1]) == n
        if blocks:
            columns = torch.arange(n, device=mask.device)
            seen = self.length + ends[torch.searchsorted(ends, columns, right=True)]
            blocks = torch.equal(torch.arange(self.length + n, device=mask.device) < seen[:, None], mask[0, 0])
        if not blocks:
            raise ValueError("attention_mask is not block causal, which it must be with a cache")
        return ends.tolist()

    def attend(self, ends: list[int], last_block: dict, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks one after another; ``last_block`` says what :func:`genfast.attention_cached` writes of the last."""
        if layer == len(self.layers):
            self.layers.append(KVCache(len(k), k.shape[1], self.longest, k.shape[3], dtype=k.dtype, device=k.device))
        found = []
        for first, last in pairwise([0, *ends]):
            own_q, own_k, own_v = (t[:, :, first:last] for t in (q, k, v))
            options = last_block if last == ends[-1] else dict(write="append")
            found.append(attention_cached(own_q, self.layers[layer], k=own_k, v=own_v, rope=self.rope, **options))
        return found[0] if len(found) == 1 else torch.cat(found, 2)
