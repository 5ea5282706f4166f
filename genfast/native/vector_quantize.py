"""Marshalling of ``vector_quantize`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address

_METRIC_CODES = {"l2": 0, "cosine": 1, "dot": 2}


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    return SimpleNamespace(nearest_code=functools.partial(_nearest_code, module))


def _nearest_code(module, z, codebook, *, metric, exact, indices, distances) -> None:
    if codebook.stride(-1) != 1:
        codebook = codebook.contiguous()
    module.nearest_code(
        (z.data_ptr(), DTYPE_CODES[z.dtype], *z.stride()),
        (codebook.data_ptr(), DTYPE_CODES[codebook.dtype], codebook.stride(0), codebook.stride(1)),
        indices.data_ptr(),
        address(distances),
        sizes=(*z.shape, codebook.shape[1], indices.shape[-1]),
        metric=_METRIC_CODES[metric],
        exact=exact,
    )
