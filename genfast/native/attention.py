"""Marshalling of ``attention`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

from torch import Tensor

from genfast.native.direct import DTYPE_CODES


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The family's ops over one native module."""
    return SimpleNamespace(attention=functools.partial(_attention, module))


def _rows(t: Tensor) -> Tensor:
    """With neighbouring numbers in a row; a copy only where they are not."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _heads(t: Tensor):
    return (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0), t.stride(1), t.stride(2))


def _arguments(q, k, v, ranges, scale) -> dict:
    batch_stride = 0 if ranges is None or ranges.shape[0] == 1 else ranges.stride(0)
    return dict(
        ranges=(0 if ranges is None else ranges.data_ptr(), batch_stride),
        batch_heads=(q.shape[0], q.shape[1], k.shape[1]),
        sizes=(q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        scale=scale,
    )


def _attention(module, q, k, v, *, ranges, scale, out, lse) -> None:
    q, k, v = map(_rows, (q, k, v))
    module.attention(
        _heads(q), _heads(k), _heads(v), _heads(out), lse.data_ptr(), **_arguments(q, k, v, ranges, scale)
    )
