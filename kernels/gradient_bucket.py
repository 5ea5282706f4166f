"""Packing, reducing and unpacking buckets of gradients, each in one pass over memory, in Triton.

A program takes a tile of four blocks of 256 values of the flat bucket, and of the tensors one after the other those
that reach into it, which it finds in a table on the device (``gradient_table.py``). A tile that lies in one tensor, as
nearly all do, is read and written 16 bytes at a time. Blocks, scales and sums of squares then never leave registers:
the arithmetic, and so the bits, are those of ``genfast.reference.gradient_bucket``.

The squares of a tensor are added in float64, tile by tile, and then over its tiles by a program of its own in a fixed
order. A tensor that is not contiguous goes through a contiguous copy.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.gradient_wire import BLOCK, WIRES, aligned
from genfast.kernels.gradient_table import DTYPE_SHIFT, ROWS, TILE, table_of, tile_count
from genfast.kernels.gradient_wire import LANES, decode, encode, magnitude
from genfast.kernels.rounding import rounded

EXACT = {"num_warps": 4, "enable_fp_fusion": False}
ANY = -1
"""Of the tensors' dtypes: not all the same."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SHIFT = tl.constexpr(DTYPE_SHIFT)


@triton.jit
def _tile(ROWS: tl.constexpr):
    """(lanes [rows, 256] of a tile, its rows)."""
    row = tl.arange(0, ROWS)[:, None]
    return row * LANES + tl.arange(0, LANES)[None, :], row


@triton.jit
def _segment(table, count, t, begin, ROWS: tl.constexpr):
    """A tensor as a tile that begins at ``begin`` sees it: (address of lane 0 were it the tensor's, dtype, its first
    lane, the lane where it ends)."""
    word = tl.load(table + t)
    offset = tl.load(table + count + t)
    end = tl.load(table + count + 1 + t)
    dtype = (word >> _SHIFT).to(tl.int32)
    size = tl.where(dtype == 0, 4, 2)
    address = word - (word >> _SHIFT << _SHIFT) + (begin - offset) * size
    low = tl.maximum(offset - begin, 0).to(tl.int32)
    return address, dtype, low, tl.minimum(end - begin, ROWS * LANES).to(tl.int32)


@triton.jit
def _read_as(address, lanes, low, high, v, T: tl.constexpr):
    if (low == 0) & (high == lanes.shape[0] * LANES) & (address % 16 == 0):
        v = tl.load(tl.multiple_of(address.to(tl.pointer_type(T)), 16) + lanes).to(tl.float32)
    else:
        mine = (lanes >= low) & (lanes < high)
        v = tl.where(mine, tl.load(address.to(tl.pointer_type(T)) + lanes, mask=mine, other=0.0).to(tl.float32), v)
    return v


@triton.jit
def _write_as(address, lanes, low, high, v, T: tl.constexpr):
    if (low == 0) & (high == lanes.shape[0] * LANES) & (address % 16 == 0):
        tl.store(tl.multiple_of(address.to(tl.pointer_type(T)), 16) + lanes, rounded(v, T))
    else:
        tl.store(address.to(tl.pointer_type(T)) + lanes, rounded(v, T), mask=(lanes >= low) & (lanes < high))


@triton.jit
def _read(address, dtype, lanes, low, high, v, DTYPE: tl.constexpr):
    if DTYPE == 0:
        v = _read_as(address, lanes, low, high, v, tl.float32)
    elif DTYPE == 1:
        v = _read_as(address, lanes, low, high, v, tl.bfloat16)
    elif DTYPE == 2:
        v = _read_as(address, lanes, low, high, v, tl.float16)
    else:
        if dtype == 0:
            v = _read_as(address, lanes, low, high, v, tl.float32)
        elif dtype == 1:
            v = _read_as(address, lanes, low, high, v, tl.bfloat16)
        else:
            v = _read_as(address, lanes, low, high, v, tl.float16)
    return v


@triton.jit
def _write(address, dtype, lanes, low, high, v, DTYPE: tl.constexpr):
    if DTYPE == 0:
        _write_as(address, lanes, low, high, v, tl.float32)
    elif DTYPE == 1:
        _write_as(address, lanes, low, high, v, tl.bfloat16)
    elif DTYPE == 2:
        _write_as(address, lanes, low, high, v, tl.float16)
    else:
        if dtype == 0:
            _write_as(address, lanes, low, high, v, tl.float32)
        elif dtype == 1:
            _write_as(address, lanes, low, high, v, tl.bfloat16)
        else:
            _write_as(address, lanes, low, high, v, tl.float16)


@triton.jit
def _range(table, count, tile):
    """The tensors that a tile may hold values of: [first, last)."""
    first = tl.load(table + 2 * count + 1 + tile).to(tl.int32)
    last = tl.load(table + 2 * count + 2 + tile).to(tl.int32)
    return first, tl.minimum(last + 1, count)


