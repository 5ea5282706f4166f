"""Where the tensors of a bucket are, as a table on the device: int64

    address and dtype of each tensor [n], where each begins in the bucket and where all end [n + 1],
    for each tile of the bucket the first tensor that reaches into or past it [tiles + 1].

The numbers travel to the device as arguments of a kernel, and the rest is found there: no copy from the host's memory
that would have to wait, or to stay as it is for as long as a captured graph is replayed.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import triton
import triton.language as tl

TILE = 1024
ROWS = TILE // 256
AT_ONCE = 64
_KEPT = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPE_SHIFT = 58  # beyond every address
_tables: OrderedDict[tuple, torch.Tensor] = OrderedDict()


def _word(number: int) -> int:
    """A number as every other is passed: odd, and of 64 bits. Triton compiles a kernel for each combination of widths
    and alignments of the numbers of a tuple, whatever it is told not to specialise."""
    return 1 << 62 | number << 1 | 1


@triton.jit
def _number(word):
    return (word & 0x3FFFFFFFFFFFFFFF) >> 1


@triton.jit(do_not_specialize=["first", "count"])
def write_kernel(table, first, count, words):
    """Tensors from ``first`` on, each with its address and its end; ``words`` is a tuple of two for each."""
    N: tl.constexpr = len(words) // 2
    for k in tl.static_range(N):
        if first + k < count:
            tl.store(table + first + k, _number(words[2 * k]))
            tl.store(table + count + 1 + first + k, _number(words[2 * k + 1]))
    tl.store(table + count, tl.zeros((), tl.int64))


@triton.jit(do_not_specialize=["count", "steps", "tiles"])
def locate_kernel(table, count, steps, tiles, TILE: tl.constexpr, LANES: tl.constexpr):
    """The first tensor of each tile: how many end at or before it, by bisection."""
    tile = tl.program_id(0) * LANES + tl.arange(0, LANES)
    begin = tile.to(tl.int64) * TILE
    low = tl.zeros((LANES,), tl.int32)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        before = open & (tl.load(table + count + 1 + middle, mask=open, other=0) <= begin)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & (before == 0), middle, high)
    tl.store(table + 2 * count + 1 + tile, low.to(tl.int64), mask=tile < tiles)


def table_of(tensors, layout) -> torch.Tensor:
    """The table of contiguous tensors, made on the current stream, or as it was made on it before.

    One that a CUDA graph captures is the graph's own.
    """
    device = tensors[0].device
    if device.type == "meta":  # tensors without an address
        return _made(tensors, layout)
    key = (layout, device, *((t.data_ptr(), t.dtype) for t in tensors))
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _made(tensors, layout)
        key += (torch.cuda.current_stream(device).cuda_stream,)
    # Out and in again: threads of several devices may be here at once, and the latest is then last.
    table = _tables.pop(key, None)
    if table is None:
        table = _made(tensors, layout)
    _tables[key] = table
    while len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return table


def _made(tensors, layout) -> torch.Tensor:
    count, tiles = len(tensors), tile_count(layout)
    table = torch.empty(2 * count + tiles + 2, dtype=torch.int64, device=tensors[0].device)
    words = []
    for t, offset in zip(tensors, layout.offsets):
        words += [_word(t.data_ptr() | _DTYPES[t.dtype] << DTYPE_SHIFT), _word(offset + t.numel())]
    words += [_word(0)] * (-len(words) % (2 * AT_ONCE))
    for first in range(0, count, AT_ONCE):
        write_kernel[(1,)](table, first, count, tuple(words[2 * first : 2 * (first + AT_ONCE)]), num_warps=1)
    locate_kernel[(-(-(tiles + 1) // 256),)](
        table, count, count.bit_length(), tiles + 1, TILE=TILE, LANES=256, num_warps=4
    )
    return table


def tile_count(layout) -> int:
    """Tiles of a bucket, its padding included."""
    return -(-layout.ranks * layout.chunk // TILE)
