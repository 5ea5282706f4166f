"""Finite scalar quantisation. ``genfast.reference.scalar_quantize`` is the specification, for levels to the bit.

A number's level is the count of the steps at or below it, which are in the cache for all programs. The other
quantisers of this part are in ``binary_quantize.py``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.binary_quantize import binary_backward, binary_quantize
from genfast.kernels.rounding import rounded
from genfast.kernels.scalar_tiles import EXACT, TILE, offset, place, programs_of
from genfast.layout import merged
from genfast.reference import scalar_quantize as reference

__all__ = ["binary_backward", "binary_quantize", "fsq_backward", "fsq_quantize"]


@functools.lru_cache(64)
def tables(levels: tuple[int, ...], symmetric: bool, clamp: bool, device) -> tuple[Tensor, Tensor, Tensor]:
    """float32 steps of all dimensions; int64 [D] of levels; float32 [D, 3] of shift, slope and unit."""
    steps = [step for count in levels for step in reference.steps(count, symmetric, clamp)]
    shapes = []
    for count in levels:
        shift, height, _ = reference.shape_of(count, symmetric, clamp)
        unit = reference.slope_unit(count, symmetric)
        shapes.append((shift, height * unit, unit))
    made = (torch.tensor(steps), torch.tensor(levels), torch.tensor(shapes))
    return tuple(t.to(device) for t in made)


@triton.jit
def _level(z, steps, count):
    k = tl.zeros_like(z).to(tl.int32)
    for j in range(0, count - 1):
        k += (z >= tl.load(steps + j)).to(tl.int32)
    return k


@triton.jit
def _code(k, count, shape, SYMMETRIC: tl.constexpr):
    """div_rn: the division that rounds as everywhere else."""
    if SYMMETRIC:
        code = k.to(tl.float32) * tl.load(shape + 2) - 1.0
    else:
        half = (count // 2 + tl.zeros_like(k)).to(tl.int32)
        code = tl.div_rn((k - half).to(tl.float32), half.to(tl.float32))
    return code


@triton.jit(do_not_specialize=["length"])
def fsq_kernel(
    z, z_strides, noise, noise_strides, codes, codes_strides, indices, steps, levels, shapes, length,
    groups,
    SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, NOISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = place(length, groups, TILE)
    inside = at[1] < length
    z_at, codes_at, noise_at = offset(at, z_strides), offset(at, codes_strides), offset(at, noise_strides)
    index = tl.zeros((TILE,), tl.int64)
    bad = tl.zeros((TILE,), tl.int32)
    basis = tl.full((), 1, tl.int64)
    for d in range(SIZE):
        count = tl.load(levels + d)
        x = tl.load(z + z_at + d * z_strides[3], mask=inside, other=0.0).to(tl.float32)
        k = _level(x, steps, count)
        code = _code(k, count, shapes + 3 * d, SYMMETRIC)
        odd = x != x
        if NOISE:
            code += tl.load(noise + noise_at + d * noise_strides[3], mask=inside, other=0.0)
            code = tl.minimum(tl.maximum(code, -1.0), 1.0)
        code = tl.where(odd, x, code)
        bad = bad | odd.to(tl.int32)
        tl.store(codes + codes_at + d * codes_strides[3], rounded(code, codes.dtype.element_ty), mask=inside)
        index += k.to(tl.int64) * basis
        basis *= count
        steps += count - 1
    tl.store(indices + (at[0] * length + at[1]) * groups + at[2], tl.where(bad != 0, -1, index), mask=inside)


@triton.jit(do_not_specialize=["length"])
def fsq_backward_kernel(
    grad, grad_strides, z, z_strides, noise, noise_strides, grad_z, out_strides, steps, levels, shapes, length,
    groups,
    SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, CLAMP: tl.constexpr, NOISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = place(length, groups, TILE)
    inside = at[1] < length
    z_at, out_at = offset(at, z_strides), offset(at, out_strides)
    grad_at, noise_at = offset(at, grad_strides), offset(at, noise_strides)
    for d in range(SIZE):
        count = tl.load(levels + d)
        x = tl.load(z + z_at + d * z_strides[3], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + grad_at + d * grad_strides[3], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(x + tl.load(shapes + 3 * d))
        if CLAMP:
            slope = tl.where(size <= 1.0, 1.0, 0.0)
        else:
            # 1 - tanh(u)^2, which loses nothing where tanh is near 1.
            e = tl.exp(-2.0 * size)
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
        found = g * slope * tl.load(shapes + 3 * d + 1)
        if NOISE:
            code = _code(_level(x, steps, count), count, shapes + 3 * d, SYMMETRIC)
            code += tl.load(noise + noise_at + d * noise_strides[3], mask=inside, other=0.0)
            found = tl.where(tl.abs(code) <= 1.0, found, 0.0)
        found = tl.where(x != x, x, found)
        tl.store(grad_z + out_at + d * out_strides[3], rounded(found, grad_z.dtype.element_ty), mask=inside)
        steps += count - 1


def fsq_quantize(z: Tensor, *, levels, symmetric, clamp, noise, quantized, indices) -> None:
    """See :func:`genfast.fsq_quantize`."""
    if not indices.numel():
        return
    z, noise, quantized = merged(z, noise, quantized)
    steps, counts, shapes = tables(levels, symmetric, clamp, z.device)
    added = z if noise is None else noise
    fsq_kernel[(programs_of(z),)](
        z, z.stride(), added, added.stride(), quantized, quantized.stride(), indices, steps, counts, shapes,
        z.shape[1], z.shape[2], SIZE=len(levels), SYMMETRIC=symmetric, NOISE=noise is not None, TILE=TILE, **EXACT,
    )  # fmt: skip


def fsq_backward(grad: Tensor, z: Tensor, *, levels, symmetric, clamp, noise, grad_z) -> None:
    """The gradient of z."""
    if not z.numel():
        return
    z, noise, grad, grad_z = merged(z, noise, grad, grad_z)
    steps, counts, shapes = tables(levels, symmetric, clamp, z.device)
    added = z if noise is None else noise
    fsq_backward_kernel[(programs_of(z),)](
        grad, grad.stride(), z, z.stride(), added, added.stride(), grad_z, grad_z.stride(), steps, counts, shapes,
        z.shape[1], z.shape[2], SIZE=len(levels), SYMMETRIC=symmetric, CLAMP=clamp, NOISE=noise is not None, TILE=TILE,
        **EXACT,
    )  # fmt: skip
