"""A small random language model with the corners that text samplers use: padding, positions, a cache of keys and
values, and attention masks in the forms that published models take."""

from types import SimpleNamespace

import torch
from torch import nn


class Cache:
    """Keys and values per layer, [B, 1, L, d], in one object that grows in place and can be cropped."""

    def __init__(self):
        self.layers = []

    def get_seq_length(self):
        return self.layers[0][0].shape[2] if self.layers else 0

    def crop(self, length):
        self.layers = [tuple(t[:, :, :length] for t in layer) for layer in self.layers]


class TinyLM(nn.Module):
    """Two layers of attention and two linear layers, float32, logits of a standard deviation near ``sharp``.

    Args:
        cache: what ``use_cache=True`` answers: ``"object"``, a :class:`Cache`, or ``"tuple"``, a tuple of pairs.
        causal_blocks: without an attention mask, block-causal attention with blocks of this many positions.
    """

    def __init__(self, vocab=40, width=16, layers=2, sharp=3.0, seed=0, cache="object", longest=128):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def weight(*shape, scale=1.0):
            return nn.Parameter(torch.randn(*shape, generator=draw) * scale)

        self.cache_kind, self.device, self.calls = cache, torch.device("cpu"), 0
        self.token, self.position = weight(vocab, width), weight(longest, width)
        self.qkv = nn.ParameterList(weight(3, width, width, scale=width**-0.5) for _ in range(layers))
        self.mix = nn.ParameterList(weight(width, width, scale=width**-0.5) for _ in range(layers))
        self.head = weight(width, vocab, scale=sharp * width**-0.5)

    def forward(
        self, ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False, store_kv=True
    ):
        self.calls += 1
        past = past_key_values
        old = past.layers if isinstance(past, Cache) else past or []
        before = old[0][0].shape[2] if old else 0
        batch, length = ids.shape
        allowed = self.allowed(attention_mask, length, before)
        if position_ids is None:
            position_ids = torch.arange(before, before + length).expand(batch, -1)
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
                position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        x = self.token[ids] + self.position[position_ids]
        layers = []
        for k, (qkv, mix) in enumerate(zip(self.qkv, self.mix)):
            q, key, value = (x @ w for w in qkv)
            key, value = key[:, None], value[:, None]
            if old:
                key, value = torch.cat([old[k][0], key], 2), torch.cat([old[k][1], value], 2)
            layers.append((key, value))
            scores = q[:, None] @ key.transpose(2, 3) / q.shape[-1] ** 0.5
            # Rows that may see nothing get 0, not NaN.
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
            x = x + torch.tanh((p @ value)[:, 0] @ mix)
        logits = torch.nn.functional.layer_norm(x, x.shape[-1:]) @ self.head
        return SimpleNamespace(
            logits=logits, past_key_values=self.stored(past, layers) if use_cache and store_kv else past
        )

    def stored(self, past, layers):
        if self.cache_kind == "tuple":
            return tuple(layers)
        past = Cache() if past is None else past
        past.layers = layers
        return past

    @staticmethod
    def allowed(mask, length, before):
        """bool, broadcast to [B, 1, length, before + length]."""
        if mask is None or isinstance(mask, str):
            return torch.ones(length, before + length, dtype=torch.bool)
        if mask.dim() == 2:
            return mask.bool()[:, None, None]
        if mask.dim() == 3:
            mask = mask[:, None]
        if mask.dtype == torch.bool:
            return mask
        # Additive masks hold 0 and -inf; the 0 and 1 of SDAR are whole-number truth values.
        return mask == 0 if bool((mask == -torch.inf).any()) or not bool((mask == 1).any()) else mask.bool()
