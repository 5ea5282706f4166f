"""Marshalling of ``gradient_bucket`` to the CUDA module: addresses, sizes and a stream.

Everything is enqueued on the current stream of the tensors' device, without a synchronisation, and addresses travel as
arguments of the kernels, so that a CUDA graph can capture the calls. A tensor that is not contiguous, and a bucket that
does not begin at a multiple of 16 bytes, go through a copy.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.gradient_wire import BucketLayout, aligned
from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address


@functools.cache
def bind(module) -> SimpleNamespace:
    """The family's ops over the CUDA module."""
    return SimpleNamespace(
        pack_gradients=functools.partial(_pack, module),
        reduce_chunks=functools.partial(_reduce, module),
        unpack_gradients=functools.partial(_unpack, module),
    )


def _pack(module, gradients, *, layout: BucketLayout, scale, residual, out, finite) -> None:
    tensors, target = [t.contiguous() for t in gradients], aligned(out)
    module.pack_gradients(
        _described(tensors), layout.native, scale=_scale(scale), residual=address(residual), out=target.data_ptr(),
        finite=finite.data_ptr(), **_place(out),
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _reduce(module, received, *, layout: BucketLayout, scale, residual, out) -> None:
    source, target = aligned(received), aligned(out)
    module.reduce_chunks(
        source.data_ptr(), layout.native, scale=_scale(scale), residual=address(residual), out=target.data_ptr(),
        **_place(out),
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _unpack(module, reduced, gradients, *, layout: BucketLayout, scale, square_norm, finite) -> None:
    tensors = [
        t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format) for t in gradients
    ]
    described = _described(tensors)
    workspace = square_norm.new_empty(module.bucket_workspace(described))
    source = aligned(reduced)
    module.unpack_gradients(
        source.data_ptr(), layout.native, described, scale=_scale(scale), workspace=workspace.data_ptr(),
        square_norm=square_norm.data_ptr(), finite=finite.data_ptr(), **_place(reduced),
    )  # fmt: skip
    for t, written in zip(gradients, tensors):
        if written is not t:
            t.copy_(written)


def _described(tensors) -> list[tuple[int, int, int]]:
    return [(t.data_ptr(), DTYPE_CODES[t.dtype], t.numel()) for t in tensors]


def _scale(scale: float | Tensor) -> tuple[int, float]:
    return (scale.data_ptr(), 1.0) if isinstance(scale, Tensor) else (0, scale)


def _place(t: Tensor) -> dict[str, int]:
    return dict(device=t.device.index or 0, cuda_stream=torch.cuda.current_stream(t.device).cuda_stream)
