"""How the ranges of an ``AttentionMask`` are worked out: int32 [..., 4], (begin, end, begin, end) of a row's intervals.

Most masks have rows of which the order of the intervals is known, and whole runs of rows that are alike: these are made
in a few passes over int32, a block or a document at a time. :func:`joined` takes any intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = 2**31 - 1
"""Both ends of an interval that is empty, while intervals are being sorted."""


def positions(q_len: int, kv_len: int, first: int | Tensor, device) -> Tensor:
    """[1 or B, Lq]: the positions that rise by one from ``first``, an int or int64 [B]; -1 and kv_len stand for what
    lies before and after the keys.
    """
    dtype = torch.int32 if q_len + kv_len < 2**31 else torch.int64
    if isinstance(first, Tensor):
        first = first.clamp(-q_len - 1, kv_len).to(dtype)[:, None]
        at = torch.arange(q_len, dtype=dtype, device=first.device) + first
    else:
        first = min(max(first, -q_len - 1), kv_len)
        at = torch.arange(first, first + q_len, dtype=dtype, device=device)[None]
    return at.clamp_(-1, kv_len)


def from_the_first_key(end: Tensor) -> Tensor:
    """Of rows [B, Lq] that see the keys before ``end``."""
    ranges = torch.zeros((*end.shape, 4), dtype=torch.int32, device=end.device)
    ranges[..., 1] = end
    return ranges


def one_each(begin: Tensor, end: Tensor, kv_len: int) -> Tensor:
    """Of rows that see the keys of one interval, not clipped yet."""
    ends = torch.stack([begin, end], -1).clamp_(0, kv_len).to(torch.int32)
    ends *= (ends[..., :1] < ends[..., 1:]).to(torch.int32)
    return torch.nn.functional.pad(ends, (0, 2))


def block_diffusion(lengths: Tensor, counts: list[int], block: int, interleaved: bool) -> Tensor:
    """[1, 2 * tokens, 4], of documents of ``lengths``, which ``counts`` has on the host."""
    total = sum(counts)
    block = max(min(block, total), 1)
    device = lengths.device
    # Of each document: where it ends and begins, in tokens and in blocks.
    lengths = lengths.to(torch.int32)
    sizes = (lengths + (block - 1)).div(block, rounding_mode="floor")
    last = torch.stack([lengths, sizes]).cumsum(1, dtype=torch.int32)
    first = torch.stack([last[0] - lengths, last[1] - sizes])
    # The same of the document of each block.
    blocks = sum(-(-n // block) for n in counts)
    own = torch.repeat_interleave(sizes, output_size=blocks)
    (begin, first_block), (end, last_block) = (ends.index_select(1, own).unbind() for ends in (first, last))
    number = torch.arange(blocks, dtype=torch.int32, device=device)
    block_begin = begin + (number - first_block) * block
    block_end = torch.minimum(block_begin + block, end)

    # Where x_t and x_0 of a document begin in the row, less where it begins among the documents.
    noised, clean = (begin, end) if interleaved else (0, total)
    own_end, clean_begin, clean_end = block_end + noised, begin + clean, block_begin + clean
    # The last block of x_t may touch x_0.
    touching = own_end == clean_begin
    second = (~touching & (clean_begin < clean_end)).to(torch.int32)
    nothing = torch.zeros_like(begin)
    of_noised = (
        block_begin + noised,
        torch.where(touching, clean_end, own_end),
        clean_begin * second,
        clean_end * second,
    )
    of_clean = (clean_begin, block_end + clean, nothing, nothing)
    ranges = torch.cat([torch.stack(ends, -1) for ends in (of_noised, of_clean)])
    rows = (block_end - block_begin).repeat(2)
    if interleaved:
        order = torch.cat([number + first_block, number + last_block]).argsort()
        ranges, rows = ranges[order], rows[order]
    return ranges.repeat_interleave(rows, 0, output_size=2 * total)[None]


def joined(pairs: list[tuple[Tensor, Tensor]], kv_len: int) -> Tensor:
    """Of a list of (begin, end), each int [B, Lq]: clipped, in order, neighbours made one.

    Raises:
        ValueError: a row would have more than two intervals.
    """
    begin, end = (torch.stack([pair[k] for pair in pairs], -1).clamp_(0, kv_len).to(torch.int32) for k in (0, 1))
    empty = begin >= end
    begin, end = (t.masked_fill_(empty, _NONE) for t in (begin, end))
    begin, order = begin.sort(-1)
    end = end.gather(-1, order).cummax(-1).values
    apart = torch.nn.functional.pad(begin[..., 1:] > end[..., :-1], (1, 0))
    slot = apart.cumsum(-1)
    begin = torch.full_like(begin, _NONE).scatter_reduce(-1, slot, begin, "amin")
    end = torch.zeros_like(end).scatter_reduce(-1, slot, end, "amax")
    if len(pairs) > 2 and bool((begin[..., 2:] != _NONE).any()):
        raise ValueError("a row would have more than two intervals; an AttentionMask has at most two")
    begin, end = begin[..., :2], end[..., :2]
    empty = begin == _NONE
    return torch.stack([t.masked_fill(empty, 0) for t in (begin, end)], -1).flatten(-2)
