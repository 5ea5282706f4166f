"""Marshalling of ``gradient_bucket`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

from torch import Tensor

from genfast.gradient_wire import BucketLayout
from genfast.native.direct import DTYPE_CODES, prepare
from genfast.native.token_sampling import address


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this family over one native module."""
    if not hasattr(module, "pack_gradients_direct"):
        from genfast.native import gradient_bucket_cuda

        return gradient_bucket_cuda.bind(module)
    prepare(module, override)
    return SimpleNamespace(
        pack_gradients_direct=module.pack_gradients_direct,
        unpack_gradients_direct=module.unpack_gradients_direct,
        unpack_sum_direct=module.unpack_gradients_direct,
        pack_gradients=functools.partial(_pack, module),
        reduce_chunks=functools.partial(_reduce, module),
        unpack_gradients=functools.partial(_unpack, module),
        unpack_sum=functools.partial(_unpack_sum, module),
    )


def _tensors(gradients) -> list[tuple]:
    def one(t: Tensor) -> tuple:
        plain = t.is_contiguous()
        sizes, strides = ([], []) if plain else (list(t.shape), list(t.stride()))
        return t.data_ptr(), DTYPE_CODES[t.dtype], t.numel(), sizes, strides

    return [one(t) for t in gradients]


def _scale(scale: float | Tensor) -> tuple[int, float]:
    return (scale.data_ptr(), 1.0) if isinstance(scale, Tensor) else (0, scale)


def _pack(module, gradients, *, layout: BucketLayout, scale, residual, out, finite) -> None:
    module.pack_gradients(
        _tensors(gradients), layout.native, scale=_scale(scale), residual=address(residual), out=out.data_ptr(),
        finite=finite.data_ptr(),
    )  # fmt: skip


def _reduce(module, received, *, layout: BucketLayout, scale, residual, out) -> None:
    module.reduce_chunks(
        received.data_ptr(), layout.native, scale=_scale(scale), residual=address(residual), out=out.data_ptr()
    )


def _unpack(module, reduced, gradients, *, layout: BucketLayout, scale, square_norm, finite, count: int = 1) -> None:
    module.unpack_gradients(
        reduced.data_ptr(), layout.native, _tensors(gradients), scale=_scale(scale),
        square_norm=square_norm.data_ptr(), finite=finite.data_ptr(), count=count,
    )  # fmt: skip


def _unpack_sum(module, buckets, gradients, **options) -> None:
    _unpack(module, buckets, gradients, count=len(buckets), **options)
