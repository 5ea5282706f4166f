"""Quantising, its gradients and moving averages of codes, in Triton: ``genfast.reference.code_update``.

A program of the two passes over z has a tile of vectors, of one group and batch entry, whole. Nothing is added by
floating-point atomics: a program leaves its share of the loss in a place of its own, and the vectors of a code are
added after a sort by code, in pieces of 64 vectors so that a code that has them all keeps no program waiting, then
piece by piece in their order. What is only of the size of the codebook's columns (cluster sizes, dead codes, their
slots) are a few operations of PyTorch; none makes the host wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.rounding import rounded
from genfast.reference import code_update as spec
from genfast.reference.code_update import assigned_slots, flat, slot_positions

TILE = 2048
"""Numbers that a program holds of each tensor: vectors of a power of two, as many as fit, at most 64."""
PIECE = 64
"""Vectors that one program adds."""
EXACT = dict(enable_fp_fusion=False)
_SHORTEST = tl.constexpr(spec.SHORTEST)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile_of(size: int) -> dict:
    width = _power_of_two(size)
    return dict(WIDTH=width, ROWS=max(1, min(64, TILE // width)))


def _warps(tile: dict) -> int:
    return max(4, min(8, tile["WIDTH"] * tile["ROWS"] // 256))


@triton.jit
def _place(length, groups, ROWS: tl.constexpr):
    """(batch entry, group, positions [ROWS]) of a program's vectors."""
    blocks = tl.cdiv(length, ROWS)
    t = tl.program_id(0)  # divided in 32 bits: there are no more programs, and 64 would be a call
    block = t // groups
    position = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (block // blocks).to(tl.int64), (t % groups).to(tl.int64), position


@triton.jit
def _at(batch, group, position, d, batch_stride, position_stride, group_stride, entry_stride):
    first = batch * batch_stride + group * group_stride
    return first + position[:, None] * position_stride + d[None, :].to(tl.int64) * entry_stride


@triton.jit(do_not_specialize=["length"])
def quantize_kernel(
    z, z_batch, z_position, z_group, z_entry, z_q, q_batch, q_position, q_group, q_entry, codebook, indices, counts,
    errors, found, length, groups, codes, size,
    ZEROS: tl.constexpr, USAGE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, group, position = _place(length, groups, ROWS)
    d = tl.arange(0, WIDTH)
    inside = position < length
    k = tl.load(indices + (batch * length + position) * groups + group, mask=inside, other=-1)
    there = (k >= 0) & (k < codes)
    mask = inside[:, None] & (d < size)[None, :]
    x = tl.load(z + _at(batch, group, position, d, z_batch, z_position, z_group, z_entry), mask=mask, other=0.0)
    code = group * codes + tl.where(there, k, 0)
    e = tl.load(codebook + code[:, None] * size + d[None, :], mask=mask & there[:, None], other=0.0)
    e = rounded(e.to(tl.float32), x.dtype)
    difference = tl.where(there[:, None], x.to(tl.float32) - e.to(tl.float32), 0.0)
    t = tl.program_id(0)
    tl.store(errors + t, tl.sum(tl.sum(difference * difference, 1), 0))
    tl.store(found + t, tl.sum(there.to(tl.int32), 0))
    if USAGE:
        tl.atomic_add(counts + code, tl.full((ROWS,), 1, tl.int64), mask=there, sem="relaxed")
    if not ZEROS:
        e = tl.where(there[:, None], e, x)
    tl.store(z_q + _at(batch, group, position, d, q_batch, q_position, q_group, q_entry), e, mask=mask)


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    g, g_batch, g_position, g_group, g_entry, grad_losses, z, z_batch, z_position, z_group, z_entry,
    z_q, q_batch, q_position, q_group, q_entry, indices, valid, grad_z, o_batch, o_position, o_group, o_entry, to_codes,
    length, groups, codes, size,
    GRADIENT: tl.constexpr, ZEROS: tl.constexpr, PASSED: tl.constexpr, LOSSES: tl.constexpr, TO_Z: tl.constexpr,
    TO_CODES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, group, position = _place(length, groups, ROWS)
    d = tl.arange(0, WIDTH)
    inside = position < length
    row = (batch * length + position) * groups + group
    k = tl.load(indices + row, mask=inside, other=-1)
    there = ((k >= 0) & (k < codes))[:, None]
    mask = inside[:, None] & (d < size)[None, :]
    x = tl.load(z + _at(batch, group, position, d, z_batch, z_position, z_group, z_entry), mask=mask, other=0.0)
    x = x.to(tl.float32)
    e = tl.load(z_q + _at(batch, group, position, d, q_batch, q_position, q_group, q_entry), mask=mask, other=0.0)
    e = e.to(tl.float32)
    passed = tl.zeros((ROWS, WIDTH), tl.float32)
    if PASSED:
        passed = tl.load(
            g + _at(batch, group, position, d, g_batch, g_position, g_group, g_entry), mask=mask, other=0.0
        )
        passed = passed.to(tl.float32)
    alone = passed
    if ZEROS:
        alone = tl.zeros((ROWS, WIDTH), tl.float32)
    to_z = tl.zeros((ROWS, WIDTH), tl.float32)
    to_e = to_z
    if LOSSES:
        numbers = tl.maximum(tl.load(valid) * size, 1).to(tl.float32)
        unit = 2.0 * (x - e) / numbers
        to_z = tl.load(grad_losses) * unit
        to_e = -tl.load(grad_losses + 1) * unit
    if TO_CODES:
        if GRADIENT == "none":
            to_e += passed
        tl.store(to_codes + row[:, None] * size + d[None, :], to_e, mask=mask & there)
    if TO_Z:
        if GRADIENT == "rotation":
            length_z = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), _SHORTEST)[:, None]
            reach = tl.sqrt_rn(tl.sum(e * e, 1))[:, None]
            u = x / length_z
            q = e / tl.maximum(reach, _SHORTEST)
            w = u + q
            w = w / tl.maximum(tl.sqrt_rn(tl.sum(w * w, 1)), _SHORTEST)[:, None]
            turned = passed - 2.0 * tl.sum(passed * w, 1)[:, None] * w + 2.0 * tl.sum(passed * q, 1)[:, None] * u
            passed = turned * (reach / length_z)
        if GRADIENT == "none":
            passed = tl.zeros((ROWS, WIDTH), tl.float32)
        result = tl.where(there, passed + to_z, alone)
        out = grad_z + _at(batch, group, position, d, o_batch, o_position, o_group, o_entry)
        tl.store(out, rounded(result, grad_z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "pieces", "last_code"])
