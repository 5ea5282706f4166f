"""Marshalling of ``attention_cached`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

from genfast.native.attention import _heads, _rows
from genfast.native.token_sampling import address

_ABSENT = (0, 0, 0, 0, 0)


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    return SimpleNamespace(attention_cached=functools.partial(_attention_cached, module))


def _attention_cached(
    module, q, k, v, keys, values, table, lengths, first, cos, sin, *, interleaved, scale, out, lse
) -> None:
    q, keys, values = map(_rows, (q, keys, values))
    k, v = (t if t is None else _rows(t) for t in (k, v))
    page_size = keys.shape[2] if table is not None else 0
    capacity = keys.shape[2] if table is None else table.shape[1] * page_size
    module.attention_cached(
        _heads(q),
        _ABSENT if k is None else _heads(k),
        _ABSENT if v is None else _heads(v),
        _heads(keys),
        _heads(values),
        _heads(out),
        lse.data_ptr(),
        lengths=lengths.data_ptr(),
        table=(address(table), 0 if table is None else table.stride(0), page_size),
        rope=(address(cos), address(sin), address(first), 0 if cos is None else cos.shape[0], interleaved),
        batch_heads=(q.shape[0], q.shape[1], keys.shape[1]),
        sizes=(q.shape[2], 0 if k is None else k.shape[2], capacity, q.shape[3], values.shape[3]),
        scale=scale,
    )
