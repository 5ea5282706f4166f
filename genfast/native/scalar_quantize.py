"""Marshalling of ``scalar_quantize`` to the native CPU modules, which take addresses, sizes and strides."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address
from genfast.reference import scalar_quantize as reference


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    names = dict(
        fsq_quantize=_fsq_quantize, fsq_backward=_fsq_backward, binary_quantize=_binary_quantize,
        binary_backward=_binary_backward,
    )  # fmt: skip
    return SimpleNamespace(**{name: functools.partial(f, module) for name, f in names.items()})


@functools.lru_cache(64)
def tables(levels: tuple[int, ...], symmetric: bool, clamp: bool) -> tuple[Tensor, Tensor]:
    """float32 steps of all dimensions, and [D, 2] of shift and slope."""
    steps = [step for count in levels for step in reference.steps(count, symmetric, clamp)]
    shapes = []
    for count in levels:
        shift, height, _ = reference.shape_of(count, symmetric, clamp)
        shapes.append((shift, height * reference.slope_unit(count, symmetric)))
    return torch.tensor(steps, dtype=torch.float32), torch.tensor(shapes, dtype=torch.float32)


def _merged(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """[B, S, ...] as [1, B S, ...], where that is a view of all: rows are worked on in runs of S."""
    given = [t for t in tensors if t is not None]
    if given[0].shape[0] == 1 or any(t.stride(0) != t.shape[1] * t.stride(1) for t in given):
        return tensors
    return tuple(None if t is None else t.flatten(0, 1)[None] for t in tensors)


def _vectors(t: Tensor | None):
    return (0, 0, (0, 0, 0, 0)) if t is None else (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride())


def _levels(levels, symmetric: bool, clamp: bool, z: Tensor, noise: Tensor | None) -> dict:
    steps, shapes = tables(levels, symmetric, clamp)
    return dict(
        shape=tuple(z.shape), levels=levels, steps=steps.data_ptr(), shapes=shapes.data_ptr(), symmetric=symmetric,
        clamp=clamp, z=_vectors(z), noise=_vectors(noise),
    )  # fmt: skip


def _fsq_quantize(module, z, *, levels, symmetric, clamp, noise, quantized, indices) -> None:
    z, noise, quantized = _merged(z, noise, quantized)
    arguments = _levels(levels, symmetric, clamp, z, noise)
    module.fsq_quantize(**arguments, codes=_vectors(quantized), indices=indices.data_ptr())


def _fsq_backward(module, grad, z, *, levels, symmetric, clamp, noise, grad_z) -> None:
    z, noise, grad, grad_z = _merged(z, noise, grad, grad_z)
    arguments = _levels(levels, symmetric, clamp, z, noise)
    module.fsq_backward(**arguments, grad=_vectors(grad), grad_z=_vectors(grad_z))


def _bits(z: Tensor, radius, magnitude: float, sharpness: float, block, least: float, mask: Tensor | None) -> dict:
    return dict(
        shape=tuple(z.shape), normalise=radius is not None, radius=radius or 0.0, magnitude=magnitude,
        chain=4 * sharpness * magnitude, block=block or 0, least=least,
        mask=(0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride()), z=_vectors(z),
    )  # fmt: skip


def _binary_quantize(
    module, z, *, radius, magnitude, sharpness, block, least, mask, quantized, indices, entropies, mean, commitment
) -> None:
    z, mask, quantized = _merged(z, mask, quantized)
    module.binary_quantize(
        **_bits(z, radius, magnitude, sharpness, block, least, mask), codes=_vectors(quantized),
        indices=indices.data_ptr(), entropies=address(entropies), mean=address(mean), commitment=address(commitment),
    )  # fmt: skip


def _binary_backward(
    module, grad, grad_entropies, grad_mean, grad_commitment, z, *,
    radius, magnitude, sharpness, block, least, mask, grad_z,
) -> None:  # fmt: skip
    z, mask, grad, grad_z = _merged(z, mask, grad, grad_z)
    grad_mean = None if grad_mean is None else grad_mean.contiguous()
    module.binary_backward(
        **_bits(z, radius, magnitude, sharpness, block, least, mask), grad=_vectors(grad), grad_z=_vectors(grad_z),
        entropies=address(grad_entropies), mean=address(grad_mean), commitment=address(grad_commitment),
    )  # fmt: skip
