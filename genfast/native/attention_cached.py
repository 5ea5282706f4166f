"""Marshalling of ``attention_cached`` and ``cache_write`` to the native CPU modules."""

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
    return SimpleNamespace(
        attention_cached=functools.partial(_attention_cached, module),
        cache_write=functools.partial(_cache_write, module),
    )


def _attention_cached(
    module, q, k, v, keys, values, table, lengths, first, cos, sin, *, interleaved, scale, out, lse
) -> None:
    q, keys, values = map(_rows, (q, keys, values))
    k, v = (t if t is None else _rows(t) for t in (k, v))
    capacity = keys.shape[2] * (1 if table is None else table.shape[1])
    module.attention_cached(
        _heads(q),
        _ABSENT if k is None else _heads(k),
        _ABSENT if v is None else _heads(v),
        _heads(keys),
        _heads(values),
        _heads(out),
        lse.data_ptr(),
        lengths=lengths.data_ptr(),
        table=_table(table, keys),
        rope=_rope(cos, sin, first, interleaved),
        batch_heads=(q.shape[0], q.shape[1], keys.shape[1]),
        sizes=(q.shape[2], 0 if k is None else k.shape[2], capacity, q.shape[3], values.shape[3]),
        scale=scale,
    )


def _cache_write(module, k, v, keys, values, table, first, end, cos, sin, *, interleaved) -> None:
    k, v = _rows(k), _rows(v)
    module.cache_write(
        _heads(k),
        _heads(v),
        _heads(keys),
        _heads(values),
        first=first.data_ptr(),
        end=end.data_ptr(),
        table=_table(table, keys),
        rope=_rope(cos, sin, first, interleaved),
        sizes=(*k.shape, v.shape[3]),
    )


def _table(table, keys):
    return (0, 0, 0) if table is None else (table.data_ptr(), table.stride(0), keys.shape[2])


def _rope(cos, sin, first, interleaved):
    return (address(cos), address(sin), address(first), 0 if cos is None else cos.shape[0], interleaved)
