"""Lookup-free and binary spherical quantisation. ``genfast.reference.scalar_quantize`` is the specification.

The losses are those of a softmax over 2^block codes, whose p(code) is A[high bits] B[low bits], products of the bits'
own probabilities. ``bits_kernel`` writes these, [G][N][D][2 or 4]: q0 and q1, and for a least probability their
logarithms; of rows that do not count 0, so that nothing that follows asks for the mask. Then

* the mean probability is the matrix product of A and B over the rows: a tile of it per program and chunk of rows,
  in float64 over the tiles of rows;
* the entropy with a least probability, which is no sum over bits, and with g = dL/dp the gradient of the bits' logits,
  q0 sum_{codes with the bit} p g - q1 sum_{codes without} p g, are found for a tile of rows, which goes through the
  high halves, and inside through the low ones as a vector.

Factors are made again from their bits wherever they are needed: no memory has more than a few numbers per bit of z
and the means' chunks. Chunks depend on the shape only and are added in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.rounding import rounded
from genfast.kernels.scalar_tiles import EXACT, TILE, offset, place, programs_of
from genfast.layout import merged
from genfast.reference import scalar_quantize as spec

CHUNKS, CELLS = 64, 1 << 21
"""Chunks of rows that are summed apart, at the most, and numbers of all their sums together."""
ROWS = 32
"""Of a tile whose codes are enumerated."""
WIDE, NARROW = 64, 16
"""Codes of half a block that a program holds: of the means, and where a thread has a row."""
_SHORTEST = tl.constexpr(spec.SHORTEST)


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def _length(z, z_at, stride, inside, SIZE: tl.constexpr, NORMALISE: tl.constexpr, TILE: tl.constexpr):
    """Of rows; what they are divided by is at least _SHORTEST, and NaN stays."""
    squares = tl.zeros((TILE,), tl.float32)
    if NORMALISE:
        for d in range(SIZE):
            x = tl.load(z + z_at + d * stride, mask=inside, other=0.0).to(tl.float32)
            squares += x * x
    return tl.sqrt_rn(squares)


@triton.jit
def _unit(z, z_at, d, stride, inside, length, radius, NORMALISE: tl.constexpr):
    u = tl.load(z + z_at + d * stride, mask=inside, other=0.0).to(tl.float32)
    if NORMALISE:
        u = tl.div_rn(u, tl.where(length < _SHORTEST, _SHORTEST, length)) * radius
    return u


@triton.jit
def _counts(mask, mask_strides, batch, position, inside, MASKED: tl.constexpr):
    """Rows that count in the losses."""
    if MASKED:
        inside = tl.load(mask + batch * mask_strides[0] + position * mask_strides[1], mask=inside, other=0) != 0
    return inside


@triton.jit
def _log_one_plus(e):
    """2 atanh(s) with s = e / (2 + e) <= 1/3, of which nine terms are left of the series."""
    s = e / (2.0 + e)
    s2 = s * s
    p = tl.full(e.shape, 1.0 / 17, tl.float32)
    for k in tl.static_range(8):
        p = p * s2 + 1.0 / (15 - 2 * k)
    return 2.0 * s * p


@triton.jit
def _bit(logit):
    """(q0, q1, -log of the likelier one)"""
    size = tl.abs(logit)
    e = tl.exp(-size)
    likely = 1.0 / (1.0 + e)
    unlikely = e * likely
    up = logit > 0
    return tl.where(up, unlikely, likely), tl.where(up, likely, unlikely), _log_one_plus(e)


@triton.jit(do_not_specialize=["length"])
def code_kernel(
    z, z_strides, codes, codes_strides, indices, length, groups, radius, magnitude,
    SIZE: tl.constexpr, NORMALISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = place(length, groups, TILE)
    inside = at[1] < length
    z_at, codes_at = offset(at, z_strides), offset(at, codes_strides)
    norm = _length(z, z_at, z_strides[3], inside, SIZE, NORMALISE, TILE)
    index = tl.zeros((TILE,), tl.int64)
    bad = tl.zeros((TILE,), tl.int32)
    for d in range(SIZE):
        u = _unit(z, z_at, d, z_strides[3], inside, norm, radius, NORMALISE)
        odd = u != u
        index = index * 2 + (u > 0).to(tl.int64)
        bad = bad | odd.to(tl.int32)
        code = tl.where(odd, u, tl.where(u > 0, magnitude, -magnitude))
        tl.store(codes + codes_at + d * codes_strides[3], rounded(code, codes.dtype.element_ty), mask=inside)
    tl.store(indices + (at[0] * length + at[1]) * groups + at[2], tl.where(bad != 0, -1, index), mask=inside)


@triton.jit(do_not_specialize=["length", "all_rows"])
def bits_kernel(
    z, z_strides, mask, mask_strides, bits, sums, length, all_rows, groups, radius, magnitude, chain,
    SIZE: tl.constexpr, NORMALISE: tl.constexpr, MASKED: tl.constexpr, LOGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The bits' probabilities, and the tile's sums of bits' entropies and of squares (u - code)^2."""
    at = place(length, groups, TILE)
    inside = at[1] < length
    counts = _counts(mask, mask_strides, at[0], at[1], inside, MASKED)
    z_at = offset(at, z_strides)
    norm = _length(z, z_at, z_strides[3], inside, SIZE, NORMALISE, TILE)
    PARTS: tl.constexpr = 4 if LOGS else 2
    to = bits + (at[2] * all_rows + at[0] * length + at[1]) * (SIZE * PARTS)
    entropies = tl.zeros((TILE,), tl.float32)
    squares = tl.zeros((TILE,), tl.float32)
    for d in range(SIZE):
        u = _unit(z, z_at, d, z_strides[3], inside, norm, radius, NORMALISE)
        off = tl.where(u > 0, u - magnitude, u + magnitude)
        squares += tl.where(counts, off * off, 0.0)
        logit = u * chain
        q0, q1, log = _bit(logit)
        size = tl.abs(logit)
        # 0 times infinity is 0 here; NaN stays.
        unlikely = tl.where(logit > 0, q0, q1)
        entropies += tl.where(counts, log + tl.where(unlikely == 0, 0.0, unlikely * size), 0.0)
        tl.store(to + d * PARTS, tl.where(counts, q0, 0.0), mask=inside)
        tl.store(to + d * PARTS + 1, tl.where(counts, q1, 0.0), mask=inside)
        if LOGS:
            up = logit > 0
            tl.store(to + d * PARTS + 2, tl.where(counts, -log - tl.where(up, size, 0.0), 0.0), mask=inside)
            tl.store(to + d * PARTS + 3, tl.where(counts, -log - tl.where(up, 0.0, size), 0.0), mask=inside)
    t = tl.program_id(0)
    tl.store(sums + 2 * t, tl.sum(entropies, 0))
    tl.store(sums + 2 * t + 1, tl.sum(squares, 0))


