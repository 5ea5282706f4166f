"""Nearest codes: a screen on the matrix units, then float64 where the screen leaves a doubt.

``genfast.reference.vector_quantize`` is the specification: the same indices to the last tie. With r the score's real
value, less what all codes of a row share,

    r = |e|^2 / 2 - z e  ("l2"),   - z e  ("dot"),   - z e / |e|  ("cosine"),

1. ``code_kernel`` takes |e|^2 of every code, and of every block of 64 codes what bounds the screen's error.
2. ``screen_kernel`` multiplies a tile of rows with tiles of codes (16-bit numbers as they are, others as TF32) and
   keeps of 64 scores one number: a bound that r of none of these codes is below. Nothing else is stored, 1/64 of a
   matrix of rows by codes, and no two programs write to one place, so codes are split freely where rows are few.
3. ``select_kernel`` visits a row's blocks in the order of their bounds, scores their codes in float64 in the
   reference's order of summation (``"fast"``: in float32), and stops at the first block whose bound is above the
   k-th score found.

Where numbers are too large or too small for the screen the bound is minus infinity, and every block is visited: slow,
not wrong.

The bound on the error. With u = 2^-9 + 2^-20 for TF32, whose operands are cut to 10 bits, and 0 for products that are
exact, and 2^-22 per addition, four times a rounding, because matrix units cut and do not round:
|screen - r| <= (u + D 2^-22) |z| |e| + 2^-22 (|z| |e| + |e|^2) + what is flushed to zero, 2^-126 an operation. The
last but one holds the roundings of |e|^2 / 2, of the sum, of the bound itself and those of the reference's float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.backends import interpreting
from genfast.kernels.attention_sizes import target_of
from genfast.kernels.vector_quantize_configurations import GROUP, LEAST_BYTES, SCREEN, tile_sizes
from genfast.reference.vector_quantize import SHORTEST

FILL = 264
"""Programs from which on the device counts as full: two for each multiprocessor of the largest there is."""

MOST_BOUNDS = 2**24
"""Bounds in memory at once (64 MiB); more rows are done in turns."""

MOST_BLOCKS = 4096
"""Bounds of a row in registers at once."""

EXACT = {"enable_fp_fusion": False}
"""No contraction: the written order of operations is the specification's."""

_INTERPRETED = tl.constexpr(interpreting())
"""Triton's interpreter multiplies the bit patterns of bfloat16; products of it are exact in float32."""