@triton.jit
def _factor(scale, number):
    if scale is not None:
        number = tl.load(scale)
    return number


@triton.jit(do_not_specialize=["count", "scale_stride", "per_chunk", "blocks"])
def pack_kernel(
    table, count, codes, stride, scales, scale_stride, per_chunk, blocks, scale, number, residual, finite, numel,
    WIRE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    lanes, row = _tile(ROWS)
    begin = tile * (ROWS * LANES)
    inside = begin + lanes < numel
    first, last = _range(table, count, tile)
    v = tl.zeros(lanes.shape, tl.float32)
    for t in range(first, last):
        address, dtype, low, high = _segment(table, count, t, begin, ROWS)
        v = _read(address, dtype, lanes, low, high, v, DTYPE)
    v = tl.where(inside, v * _factor(scale, number), 0.0)
    before = v
    if residual is not None:
        before = tl.load(residual + begin + lanes, mask=inside, other=0.0)
        v = v + before
    block = tile * ROWS + row
    chunk, in_chunk = block // per_chunk, block % per_chunk
    read = encode(
        v, codes, scales, chunk * stride + in_chunk * LANES + lanes % LANES, chunk * scale_stride + in_chunk,
        in_chunk == per_chunk - 1, in_chunk, block < blocks, WIRE,
    )  # fmt: skip
    odd = magnitude(v) >= 0x7F800000
    unread = magnitude(read) >= 0x7F800000
    if residual is not None:
        tl.store(residual + begin + lanes, tl.where(unread, before, v - read), mask=inside)
    if WIRE < 3:
        odd = odd | unread
    if tl.max(tl.max(odd.to(tl.int32), axis=1), axis=0) > 0:
        for t in range(first, last):
            _, _, low, high = _segment(table, count, t, begin, ROWS)
            mine = odd & (lanes >= low) & (lanes < high)
            if tl.max(tl.max(mine.to(tl.int32), axis=1), axis=0) > 0:
                tl.store(finite + t, tl.zeros((), tl.int8))


@triton.jit(do_not_specialize=["scale_stride", "ranks", "per_chunk"])
def reduce_kernel(
    codes, stride, scales, scale_stride, ranks, per_chunk, out, out_scales, scale, number, residual,
    WIRE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lanes, row = _tile(ROWS)
    block = tl.program_id(0).to(tl.int64) * ROWS + row
    mask = block < per_chunk
    at = block * LANES + lanes % LANES
    total = tl.full(lanes.shape, -0.0, tl.float32)
    # The reads of a group of ranks may be in flight together; their values are added one after the other.
    for base in range(0, ranks, GROUP):
        for k in tl.static_range(GROUP):
            r = tl.zeros((), tl.int64) + (base + k)
            total += decode(codes, scales, r * stride + at, r * scale_stride + block, mask, WIRE)
    v = total * _factor(scale, number)
    before = v
    if residual is not None:
        before = tl.load(residual + at, mask=mask, other=0.0)
        v = v + before
    read = encode(v, out, out_scales, at, block, block == per_chunk - 1, block, mask, WIRE)
    if residual is not None:
        unread = magnitude(read) >= 0x7F800000
        tl.store(residual + at, tl.where(unread, before, v - read), mask=mask)


@triton.jit(do_not_specialize=["count", "scale_stride", "per_chunk", "blocks"])
def unpack_kernel(
    table, count, codes, stride, scales, scale_stride, per_chunk, blocks, scale, number, squares,
    WIRE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    lanes, row = _tile(ROWS)
    begin = tile * (ROWS * LANES)
    block = tile * ROWS + row
    chunk, in_chunk = block // per_chunk, block % per_chunk
    v = decode(
        codes, scales, chunk * stride + in_chunk * LANES + lanes % LANES, chunk * scale_stride + in_chunk,
        block < blocks, WIRE,
    )  # fmt: skip
    v = v * _factor(scale, number)
    first, last = _range(table, count, tile)
    for t in range(first, last):
        address, dtype, low, high = _segment(table, count, t, begin, ROWS)
        _write(address, dtype, lanes, low, high, v, DTYPE)
        mine = tl.where((lanes >= low) & (lanes < high), v, 0.0).to(tl.float64)
        # From one piece of a tensor to the next the tile or the tensor, or both, go up: no two have the same sum.
        tl.store(squares + tile + t, tl.sum(tl.sum(mine * mine, axis=1), axis=0))


@triton.jit(do_not_specialize=["count"])
def finish_kernel(table, count, squares, square_norm, finite, TILE: tl.constexpr, LANES: tl.constexpr):
    """The sum of a tensor's squares. Those of finite numbers, float32 as they are, cannot overflow float64."""
    t = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(table + count + t), tl.load(table + count + 1 + t)
    first = begin // TILE
    pieces = tl.where(end > begin, (end + (TILE - 1)) // TILE - first, 0)
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for at in range(0, pieces.to(tl.int32), LANES):
        total += tl.load(squares + first + t + at + lanes, mask=at + lanes < pieces, other=0.0)
    norm = tl.sum(total, axis=0)
    tl.store(square_norm + t, norm)
    tl.store(finite + t, (norm - norm == 0.0).to(tl.int8))


def pack_gradients(gradients, *, layout, scale, residual, out, finite) -> None:
    """The arguments are those of the reference's function. Nothing waits for the device."""
    if not gradients:
        return
    gradients = [t.contiguous() for t in gradients]
    finite = finite.view(torch.int8).fill_(1)
    if not layout.chunk:
        return
    with _on_device(out):
        target = aligned(out)
        codes, stride, scales, scale_stride = _wire(target, layout)
        blocks = layout.ranks * (layout.chunk // BLOCK)
        scale, number = _scale(scale)
        pack_kernel[(tile_count(layout),)](
            table=table_of(gradients, layout), count=len(gradients), codes=codes, stride=stride, scales=scales,
            scale_stride=scale_stride, per_chunk=layout.chunk // BLOCK, blocks=blocks, scale=scale, number=number,
            residual=residual, finite=finite, numel=layout.numel, WIRE=WIRES[layout.wire].code,
            DTYPE=_dtype(gradients), ROWS=ROWS, **EXACT,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def reduce_chunks(received, *, layout, scale, residual, out) -> None:
    """The arguments are those of the reference's function. Nothing waits for the device."""
    if not layout.chunk:
        return
    with _on_device(out):
        target = aligned(out)
        codes, stride, scales, scale_stride = _wire(aligned(received), layout)
        out_codes, _, out_scales, _ = _wire(target[None], layout)
        scale, number = _scale(scale)
        per_chunk = layout.chunk // BLOCK
        reduce_kernel[(-(-per_chunk // ROWS),)](
            codes=codes, stride=stride, scales=scales, scale_stride=scale_stride, ranks=layout.ranks,
            per_chunk=per_chunk, out=out_codes, out_scales=out_scales, scale=scale, number=number, residual=residual,
            WIRE=WIRES[layout.wire].code, GROUP=_group(layout.ranks), ROWS=ROWS, **EXACT,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def unpack_gradients(reduced, gradients, *, layout, scale, square_norm, finite) -> None:
    """The arguments are those of the reference's function. Nothing waits for the device."""
    if not gradients:
        return
    if not layout.chunk:
        square_norm.zero_()
        finite.fill_(True)
        return
    written = [
        t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format) for t in gradients
    ]
    with _on_device(reduced):
        table, count, tiles = table_of(written, layout), len(written), tile_count(layout)
        codes, stride, scales, scale_stride = _wire(aligned(reduced), layout)
        blocks = layout.ranks * (layout.chunk // BLOCK)
        scale, number = _scale(scale)
        squares = torch.empty(tiles + count, dtype=torch.float64, device=reduced.device)
        unpack_kernel[(-(-layout.numel // TILE),)](
            table=table, count=count, codes=codes, stride=stride, scales=scales, scale_stride=scale_stride,
            per_chunk=layout.chunk // BLOCK, blocks=blocks, scale=scale, number=number, squares=squares,
            WIRE=WIRES[layout.wire].code, DTYPE=_dtype(written), ROWS=ROWS, **EXACT,
        )  # fmt: skip
        finish_kernel[(count,)](
            table=table, count=count, squares=squares, square_norm=square_norm, finite=finite.view(torch.int8),
            TILE=TILE, LANES=2048, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    for t, source in zip(gradients, written):
        if source is not t:
            t.copy_(source)


def _wire(bucket: Tensor, layout) -> tuple[Tensor, int, Tensor | None, int]:
    """A bucket's codes and the codes from chunk to chunk; its scales, if there are any, and likewise."""
    if not layout.quantised:
        codes = bucket.view(WIRES[layout.wire].dtype)
        return codes, codes.shape[1], None, 0
    scales = bucket.view(-1)[layout.code_bytes :].view(torch.float32)
    return bucket.view(torch.int8), layout.chunk_bytes, scales, layout.chunk_bytes // 4


def _group(ranks: int) -> int:
    """Its largest divisor up to 8, so that no rank has to be looked at to see whether it is one."""
    return max(k for k in range(1, 9) if ranks % k == 0)


def _dtype(gradients) -> int:
    kinds = {_DTYPES[t.dtype] for t in gradients}
    return kinds.pop() if len(kinds) == 1 else ANY


def _scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))


def _on_device(t: Tensor):
    """Triton launches on the current device; make it the tensors' own."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()