@triton.jit
def _gradient(
    u, passed, logits, inside, counts, by_entropy, by_square, magnitude, chain,
    PASSED: tl.constexpr, LOSSES: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Of one number of u: what is passed, that of the commitment, that of the logit."""
    found = tl.zeros(u.shape, tl.float32)
    if PASSED:
        found = tl.load(passed, mask=inside, other=0.0).to(tl.float32)
    if LOSSES:
        more = tl.where(u > 0, u - magnitude, u + magnitude) * by_square
        if BITS:
            logit = u * chain
            q0, q1, _ = _bit(logit)
            both = q0 * q1
            more -= tl.where(both == 0, 0.0, logit * both * (by_entropy * chain))
        if CODES:
            more += chain * tl.load(logits, mask=inside, other=0.0)
        found += tl.where(counts, more, 0.0)
    return found


@triton.jit(do_not_specialize=["length", "all_rows"])
def row_gradient_kernel(
    grad, grad_strides, z, z_strides, mask, mask_strides, grad_logits, scales, grad_z, out_strides, length, all_rows,
    groups, radius, magnitude, chain,
    SIZE: tl.constexpr, NORMALISE: tl.constexpr, MASKED: tl.constexpr, PASSED: tl.constexpr, LOSSES: tl.constexpr,
    BITS: tl.constexpr, CODES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of z. BITS: each logit has an entropy of its own; CODES: ``grad_logits`` has what codes give."""
    at = place(length, groups, TILE)
    inside = at[1] < length
    counts = _counts(mask, mask_strides, at[0], at[1], inside, MASKED)
    z_at, passed, out_at = offset(at, z_strides), grad + offset(at, grad_strides), offset(at, out_strides)
    norm = _length(z, z_at, z_strides[3], inside, SIZE, NORMALISE, TILE)
    logits = grad_logits + (at[2] * all_rows + at[0] * length + at[1]) * SIZE
    by_entropy = 0.0
    by_square = 0.0
    if LOSSES:
        by_entropy = tl.load(scales + 1)
        by_square = tl.load(scales + 2)
    along = tl.zeros((TILE,), tl.float32)
    scale = tl.full((TILE,), 1.0, tl.float32)
    if NORMALISE:  # (grad - n (n . grad)) radius / length, with n = u / radius
        for d in range(SIZE):
            u = _unit(z, z_at, d, z_strides[3], inside, norm, radius, NORMALISE)
            along += u * _gradient(
                u, passed + d * grad_strides[3], logits + d, inside, counts, by_entropy, by_square, magnitude,
                chain, PASSED, LOSSES, BITS, CODES,
            )  # fmt: skip
        along = tl.where(norm < _SHORTEST, 0.0, along / (radius * radius))
        scale = radius / tl.where(norm < _SHORTEST, _SHORTEST, norm)
    for d in range(SIZE):
        u = _unit(z, z_at, d, z_strides[3], inside, norm, radius, NORMALISE)
        found = _gradient(
            u, passed + d * grad_strides[3], logits + d, inside, counts, by_entropy, by_square, magnitude, chain,
            PASSED, LOSSES, BITS, CODES,
        )  # fmt: skip
        if NORMALISE:
            found = (found - u * along) * scale
        tl.store(grad_z + out_at + d * out_strides[3], rounded(found, grad_z.dtype.element_ty), mask=inside)


# --- codes -----------------------------------------------------------------------------------------------------------


@triton.jit
def _bit_of(code, d, COUNT: tl.constexpr):
    """Whether codes have bit d of COUNT, the first being the highest."""
    return ((code >> (COUNT - 1 - d)) & 1) != 0


@triton.jit
def _factors(at, inside, code, COUNT: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    """[codes, ROWS]: the products over COUNT bits, or the sums of their logarithms."""
    out = tl.full((code.shape[0], ROWS), 0.0 if LOG else 1.0, tl.float32)
    for d in tl.static_range(COUNT):
        zero = tl.load(at + (d * PARTS + 2 * LOG), mask=inside, other=0.0)
        one = tl.load(at + (d * PARTS + 2 * LOG + 1), mask=inside, other=0.0)
        factor = tl.where(_bit_of(code, d, COUNT)[:, None], one[None, :], zero[None, :])
        out = out + factor if LOG else out * factor
    return out


@triton.jit
def _factor(at, inside, code, COUNT: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] of one code."""
    out = tl.full((ROWS,), 0.0 if LOG else 1.0, tl.float32)
    for d in tl.static_range(COUNT):
        bit = (code >> (COUNT - 1 - d)) & 1
        factor = tl.load(at + bit + (d * PARTS + 2 * LOG), mask=inside, other=0.0)
        out = out + factor if LOG else out * factor
    return out


@triton.jit(do_not_specialize=["all_rows", "tiles_per_chunk"])
def mean_kernel(
    bits, partial, all_rows, groups, tiles_per_chunk,
    SIZE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, HIGH_TILE: tl.constexpr, LOW_TILE: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partial [chunks, G, D / block, 2^block]: the sums of a chunk's probabilities."""
    BLOCKS: tl.constexpr = SIZE // (HIGH + LOW)
    ACROSS: tl.constexpr = ((1 << LOW) + LOW_TILE - 1) // LOW_TILE
    DOWN: tl.constexpr = ((1 << HIGH) + HIGH_TILE - 1) // HIGH_TILE
    t, chunk = tl.program_id(0), tl.program_id(1)
    low = t % ACROSS * LOW_TILE + tl.arange(0, LOW_TILE)
    high = t // ACROSS % DOWN * HIGH_TILE + tl.arange(0, HIGH_TILE)
    which = t // (ACROSS * DOWN)  # group and block
    start = bits + PARTS * ((which // BLOCKS).to(tl.int64) * all_rows * SIZE + which % BLOCKS * (HIGH + LOW))
    total = tl.zeros((HIGH_TILE, LOW_TILE), tl.float64)
    first = chunk.to(tl.int64) * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, tl.cdiv(all_rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < all_rows
        a = _factors(start + row * (SIZE * PARTS), inside, high, HIGH, PARTS, False, ROWS)
        b = _factors(start + row * (SIZE * PARTS) + HIGH * PARTS, inside, low, LOW, PARTS, False, ROWS)
        total += tl.dot(a, tl.trans(b), input_precision="ieee").to(tl.float64)
    blocks = groups * BLOCKS
    to = partial + ((chunk.to(tl.int64) * blocks + which) << (HIGH + LOW))
    within = (high < (1 << HIGH))[:, None] & (low < (1 << LOW))[None, :]
    tl.store(to + (high[:, None] << LOW) + low[None, :], total, mask=within)


@triton.jit(do_not_specialize=["all_rows", "highs", "lows"])
def code_entropy_kernel(
    bits, sums, all_rows, groups, lowest, highs, lows,
    SIZE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, LOW_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """- sum p max(log p, lowest) of a tile of rows."""
    BLOCKS: tl.constexpr = SIZE // (HIGH + LOW)
    which = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < all_rows
    high_at = bits + 4 * (((which // BLOCKS).to(tl.int64) * all_rows + row) * SIZE + which % BLOCKS * (HIGH + LOW))
    low_at = high_at + 4 * HIGH
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, lows, LOW_TILE):
        low = first + tl.arange(0, LOW_TILE)
        b = _factors(low_at, inside, low, LOW, 4, False, ROWS)
        b = tl.where((low < lows)[:, None], b, 0.0)
        log_b = _factors(low_at, inside, low, LOW, 4, True, ROWS)
        for high in range(highs):
            a = _factor(high_at, inside, high, HIGH, 4, False, ROWS)
            log_a = _factor(high_at, inside, high, HIGH, 4, True, ROWS)
            total += a * tl.sum(b * tl.maximum(log_a[None, :] + log_b, lowest), 0)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + which, -tl.sum(total, 0))


@triton.jit(do_not_specialize=["all_rows", "highs", "lows"])
def code_gradient_kernel(
    bits, grad_mean, scales, grad_logits, all_rows, groups, lowest, highs, lows,
    SIZE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr, ENTROPY: tl.constexpr,
    BITS: tl.constexpr, LOW_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits [G][N][D] of a tile of rows, from those of mean and entropy; BITS holds a block's."""
    BLOCK: tl.constexpr = HIGH + LOW
    BLOCKS: tl.constexpr = SIZE // BLOCK
    which = tl.program_id(1)
    PARTS: tl.constexpr = 4 if ENTROPY else 2
    first_row, row = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    inside = row < all_rows - first_row
    start = ((which // BLOCKS).to(tl.int64) * all_rows + first_row) * SIZE + which % BLOCKS * BLOCK
    bits += start * PARTS
    high_at = bits + row * (SIZE * PARTS)
    low_at = high_at + HIGH * PARTS
    by_mean, by_entropy = tl.load(scales), tl.load(scales + 1)
    bit = tl.arange(0, BITS)
    zero = tl.zeros((BITS, ROWS), tl.float32)
    one = tl.zeros((BITS, ROWS), tl.float32)
    for first in range(0, lows, LOW_TILE):
        low = first + tl.arange(0, LOW_TILE)
        known = low < lows
        b = _factors(low_at, inside, low, LOW, PARTS, False, ROWS)
        b = tl.where(known[:, None], b, 0.0)
        along = tl.zeros((LOW_TILE, ROWS), tl.float32)
        if ENTROPY:
            log_b = _factors(low_at, inside, low, LOW, PARTS, True, ROWS)
        for high in range(highs):
            a = _factor(high_at, inside, high, HIGH, PARTS, False, ROWS)
            g = tl.zeros((LOW_TILE, ROWS), tl.float32)
            if MEAN:
                cell = grad_mean + (which.to(tl.int64) << BLOCK) + (high << LOW) + low
                g += (tl.load(cell, mask=known, other=0.0) * by_mean)[:, None]
            if ENTROPY:
                log = _factor(high_at, inside, high, HIGH, PARTS, True, ROWS)[None, :] + log_b
                g -= by_entropy * (tl.maximum(log, lowest) + tl.where(log >= lowest, 1.0, 0.0))
            along += a[None, :] * g
            share = (a * tl.sum(b * g, 0))[None, :]
            has = _bit_of(high, tl.minimum(bit, HIGH - 1), HIGH)
            one += tl.where((has & (bit < HIGH))[:, None], share, 0.0)
            zero += tl.where((~has & (bit < HIGH))[:, None], share, 0.0)
        along *= b
        for d in tl.static_range(LOW):
            has = _bit_of(low, d, LOW)[:, None]
            here = (bit == HIGH + d)[:, None]
            one += tl.where(here, tl.sum(tl.where(has, along, 0.0), 0)[None, :], 0.0)
            zero += tl.where(here, tl.sum(tl.where(has, 0.0, along), 0)[None, :], 0.0)
    at = row[None, :] * SIZE + bit[:, None]
    within = inside[None, :] & (bit < BLOCK)[:, None]
    q0 = tl.load(bits + at * PARTS, mask=within, other=0.0)
    q1 = tl.load(bits + at * PARTS + 1, mask=within, other=0.0)
    tl.store(grad_logits + start + at, q0 * one - q1 * zero, mask=within)


# --- launches --------------------------------------------------------------------------------------------------------


def _halves(block: int) -> tuple[int, int]:
    """How many codes they have. Arguments and no constants: the compiler would unroll the loops over them."""
    return 1 << block // 2, 1 << (block + 1) // 2


def _tiles(block: int) -> tuple[dict, dict]:
    """(options of ``mean_kernel``, of the kernels that go through all codes of some rows)

    In the latter a thread has a row, and nothing is exchanged; beyond 16 bits registers suffice for a quarter of one.
    """
    halves = EXACT | dict(HIGH=block // 2, LOW=(block + 1) // 2, ROWS=ROWS)
    high, low = (min(WIDE, max(16, codes)) for codes in _halves(block))
    for_mean = halves | dict(HIGH_TILE=high, LOW_TILE=low, num_warps=8)
    return for_mean, halves | dict(LOW_TILE=NARROW, num_warps=1 if block <= 16 else 4)


def _bits(z: Tensor, mask, radius, magnitude, sharpness, logs: bool) -> tuple[Tensor, Tensor]:
    """What ``bits_kernel`` writes: probabilities, and a tile's sums [tiles, 2]."""
    batch, length, groups, size = z.shape
    bits = z.new_empty((groups, batch * length, size, 4 if logs else 2), dtype=torch.float32)
    sums = z.new_empty((programs_of(z), 2), dtype=torch.float32)
    if len(sums):
        bits_kernel[(len(sums),)](
            z, z.stride(), *_mask_arguments(z, mask), bits, sums, length, batch * length, groups, radius or 0.0,
            magnitude, 4 * sharpness * magnitude, SIZE=size, NORMALISE=radius is not None, MASKED=mask is not None,
            LOGS=logs, TILE=TILE, **EXACT,
        )  # fmt: skip
    return bits, sums


def _mask_arguments(z: Tensor, mask: Tensor | None) -> tuple:
    """Bytes; an unused pointer needs something to point at."""
    return (z, (0, 0)) if mask is None else (mask.view(torch.int8), mask.stride())


def _counted(z: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((), z.shape[0] * z.shape[1], dtype=torch.float64, device=z.device)
    return mask.sum(dtype=torch.float64)


def binary_quantize(
    z, *, radius, magnitude, sharpness, block, least, mask, quantized, indices, entropies, mean, commitment
) -> None:
    """See :func:`genfast.reference.scalar_quantize.binary_quantize`."""
    z, mask, quantized = merged(z, mask, quantized)
    batch, length, groups, size = z.shape
    if indices.numel():
        code_kernel[(programs_of(z),)](
            z, z.stride(), quantized, quantized.stride(), indices, length, groups, radius or 0.0, magnitude, SIZE=size,
            NORMALISE=radius is not None, TILE=TILE, **EXACT,
        )  # fmt: skip
    if entropies is None:
        return
    rows, blocks = batch * length, size // block
    bits, sums = _bits(z, mask, radius, magnitude, sharpness, least > 0)
    for_mean, for_rows = _tiles(block)
    tiles = triton.cdiv(rows, ROWS)
    chunks = max(1, min(CHUNKS, CELLS // mean.numel(), tiles))
    partial = z.new_zeros((chunks, *mean.shape), dtype=torch.float64)
    total = sums.sum(0, dtype=torch.float64)
    if rows:
        tiled = zip(_halves(block), (for_mean["HIGH_TILE"], for_mean["LOW_TILE"]))
        down, across = (triton.cdiv(codes, tile) for codes, tile in tiled)
        mean_kernel[(down * across * groups * blocks, chunks)](
            bits, partial, rows, groups, triton.cdiv(tiles, chunks), SIZE=size, PARTS=bits.shape[3], **for_mean,
        )  # fmt: skip
    found = total[0]
    if least:
        sums = z.new_zeros((tiles, groups * blocks), dtype=torch.float32)
        if rows:
            code_entropy_kernel[(tiles, groups * blocks)](
                bits, sums, rows, groups, math.log(least), *_halves(block), SIZE=size, **for_rows
            )
        found = sums.sum(dtype=torch.float64)
    count = _counted(z, mask)
    entropies.copy_(found / (count * groups))
    mean.copy_(partial.sum(0) / count)
    commitment.copy_(total[1] / (count * groups * size))


def binary_backward(
    grad, grad_entropies, grad_mean, grad_commitment, z, *,
    radius, magnitude, sharpness, block, least, mask, grad_z,
) -> None:  # fmt: skip
    """See :func:`genfast.reference.scalar_quantize.binary_backward`."""
    z, mask, grad, grad_z = merged(z, mask, grad, grad_z)
    batch, length, groups, size = z.shape
    rows, losses = batch * length, grad_entropies is not None
    if not z.numel():
        return
    scales = logits = z
    if losses:
        count = _counted(z, mask)
        scales = torch.stack(
            [1 / count, grad_entropies / (count * groups), 2 * grad_commitment / (count * groups * size)]
        ).float()
    if block is not None:
        bits, _ = _bits(z, mask, radius, magnitude, sharpness, least > 0)
        logits = bits.new_empty(bits.shape[:-1])
        code_gradient_kernel[(triton.cdiv(rows, ROWS), groups * (size // block))](
            bits, z if grad_mean is None else grad_mean.contiguous(), scales, logits, rows, groups,
            math.log(least) if least else 0.0, *_halves(block), SIZE=size, MEAN=grad_mean is not None,
            ENTROPY=least > 0, BITS=max(4, triton.next_power_of_2(block)), **_tiles(block)[1],
        )  # fmt: skip
    passed = z if grad is None else grad
    row_gradient_kernel[(programs_of(z),)](
        passed, passed.stride(), z, z.stride(), *_mask_arguments(z, mask), logits, scales, grad_z, grad_z.stride(),
        length, rows, groups, radius or 0.0, magnitude, 4 * sharpness * magnitude, SIZE=size,
        NORMALISE=radius is not None, MASKED=mask is not None, PASSED=grad is not None, LOSSES=losses,
        BITS=not least, CODES=block is not None, TILE=TILE, **EXACT,
    )  # fmt: skip
