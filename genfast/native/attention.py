"""Marshalling of ``attention`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The family's ops over one native module."""
    return SimpleNamespace(
        attention=functools.partial(_attention, module),
        attention_backward=functools.partial(_attention_backward, module),
    )


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
    module.attention(_heads(q), _heads(k), _heads(v), _heads(out), lse.data_ptr(), **_arguments(q, k, v, ranges, scale))


def _attention_backward(
    module, grad_out, grad_lse, q, k, v, out, lse, *, ranges, scale, grad_q, grad_k, grad_v
) -> None:
    grad_out, q, k, v = map(_rows, (grad_out, q, k, v))
    # empty_like follows the strides of its model, which need not have neighbouring numbers in a row.
    grads = [
        t if t.stride(3) == 1 or t.shape[3] == 1 else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (grad_q, grad_k, grad_v)
    ]
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    module.attention_backward(
        _heads(grad_out), address(grad_lse), _heads(q), _heads(k), _heads(v), _heads(out), lse.data_ptr(),
        *map(_heads, grads), **_arguments(q, k, v, ranges, scale),
    )  # fmt: skip
    for wanted, made in zip((grad_q, grad_k, grad_v), grads):
        if made is not wanted:
            wanted.copy_(made)
