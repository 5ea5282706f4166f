"""Marshalling of ``residual_quantize`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch

from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address
from genfast.native.vector_quantize import METRIC_CODES


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    return SimpleNamespace(residual_quantize=functools.partial(_residual_quantize, module))


def _residual_quantize(module, z, codebooks, *, metric, exact, indices, z_q, errors) -> None:
    codebooks = [t if t.stride(-1) == 1 else t.contiguous() for t in codebooks]
    total = z_q if z_q.dtype == torch.float32 else torch.empty(z_q.shape, dtype=torch.float32)
    module.residual_quantize(
        (z.data_ptr(), DTYPE_CODES[z.dtype], *z.stride()),
        [(t.data_ptr(), DTYPE_CODES[t.dtype], *t.stride()[:2], t.shape[1]) for t in codebooks],
        indices.data_ptr(),
        total.data_ptr(),
        address(errors),
        sizes=tuple(z.shape),
        metric=METRIC_CODES[metric],
        exact=exact,
    )
    if total is not z_q:
        z_q.copy_(total)