_GROUP = tl.constexpr(GROUP)
_SHORTEST = tl.constexpr(SHORTEST)
_NONE = tl.constexpr(-1e38)
"""In place of - |e|^2 / 2 for codes that are not finite or beyond the last."""
_FAR = tl.constexpr(2**31 - 1)
_LARGE = tl.constexpr(2.0**60)
_TINY = tl.constexpr(2.0**-124)
_ADDITION = tl.constexpr(2.0**-22)
_TF32 = tl.constexpr(2.0**-9 + 2.0**-20)
_F32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["count", "blocks"])
def code_kernel(
    codes, c_group, c_code, c_dim, offset, inverse, length, slope, floor, count, blocks,
    METRIC: tl.constexpr, CUT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A block of codes: ``offset`` - |e|^2 / 2 or 0 or _NONE; for cosines the ``length`` in float64 and its inverse.

    The screen's error in the block is at most slope |z| + floor.
    """
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k = block.to(tl.int64) * _GROUP + tl.arange(0, _GROUP)
    at = codes + group * c_group + tl.minimum(k, count - 1) * c_code
    squares = tl.zeros((_GROUP,), tl.float64)
    for _ in range(SIZE):
        e = tl.load(at).to(tl.float64)
        squares += e * e
        at += c_dim  # a product might not fit 32 bits
    finite = (squares < float("inf")) & (k < count)
    exact_norm = tl.sqrt(squares)
    out = (group * blocks + block) * _GROUP + tl.arange(0, _GROUP)
    if METRIC == "l2":
        # What is larger than the half of _NONE is in a block that the screen does not judge.
        half = tl.minimum(squares * 0.5, _NONE * -0.5).to(tl.float32)
        tl.store(offset + out, tl.where(finite, -half, _NONE))
    else:
        tl.store(offset + out, tl.where(finite, 0.0, _NONE))
    norm = exact_norm.to(tl.float32) * 1.000001 + _TINY
    norm = tl.where(finite, norm, 0.0)
    largest = tl.max(norm, 0)
    flushed = _TINY * (4 * SIZE)
    rate = CUT + _ADDITION * (SIZE + 2)
    if METRIC == "cosine":
        shortest = tl.full((_GROUP,), _SHORTEST, tl.float64)
        exact_norm = tl.where(exact_norm > shortest, exact_norm, shortest)
        tl.store(length + out, exact_norm)
        scale = tl.where(finite, (1.0 / exact_norm).to(tl.float32), 0.0)
        tl.store(inverse + out, scale)
        flushed *= tl.maximum(tl.max(scale, 0) * 1.000001, 1.0)
        slope_here = tl.max(norm * scale, 0) * (rate * 1.000001) + flushed
        floor_here = flushed * (1.0 + largest)
    else:
        slope_here = largest * (rate * 1.000001) + flushed
        floor_here = flushed * (1.0 + largest)
        if METRIC == "l2":
            floor_here += largest * largest * (_ADDITION * 1.000001)
    here = group * blocks + block
    tl.store(slope + here, tl.where(largest < _LARGE, slope_here, float("inf")))
    tl.store(floor + here, floor_here)


@triton.jit
def _tile(base, rows, dims, stride, SIZE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """Numbers [rows, dims], 0 beyond the last dimension."""
    at = base + rows[:, None] + dims.to(tl.int64)[None, :] * stride
    if SIZE % DEPTH:
        x = tl.load(at, mask=(dims < SIZE)[None, :] & (rows >= 0)[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if WIDEN or _INTERPRETED else x


@triton.jit
def _squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit(do_not_specialize=["first", "rows", "seq_len", "count", "blocks", "part_tiles"])
def screen_kernel(
    z, codes, offset, inverse, slope, floor, bounds,
    z_batch, z_row, z_group, z_dim, c_group, c_code: tl.constexpr, c_dim, first, rows, seq_len, count, blocks,
    part_tiles, METRIC: tl.constexpr, WIDEN: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of rows and ``part_tiles`` tiles of codes: ``bounds`` [G, rows, blocks].

    Rows and codes beyond the last are read as the last; ``offset`` takes such codes out. The stride of codes is
    compiled in: of 8 numbers it is not known to be a multiple of 8 otherwise, and they are copied one by one.
    """
    group = tl.program_id(2).to(tl.int64)
    lane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = first + tl.minimum(lane, rows - 1)
    row_at = row // seq_len * z_batch + row % seq_len * z_row
    z += group * z_group
    codes += group * c_group
    dims = tl.arange(0, DEPTH)
    wide = tl.full((), CODES, tl.int64)
    x = _tile(z, row_at, dims, z_dim, SIZE, DEPTH, WIDEN)
    squares = _squares(x)
    for done in range(DEPTH, SIZE, DEPTH):
        squares += _squares(_tile(z, row_at, done + dims, z_dim, SIZE, DEPTH, WIDEN))
    # Squares below the smallest number are lost: less than 2^-62 of the norm for each.
    norm = tl.sqrt(squares) * (1.0 + (SIZE + 8) * 2.0**-23) + SIZE * 2.0**-62
    norm = tl.where(norm < _LARGE, norm, float("inf"))

    per_tile: tl.constexpr = CODES // _GROUP
    tiles = tl.cdiv(blocks, per_tile)
    begin = tl.program_id(1) * part_tiles
    offset += group * blocks * _GROUP
    inverse += group * blocks * _GROUP
    slope += group * blocks
    floor += group * blocks
    bounds += (group * rows + lane)[:, None] * blocks
    for tile in range(begin, tl.minimum(begin + part_tiles, tiles)):
        k = tl.arange(0, CODES).to(tl.int64) + tile * wide
        code_at = tl.minimum(k, count - 1) * c_code
        products = tl.zeros((ROWS, CODES), tl.float32)
        if SIZE <= DEPTH:
            e = _tile(codes, code_at, dims, c_dim, SIZE, DEPTH, WIDEN)
            products = tl.dot(x, tl.trans(e), products, input_precision="tf32")
        else:
            for done in range(0, SIZE, DEPTH):
                x = _tile(z, row_at, done + dims, z_dim, SIZE, DEPTH, WIDEN)
                e = _tile(codes, code_at, done + dims, c_dim, SIZE, DEPTH, WIDEN)
                products = tl.dot(x, tl.trans(e), products, input_precision="tf32")
        inside = k < blocks * _GROUP
        if METRIC == "cosine":
            products *= tl.load(inverse + k, mask=inside, other=0.0)[None, :]
        score = products + tl.load(offset + k, mask=inside, other=_NONE)[None, :]
        block = tile * per_tile + tl.arange(0, per_tile)
        some = block < blocks
        error = norm[:, None] * tl.load(slope + block, mask=some, other=0.0)[None, :]
        error += tl.load(floor + block, mask=some, other=0.0)[None, :]
        if per_tile == 1:
            top = tl.max(score, 1)[:, None]
        else:
            top = tl.max(tl.reshape(score, (ROWS, per_tile, _GROUP)), 2)
        bound = -top - error
        # NaN and infinity come from codes that are not finite, and from 0 times an infinite slope.
        bound = tl.where(tl.abs(bound) < float("inf"), bound, float("-inf"))
        tl.store(bounds + block[None, :], bound, mask=(lane < rows)[:, None] & some[None, :])


@triton.jit(do_not_specialize=["first", "rows", "seq_len", "groups", "count", "blocks", "wanted"])
def select_kernel(
    z, codes, offset, length, bounds, indices, distances,
    z_batch, z_row, z_group, z_dim, c_group, c_code, c_dim, first, rows, seq_len, groups, count, blocks, wanted,
    METRIC: tl.constexpr, WIDE: tl.constexpr, DISTANCES: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row: its ``wanted`` best codes, from the blocks that may hold one."""
    lane, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = first + lane
    z += row // seq_len * z_batch + row % seq_len * z_row + group * z_group
    codes += group * c_group
    offset += group * blocks * _GROUP
    length += group * blocks * _GROUP
    bounds += (group * rows + lane) * blocks
    real: tl.constexpr = tl.float64 if WIDE else tl.float32

    dims = tl.arange(0, 128)
    parts = tl.zeros((128,), tl.float64)
    for done in range(0, SIZE, 128):
        x = tl.load(z + (done + dims).to(tl.int64) * z_dim, mask=done + dims < SIZE, other=0.0).to(tl.float64)
        parts += x * x
    squares = tl.sum(parts, 0)
    # The reference's rounding of |z - e|^2 and ours of |z|^2, relative.
    slack: tl.constexpr = (SIZE + 8) * (2.0**-52 if WIDE else 2.0**-23)

    place = tl.arange(0, K)
    # The places beyond those wanted are never the worst.
    best = tl.where(place < wanted, float("inf"), float("-inf")).to(real)
    index = tl.where(place < wanted, _FAR, -1)
    worst = tl.max(best, 0)
    worst_index = tl.max(index, 0)
    near = tl.arange(0, _GROUP)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        left = tl.load(bounds + block, mask=block < blocks, other=float("inf"))
        left = tl.where(squares < float("inf"), left, float("inf"))  # nothing is near what is not finite
        lowest = tl.min(left, 0)
        limit = worst.to(tl.float64)
        if METRIC == "l2":
            limit = (limit - squares) * 0.5 + (limit + squares) * slack
        while (lowest < float("inf")) & (lowest.to(tl.float64) <= limit):
            here = tl.min(tl.where(left == lowest, block, _FAR), 0)
            left = tl.where(block == here, float("inf"), left)
            k = here * _GROUP + near
            at = codes + tl.minimum(k, count - 1).to(tl.int64) * c_code
            total = tl.zeros((_GROUP,), real)
            x_at = z
            for _ in range(SIZE):
                x, e = tl.load(x_at).to(real), tl.load(at).to(real)
                x_at += z_dim
                at += c_dim
                if METRIC == "l2":
                    total += (x - e) * (x - e)
                else:
                    total -= x * e
            if METRIC == "cosine":
                total = total / tl.load(length + k).to(real)
            if not WIDE:
                total = tl.where(tl.abs(total) < _F32_MAX, total, _F32_MAX)
            total = tl.where(tl.load(offset + k) > _NONE, total, float("inf"))
            least = tl.min(total, 0)
            which = tl.min(tl.where(total == least, k, _FAR), 0)
            while (least < worst) | ((least == worst) & (which < worst_index) & (least < float("inf"))):
                out = tl.min(tl.where((best == worst) & (index == worst_index), place, K), 0)
                best = tl.where(place == out, least, best)
                index = tl.where(place == out, which, index)
                worst = tl.max(best, 0)
                worst_index = tl.max(tl.where(best == worst, index, -1), 0)
                total = tl.where(k == which, float("inf"), total)
                least = tl.min(total, 0)
                which = tl.min(tl.where(total == least, k, _FAR), 0)
            lowest = tl.min(left, 0)
            limit = worst.to(tl.float64)
            if METRIC == "l2":
                limit = (limit - squares) * 0.5 + (limit + squares) * slack

    before = (best[None, :] < best[:, None]) | (
        (best[None, :] == best[:, None])
        & ((index[None, :] < index[:, None]) | ((index[None, :] == index[:, None]) & (place[None, :] < place[:, None])))
    )
    rank = tl.sum(tl.where(before & (place < wanted)[None, :], 1, 0), 1)
    out = (row * groups + group) * wanted + rank
    tl.store(indices + out, tl.where(index == _FAR, -1, index).to(tl.int64), mask=place < wanted)
    if DISTANCES:
        value = best.to(tl.float64)
        if METRIC != "l2":
            value = -value
        if METRIC == "cosine":
            shortest = tl.full((K,), _SHORTEST, tl.float64)
            own = tl.sqrt(squares)
            value = value / tl.where(own > shortest, own, shortest)
        value = tl.where(squares < float("inf"), value, float("nan"))
        tl.store(distances + out, value.to(tl.float32), mask=place < wanted)


def nearest_code(
    z: Tensor, codebook: Tensor, *, metric: str, exact: bool, indices: Tensor, distances: Tensor | None,
    fill: int = FILL, most_bounds: int = MOST_BOUNDS, tiles: tuple[int, ...] | None = None, target: str | None = None,
) -> None:  # fmt: skip
    """See :func:`genfast.nearest_code`; z [B, S, G, D], codebook [G, K, D]. ``fill``, ``most_bounds``, ``tiles``
    (rows, codes, depth, warps, stages) and ``target`` are for tests."""
    batch, seq_len, groups, size = z.shape
    count, wanted = codebook.shape[1], indices.shape[-1]
    if not indices.numel():
        return
    same = z.dtype == codebook.dtype
    item_size = z.element_size() if same else 4
    target = target or target_of(z.device)
    rows, tile_codes, depth, warps, stages = tiles or tile_sizes(SCREEN, size, item_size, target)
    depth = max(min(depth, triton.next_power_of_2(size)), LEAST_BYTES // item_size)
    blocks = triton.cdiv(count, GROUP)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=z.device)

    offset, slope, floor = new(groups, blocks, GROUP), new(groups, blocks), new(groups, blocks)
    inverse = length = offset  # not read
    if metric == "cosine":
        inverse, length = new(*offset.shape), new(*offset.shape, dtype=torch.float64)
    strides = (*z.stride(), *codebook.stride())
    code_kernel[(blocks, groups)](
        codebook, *codebook.stride(), offset, inverse, length, slope, floor, count, blocks,
        METRIC=metric, CUT=0.0 if item_size == 2 else _TF32.value, SIZE=size, num_warps=2, **EXACT,
    )  # fmt: skip
    # Left to itself ptxas spills a few bytes around the division of cosines.
    registers = {"maxnreg": 64} if metric == "cosine" and target.startswith("sm_") else {}
    total = batch * seq_len
    turn = max(most_bounds // (blocks * groups), 1)
    bounds = new(groups, min(turn, total), blocks)
    code_tiles = triton.cdiv(blocks, tile_codes // GROUP)
    for first in range(0, total, turn):
        here = min(turn, total - first)
        row_tiles = triton.cdiv(here, rows)
        parts = min(triton.cdiv(fill, row_tiles * groups), code_tiles)
        part_tiles = triton.cdiv(code_tiles, parts)
        screen_kernel[(row_tiles, triton.cdiv(code_tiles, part_tiles), groups)](
            z, codebook, offset, inverse, slope, floor, bounds, *strides, first, here, seq_len, count, blocks,
            part_tiles, METRIC=metric, WIDEN=not same, SIZE=size, ROWS=rows, CODES=tile_codes, DEPTH=depth,
            num_warps=warps, num_stages=stages, **EXACT,
        )  # fmt: skip
        select_kernel[(here, groups)](
            z, codebook, offset, length, bounds, indices, indices if distances is None else distances, *strides,
            first, here, seq_len, groups, count, blocks, wanted,
            METRIC=metric, WIDE=exact, DISTANCES=distances is not None, SIZE=size,
            K=triton.next_power_of_2(wanted), BLOCKS=min(triton.next_power_of_2(blocks), MOST_BLOCKS),
            num_warps=2, **registers, **EXACT,
        )  # fmt: skip