def piece_kernel(
    z, z_batch, z_position, z_group, z_entry, divisors, order, starts, piece_starts, code_of_piece, partial,
    length, groups, last_code, size, DIVIDE: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The float64 sum of one piece of a code's vectors."""
    p = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    c = tl.load(code_of_piece + p)
    if c <= last_code:
        first = tl.load(starts + c) + (p - tl.load(piece_starts + c)) * PIECE
        last = tl.minimum(first + PIECE, tl.load(starts + c + 1))
        total = tl.zeros((WIDTH,), tl.float64)
        for i in range(first, last):
            row = tl.load(order + i)
            group = row % groups
            n = row // groups
            at = n // length * z_batch + n % length * z_position + group * z_group + d.to(tl.int64) * z_entry
            x = tl.load(z + at, mask=d < size, other=0.0).to(tl.float32)
            if DIVIDE:
                x = x / tl.load(divisors + row)
            total += x.to(tl.float64)
        tl.store(partial + p * size + d, total, mask=d < size)


@triton.jit
def sum_kernel(
    partial, starts, piece_starts, sums, out_stride, size,
    COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum of one code's pieces; with COUNT the number of its vectors behind it."""
    c = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for p in range(tl.load(piece_starts + c), tl.load(piece_starts + c + 1)):
        total += tl.load(partial + p * size + d, mask=d < size, other=0.0)
    out = sums + c * out_stride
    tl.store(out + d, rounded(total.to(tl.float32), sums.dtype.element_ty), mask=d < size)
    if COUNT:
        tl.store(out + size, (tl.load(starts + c + 1) - tl.load(starts + c)).to(tl.float32))


@triton.jit
def average_kernel(
    codebook, embed_avg, smooth, sums, slots, slot, weight, rest, reset, size,
    LOW: tl.constexpr, COSINE: tl.constexpr, REVIVE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of the codebook and of its average; ``slot`` is the row of slots that revives it, or -1."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    mask = d < size
    at = row * size + d
    average = tl.load(embed_avg + at, mask=mask, other=0.0)
    code = tl.load(codebook + at, mask=mask, other=0.0)
    sum = tl.load(sums + row * (size + 1) + d, mask=mask, other=0.0)
    difference = sum - average
    if LOW:
        average = average + weight * difference
    else:
        average = sum - difference * rest
    divisor = tl.load(smooth + row)
    written = average / divisor
    if COSINE:
        written = written / tl.maximum(tl.sqrt_rn(tl.sum(written * written, 0)), _SHORTEST)
    code = tl.where(divisor > 0, written, code)
    if REVIVE:
        from_slot = tl.load(slot + row)
        if from_slot >= 0:
            code = tl.load(slots + from_slot * (size + 1) + d, mask=mask, other=0.0)
            average = code * reset
    tl.store(embed_avg + at, average, mask=mask)
    tl.store(codebook + at, code, mask=mask)


@triton.jit(do_not_specialize=["count"])
def distance_kernel(z, centre, distance, count, size, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (d < size)[None, :]
    x = tl.load(z + row[:, None] * size + d[None, :], mask=mask, other=0.0)
    difference = tl.where(mask, x - tl.load(centre + d, mask=d < size, other=0.0)[None, :], 0.0)
    found = tl.sum(difference * difference, 1)
    before = tl.load(distance + row, mask=row < count, other=0.0)
    tl.store(distance + row, tl.minimum(before, found), mask=row < count)


# --- launches --------------------------------------------------------------------------------------------------------


def _programs(z: Tensor, tile: dict) -> int:
    batch, length, groups, _ = z.shape
    return batch * -(-length // tile["ROWS"]) * groups


def quantize(z, codebook, indices, *, zeros, z_q, losses, valid, counts, perplexity) -> None:
    """See :func:`genfast.reference.code_update.quantize`."""
    groups, codes, size = codebook.shape
    tile = _tile_of(size)
    programs = _programs(z, tile)
    errors = z.new_empty(programs, dtype=torch.float32)
    found = z.new_empty(programs, dtype=torch.int32)
    if counts is not None:
        counts.zero_()
    if programs:
        quantize_kernel[(programs,)](
            z, *z.stride(), z_q, *z_q.stride(), codebook.contiguous(), indices.contiguous(),
            indices if counts is None else counts, errors, found, z.shape[1], groups, codes, size,
            ZEROS=zeros, USAGE=counts is not None, **tile, num_warps=_warps(tile), **EXACT,
        )  # fmt: skip
    torch.sum(found, 0, dtype=torch.int64, out=valid)
    losses.copy_((errors.sum(dtype=torch.float64) / (valid * size).clamp_min(1)).expand(2))
    if counts is not None:
        share = counts / counts.sum(1, keepdim=True).clamp_min(1).double()
        perplexity.copy_(torch.special.entr(share).sum(1).exp())


def quantize_backward(
    grad_z_q, grad_losses, z, z_q, indices, valid, *, gradient, zeros, codes, grad_z, grad_codebook
) -> None:
    """See :func:`genfast.reference.code_update.quantize_backward`."""
    _, _, groups, size = z.shape
    tile = _tile_of(size)
    programs = _programs(z, tile)
    indices = indices.contiguous()
    to_codes = None if grad_codebook is None else z.new_empty(z.shape, dtype=torch.float32)
    if programs:
        # Unused pointers need something to point at.
        g, out, sent = (z if t is None else t for t in (grad_z_q, grad_z, to_codes))
        backward_kernel[(programs,)](
            g, *g.stride(), z if grad_losses is None else grad_losses.contiguous(), z, *z.stride(), z_q, *z_q.stride(),
            indices, valid, out, *out.stride(), sent, z.shape[1], groups, codes, size,
            GRADIENT=gradient, ZEROS=zeros, PASSED=grad_z_q is not None, LOSSES=grad_losses is not None,
            TO_Z=grad_z is not None, TO_CODES=to_codes is not None, **tile, num_warps=_warps(tile), **EXACT,
        )  # fmt: skip
    if to_codes is not None:
        _sum_by_code(to_codes, indices, codes, None, grad_codebook, count=False)


def _sum_by_code(z: Tensor, indices: Tensor, codes: int, divisors: Tensor | None, out: Tensor, count: bool) -> None:
    """out [G, K, D] or, with ``count``, [G, K, D + 1]: the sum of each code's vectors."""
    _, length, groups, size = z.shape
    every = groups * codes
    keys = flat(indices, codes).flatten()
    keys, order = keys.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(every + 1, device=z.device))
    piece_ends = ((starts[1:] - starts[:-1] + (PIECE - 1)) // PIECE).cumsum(0)
    piece_starts = torch.cat([piece_ends.new_zeros(1), piece_ends])
    # No host knows how many pieces there are: at most one per code that is not full, and one per 64 vectors.
    pieces = len(keys) // PIECE + min(every, len(keys))
    partial = z.new_empty((max(pieces, 1), size), dtype=torch.float64)
    width = _power_of_two(size)
    warps = max(1, min(8, width // 128))
    if pieces:
        code_of_piece = torch.searchsorted(piece_ends, torch.arange(pieces, device=z.device), right=True)
        piece_kernel[(pieces,)](
            z, *z.stride(), z if divisors is None else divisors, order, starts, piece_starts, code_of_piece, partial,
            length, groups, every - 1, size, DIVIDE=divisors is not None, WIDTH=width, PIECE=PIECE, num_warps=warps,
            **EXACT,
        )  # fmt: skip
    sum_kernel[(every,)](
        partial, starts, piece_starts, out, size + count, size, COUNT=count, WIDTH=width, num_warps=warps, **EXACT
    )


def code_sums(z, indices, *, cosine, sums, slots, seed, stream, offset, world, rank) -> None:
    """See :func:`genfast.reference.code_update.code_sums`."""
    groups, codes, _ = sums.shape
    divisors = None
    if cosine:
        divisors = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32).clamp_min(spec.SHORTEST).contiguous()
    _sum_by_code(z, indices, codes, divisors, sums, count=True)
    if slots is None:
        return
    position, mine = slot_positions(indices, codes, groups, seed, stream, offset, world, rank)
    slots[..., -1] = mine
    if not z.numel():
        slots[..., :-1] = 0
        return
    b, s = position // z.shape[1], position % z.shape[1]
    group = torch.arange(groups, device=z.device)[:, None]
    rows = z[b, s, group].float()
    if cosine:
        rows = rows / divisors[b, s, group][..., None]
    slots[..., :-1] = torch.where(mine[..., None], rows, 0)


def ema_update(
    codebook, cluster_size, embed_avg, z, indices, *, decay, eps, cosine, threshold, reset, seed, stream, offset
) -> None:
    """See :func:`genfast.reference.code_update.ema_update`."""
    shape = (*codebook.shape[:2], codebook.shape[2] + 1)
    sums = codebook.new_empty(shape)
    slots = codebook.new_empty(shape) if threshold > 0 else None
    code_sums(
        z, indices, cosine=cosine, sums=sums, slots=slots, seed=seed, stream=stream, offset=offset, world=1, rank=0
    )
    ema_apply(
        codebook, cluster_size, embed_avg, sums, slots, decay=decay, eps=eps, cosine=cosine, threshold=threshold,
        reset=reset,
    )  # fmt: skip


def ema_apply(codebook, cluster_size, embed_avg, sums, slots, *, decay, eps, cosine, threshold, reset) -> None:
    """See :func:`genfast.reference.code_update.ema_apply`."""
    groups, codes, size = codebook.shape
    cluster_size.lerp_(sums[..., size], 1 - decay)
    total = cluster_size.sum(1, keepdim=True)
    smooth = (cluster_size + eps) / (total + codes * eps) * total
    slot = None
    if slots is not None:
        slot, revived = assigned_slots(cluster_size < threshold, slots[..., size] > 0)
        first = torch.arange(groups, device=slot.device)[:, None] * codes
        slot = torch.where(revived, slot + first, -1)
        cluster_size.masked_fill_(revived, reset)
    width = _power_of_two(size)
    weight = 1 - decay
    average_kernel[(groups * codes,)](
        codebook, embed_avg, smooth, sums, sums if slots is None else slots, smooth if slot is None else slot,
        weight, 1 - weight, reset, size,
        LOW=weight < 0.5, COSINE=cosine, REVIVE=slot is not None, WIDTH=width,
        num_warps=max(1, min(8, width // 128)), **EXACT,
    )  # fmt: skip


def min_distance_update(z, centre, distance) -> None:
    """See :func:`genfast.reference.code_update.min_distance_update`."""
    tile = _tile_of(z.shape[1])
    distance_kernel[(-(-len(z) // tile["ROWS"]),)](
        z, centre, distance, *z.shape, **tile, num_warps=_warps(tile), **EXACT
    )
