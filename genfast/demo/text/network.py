"""A small transformer over characters that sees everything, or blocks of characters up to its own, with a cache.

One network serves all four samplers. It answers a partly masked text with log p(character) at every position, whatever
the level of noise: LLaDA and MDLM take that as it is, block diffusion sees only earlier blocks and its own, and SEDD's
score of masked positions is the same distribution over e^sigma - 1 (Ou et al. 2025; see :func:`log_score`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genfast.demo.text.data import MASK, VOCABULARY

LENGTH, BLOCK, REACH = 128, 16, 127
"""Characters of a text, and of a block of block diffusion."""


class Answer(NamedTuple):
    """What the network returns, by the names that Hugging Face's models have."""

    logits: Tensor
    past_key_values: Cache | None


class Cache:
    """Keys and values [B, heads, L, width] of the characters so far, layer by layer, and their positions."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.positions: Tensor | None = None

    def get_seq_length(self) -> int:
        return 0 if self.positions is None else self.positions.shape[-1]

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` characters."""
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]
        self.positions = self.positions[..., :length]

    def extend_positions(self, positions: Tensor) -> Tensor:
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], -1)
        return self.positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer; all of its keys and values."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            before = self.layers[layer]
            self.layers[layer] = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        return self.layers[layer]


class Layer(nn.Module):
    """Attention and a feed-forward network.

    Positions enter as a learned bias of the scores by distance. It begins with every head looking at a certain
    distance to the left or right, so that the network starts as something like an n-gram model and spares itself the
    long search for its neighbours.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        distance = torch.arange(-REACH, REACH + 1)
        looks_at = torch.tensor([2.0 ** (h // 2) * (-1) ** (h + 1) for h in range(heads)])
        self.bias = nn.Parameter(-2 * (distance[:, None] - looks_at).abs() / looks_at.abs())

    def forward(self, h: Tensor, distance: Tensor, mask: Tensor | None, extend) -> Tensor:
        batch, length, width = h.shape
        q, k, v = self.qkv(self.norms[0](h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        k, v = extend(k, v)
        # Written out: at this size, in bfloat16 on a CPU, this is twice as fast as PyTorch's fused attention.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        bias = F.embedding(distance, self.bias).movedim(-1, -3).to(scores.dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask, torch.finfo(scores.dtype).min)
        seen = (scores + bias).softmax(-1).to(v.dtype) @ v
        h = h + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


class Network(nn.Module):
    """Log probabilities of the characters under a mask, given those beside it; called as Hugging Face's models are."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.bfloat16 = False
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, MASK)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> Answer:
        """
        Args:
            ids: int64 [B, n].
            attention_mask: [B, m + n], 0 where there is padding; or [B or 1, 1, n, m + n], what a position sees.
            position_ids: int64 [n] or [B, n]; by default they go on after the m characters in the cache.
            past_key_values: the cache, which grows in place.
            use_cache: begin one.

        Returns:
            logits float32 [B, n, V], of which the mask's own is minus infinity, and the cache.
        """
        cache = past_key_values
        if cache is None and use_cache:
            cache = Cache()
        if position_ids is None:
            before = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(before, before + ids.shape[1], device=ids.device)
        keys = position_ids if cache is None else cache.extend_positions(position_ids)
        distance = (keys[..., None, :] - position_ids[..., None]).clamp(-REACH, REACH) + REACH
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool() if attention_mask.dim() == 4 else attention_mask.bool()[:, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            h = self.embedding(ids)
            for i, layer in enumerate(self.layers):
                h = layer(h, distance, mask, (lambda *kv: kv) if cache is None else partial(cache.extend, i))
            logits = self.head(self.norm(h)).float()
        return Answer(F.pad(logits, (0, 1), value=-torch.inf), cache)


def log_score(network: Network, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """SEDD's model of log p_sigma(y) / p_sigma(x) at masked positions: log p(y) - log(e^sigma - 1), 0 for the mask.

    At noise sigma a character is still y with probability p(y) e^-sigma, and masked with 1 - e^-sigma.
    """

    def model(ids: Tensor, sigma: Tensor, **options) -> Tensor:
        logits = network(ids, **options).logits
        score = (logits / temperature).log_softmax(-1) - torch.expm1(sigma).log()[:, None, None]
        score[..., MASK] = 0
        return score

    return model


def block_diffusion_mask(length: int, block: int) -> Tensor:
    """bool [2 length, 2 length], who sees whom in training on a noisy text followed by the clean one (BD3-LM).

    Noisy characters see their own noisy block and the clean blocks before it; clean ones their own and those before.
    """
    number = torch.arange(length) // block
    q, k = number[:, None], number
    noisy = torch.cat([q == k, q > k], 1)
    return torch.cat([noisy, torch.cat([torch.zeros_like(noisy[:, :length]), q >= k], 1)])
