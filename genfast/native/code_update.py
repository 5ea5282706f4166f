"""Marshalling of ``code_update`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address
from genfast.reference.code_update import GRADIENTS

OPS = ("quantize", "quantize_backward", "ema_update", "code_sums", "ema_apply", "min_distance_update")


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    return SimpleNamespace(**{op: functools.partial(globals()[f"_{op}"], module) for op in OPS})


def _is_read(t: Tensor) -> bool:
    """Whether the kernels read this [B, S, G, D]: neighbours along D or along S."""
    return t.stride(3) == 1 or t.shape[3] == 1 or t.stride(1) == 1


def _vectors(t: Tensor | None):
    """What the kernels know of a tensor, and that tensor, which must outlive the call: a copy for some strides."""
    if t is None:
        return (0, 0, 0, 0, 0, 1), None
    t = t if _is_read(t) else t.contiguous()
    entry = 1 if t.shape[3] == 1 else t.stride(3)
    return (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0), t.stride(1), t.stride(2), entry), t


def _target(t: Tensor | None):
    """The same for a result."""
    if t is not None and not _is_read(t):
        return _vectors(torch.empty_like(t, memory_format=torch.contiguous_format))
    return _vectors(t)


def _codes(t: Tensor | None):
    return (0, 0) if t is None else (t.data_ptr(), DTYPE_CODES[t.dtype])


def _quantize(module, z, codebook, indices, *, zeros, z_q, losses, valid, counts, perplexity) -> None:
    (from_z, z), (to, made) = _vectors(z), _target(z_q)
    codebook, indices = codebook.contiguous(), indices.contiguous()
    module.quantize(
        (*z.shape, codebook.shape[1]), from_z, _codes(codebook), indices.data_ptr(), zeros=zeros, z_q=to,
        losses=losses.data_ptr(), valid=valid.data_ptr(), counts=address(counts), perplexity=address(perplexity),
    )  # fmt: skip
    if made is not z_q:
        z_q.copy_(made)


def _quantize_backward(
    module, grad_z_q, grad_losses, z, z_q, indices, valid, *, gradient, zeros, codes, grad_z, grad_codebook
) -> None:
    (g, grad_z_q), (x, z), (e, z_q), (to, made) = *map(_vectors, (grad_z_q, z, z_q)), _target(grad_z)
    grad_losses = None if grad_losses is None else grad_losses.contiguous()
    indices = indices.contiguous()
    module.quantize_backward(
        (*z.shape, codes), g, address(grad_losses), x, e, indices.data_ptr(), valid.data_ptr(),
        gradient=GRADIENTS.index(gradient), zeros=zeros, grad_z=to, grad_codebook=_codes(grad_codebook),
    )  # fmt: skip
    if made is not grad_z:
        grad_z.copy_(made)


def _draw(seed, stream, offset, world, rank):
    return (int(seed) & 0xFFFFFFFFFFFFFFFF, stream, offset, world, rank)


def _rows(z: Tensor):
    """With neighbours along D: sums read single vectors."""
    return _vectors(z if z.stride(3) == 1 or z.shape[3] == 1 else z.contiguous())


def _ema_update(
    module, codebook, cluster_size, embed_avg, z, indices, *, decay, eps, cosine, threshold, reset, seed, stream, offset
) -> None:
    (x, z), indices = _rows(z), indices.contiguous()
    module.ema_update(
        (*z.shape, codebook.shape[1]), codebook.data_ptr(), cluster_size.data_ptr(), embed_avg.data_ptr(), x,
        indices.data_ptr(), cosine=cosine, numbers=(decay, eps, threshold, reset),
        draw=_draw(seed, stream, offset, 1, 0),
    )  # fmt: skip


def _code_sums(module, z, indices, *, cosine, sums, slots, seed, stream, offset, world, rank) -> None:
    (x, z), indices = _rows(z), indices.contiguous()
    module.code_sums(
        (*z.shape, sums.shape[1]), x, indices.data_ptr(), cosine=cosine, sums=sums.data_ptr(), slots=address(slots),
        draw=_draw(seed, stream, offset, world, rank),
    )  # fmt: skip


def _ema_apply(module, codebook, cluster_size, embed_avg, sums, slots, *, decay, eps, cosine, threshold, reset) -> None:
    groups, codes, size = codebook.shape
    module.ema_apply(
        (0, 0, groups, size, codes), codebook.data_ptr(), cluster_size.data_ptr(), embed_avg.data_ptr(),
        sums.data_ptr(), address(slots), cosine=cosine, numbers=(decay, eps, threshold, reset),
    )  # fmt: skip


def _min_distance_update(module, z, centre, distance) -> None:
    module.min_distance_update(z.data_ptr(), centre.data_ptr(), distance.data_ptr(), *z.shape)
