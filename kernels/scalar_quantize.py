"""Finite scalar quantisation. ``genfast.reference.scalar_quantize`` is the specification, for levels to the bit.

A program has a tile of rows and takes their numbers one dimension after the other: with channels first these are
neighbours in memory, with channels last the lines that the first dimension has brought serve the others. A number's
level is the count of the steps at or below it, which are in the cache for all programs.

LFQ and BSQ have no Triton kernels: CUDA tensors run their reference.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.reference import scalar_quantize as reference

TILE = 256
EXACT = {"num_warps": 4, "enable_fp_fusion": False}


@functools.lru_cache(64)
def tables(levels: tuple[int, ...], symmetric: bool, clamp: bool, device) -> tuple[Tensor, Tensor, Tensor]:
    """float32 steps of all dimensions; int64 [D] of levels; float32 [D, 2] of shift and slope."""
    steps = [step for count in levels for step in reference.steps(count, symmetric, clamp)]
    shapes = []
    for count in levels:
        shift, height, _ = reference.shape_of(count, symmetric, clamp)
        shapes.append((shift, height * reference.slope_unit(count, symmetric)))
    made = (torch.tensor(steps), torch.tensor(levels), torch.tensor(shapes))
    return tuple(t.to(device) for t in made)


@triton.jit
def _place(row, rows, groups):
    """(batch, row of the batch, group) of a row of all."""
    group = row % groups
    line = row // groups
    return line // rows, line % rows, group


@triton.jit
def _offset(place, strides):
    return place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]


@triton.jit
def _level(z, steps, count):
    k = tl.zeros_like(z).to(tl.int32)
    for j in range(0, count - 1):
        k += (z >= tl.load(steps + j)).to(tl.int32)
    return k


@triton.jit
def _code(k, count, SYMMETRIC: tl.constexpr):
    """div_rn: the division that rounds as everywhere else."""
    if SYMMETRIC:
        two = tl.full(k.shape, 2.0, tl.float32)
        code = k.to(tl.float32) * tl.div_rn(two, (count - 1 + tl.zeros_like(k)).to(tl.float32)) - 1.0
    else:
        half = (count // 2 + tl.zeros_like(k)).to(tl.int32)
        code = tl.div_rn((k - half).to(tl.float32), half.to(tl.float32))
    return code


@triton.jit(do_not_specialize=["all_rows", "rows", "groups"])
def fsq_kernel(
    z, z_strides, noise, noise_strides, codes, codes_strides, indices, steps, levels, all_rows, rows, groups,
    SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, NOISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = row < all_rows
    place = _place(row, rows, groups)
    z_at, codes_at, noise_at = _offset(place, z_strides), _offset(place, codes_strides), _offset(place, noise_strides)
    index = tl.zeros((TILE,), tl.int64)
    bad = tl.zeros((TILE,), tl.int32)
    basis = tl.full((), 1, tl.int64)
    for d in range(SIZE):
        count = tl.load(levels + d)
        x = tl.load(z + z_at + d * z_strides[3], mask=inside, other=0.0).to(tl.float32)
        k = _level(x, steps, count)
        code = _code(k, count, SYMMETRIC)
        odd = x != x
        if NOISE:
            code += tl.load(noise + noise_at + d * noise_strides[3], mask=inside, other=0.0)
            code = tl.minimum(tl.maximum(code, -1.0), 1.0)
        code = tl.where(odd, x, code)
        bad = bad | odd.to(tl.int32)
        tl.store(codes + codes_at + d * codes_strides[3], code.to(codes.dtype.element_ty), mask=inside)
        index += k.to(tl.int64) * basis
        basis *= count
        steps += count - 1
    tl.store(indices + row, tl.where(bad != 0, -1, index), mask=inside)


@triton.jit(do_not_specialize=["all_rows", "rows", "groups"])
def fsq_backward_kernel(
    grad, grad_strides, z, z_strides, noise, noise_strides, grad_z, out_strides, steps, levels, shapes, all_rows, rows,
    groups,
    SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, CLAMP: tl.constexpr, NOISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = row < all_rows
    place = _place(row, rows, groups)
    z_at, out_at = _offset(place, z_strides), _offset(place, out_strides)
    grad_at, noise_at = _offset(place, grad_strides), _offset(place, noise_strides)
    for d in range(SIZE):
        count = tl.load(levels + d)
        x = tl.load(z + z_at + d * z_strides[3], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + grad_at + d * grad_strides[3], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(x + tl.load(shapes + 2 * d))
        if CLAMP:
            slope = tl.where(size <= 1.0, 1.0, 0.0)
        else:
            # 1 - tanh(u)^2, which loses nothing where tanh is near 1.
            e = tl.exp(-2.0 * size)
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
        found = g * slope * tl.load(shapes + 2 * d + 1)
        if NOISE:
            code = _code(_level(x, steps, count), count, SYMMETRIC)
            code += tl.load(noise + noise_at + d * noise_strides[3], mask=inside, other=0.0)
            found = tl.where(tl.abs(code) <= 1.0, found, 0.0)
        found = tl.where(x != x, x, found)
        tl.store(grad_z + out_at + d * out_strides[3], found.to(grad_z.dtype.element_ty), mask=inside)
        steps += count - 1


def _grid(z: Tensor) -> tuple[int]:
    return (triton.cdiv(z.shape[0] * z.shape[1] * z.shape[2], TILE),)


def fsq_quantize(z: Tensor, *, levels, symmetric, clamp, noise, quantized, indices) -> None:
    """See :func:`genfast.fsq_quantize`."""
    if not indices.numel():
        return
    steps, counts, _ = tables(levels, symmetric, clamp, z.device)
    added = z if noise is None else noise
    fsq_kernel[_grid(z)](
        z, z.stride(), added, added.stride(), quantized, quantized.stride(), indices, steps, counts, indices.numel(),
        z.shape[1], z.shape[2], SIZE=len(levels), SYMMETRIC=symmetric, NOISE=noise is not None, TILE=TILE, **EXACT,
    )  # fmt: skip


def fsq_backward(grad: Tensor, z: Tensor, *, levels, symmetric, clamp, noise, grad_z) -> None:
    """The gradient of z."""
    if not z.numel():
        return
    steps, counts, shapes = tables(levels, symmetric, clamp, z.device)
    added = z if noise is None else noise
    fsq_backward_kernel[_grid(z)](
        grad, grad.stride(), z, z.stride(), added, added.stride(), grad_z, grad_z.stride(), steps, counts, shapes,
        z.shape[0] * z.shape[1] * z.shape[2], z.shape[1], z.shape[2], SIZE=len(levels), SYMMETRIC=symmetric,
        CLAMP=clamp, NOISE=noise is not None, TILE=TILE, **EXACT,
    )  # fmt: skip
