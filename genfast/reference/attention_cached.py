"""Attention over a cache and an active block in plain PyTorch: ``attention_cached`` and ``cache_write``.

Row b has keys and values at positions 0 ... lengths[b] - 1 of the cache, and behind them those of the block. Every
query sees all of them; the arithmetic is that of :mod:`genfast.reference.attention`.

Rotary embedding (Su et al. 2021, arXiv:2104.09864): at position p, the numbers u and v of a pair d become

    u cos[p, d] - v sin[p, d],    v cos[p, d] + u sin[p, d],

in float32, rounded to the dtype. The pairs are (x[d], x[d + D/2]) ("half", GPT-NeoX) or (x[2d], x[2d + 1])
("interleaved", GPT-J).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference.attention import scores, wide


def rotate(x: Tensor, first: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, n, D], row i of sequence b being at position first[b] + i; beyond the tables their last row counts."""
    at = (first[:, None] + torch.arange(x.shape[2], device=x.device)).clamp(0, cos.shape[0] - 1)
    cos, sin = (t[at][:, None].to(wide(x).dtype) for t in (cos, sin))
    pairs = wide(x).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    u, v = pairs.unbind(-1 if interleaved else -2)
    turned = u * cos - v * sin, v * cos + u * sin
    return torch.stack(turned, -1 if interleaved else -2).flatten(-2).to(x.dtype)


def rows(store: Tensor, table: Tensor | None) -> Tensor:
    """[B, Hkv, capacity, D] of what a cache stores."""
    return store if table is None else store[table.long()].transpose(1, 2).flatten(2, 3)


def cache_write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, first: Tensor, end: Tensor,
    cos: Tensor | None, sin: Tensor | None, *, interleaved: bool,
) -> None:  # fmt: skip
    """Row i of k, rotated, and of v goes to position first[b] + i of keys and values, if that is in [0, end[b]).

    keys and values are [B, Hkv, capacity + 1, .] or, with a table, [pages + 1, Hkv, page_size, .]; their last position
    or page takes what is dropped.
    """
    if cos is not None:
        k = rotate(k, first, cos, sin, interleaved)
    at = first[:, None] + torch.arange(k.shape[2], device=k.device)
    inside = (at >= 0) & (at < end[:, None])
    if table is None:
        pages = torch.arange(k.shape[0], device=k.device)[:, None]
        at = at.where(inside, keys.shape[2] - 1)
    else:
        page_size = keys.shape[2]
        column = torch.div(at, page_size, rounding_mode="floor").clamp(0, table.shape[1] - 1)
        pages = table.gather(1, column).long().where(inside, keys.shape[0] - 1)
        at = at.remainder(page_size)
    for memory, t in ((keys, k), (values, v)):
        memory[pages, :, at] = t.transpose(1, 2)


def attention_cached(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    table: Tensor | None,
    lengths: Tensor,
    first: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    interleaved: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """See :func:`genfast.attention_cached`; out and lse are written. With ``first``, q and k are to be rotated."""
    if first is not None:
        q = rotate(q, first, cos, sin, interleaved)
        k = None if k is None else rotate(k, first, cos, sin, interleaved)
    keys, values = rows(keys, table), rows(values, table)
    seen = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]
    if k is not None:
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        seen = torch.cat([seen, seen.new_ones(k.shape[0], k.shape[2])], 1)
    # What lies beyond a row may be anything, and 0 times NaN is NaN.
    values = wide(values).masked_fill(~seen[:, None, :, None], 0.0)
    s = scores(q, keys, None, scale).masked_fill(~seen[:, None, None], -torch.inf)
    found = s.logsumexp(-1)
    p = (s - found.masked_fill(found == -torch.inf, 0.0)[..., None]).exp()
    out.copy_(p @ values.repeat_interleave(q.shape[1] // values.shape[1], 1))
    lse.copy_(found)
