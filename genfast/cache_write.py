"""The op by which a :class:`genfast.KVCache` is written: one pass over the new keys and values, and no other memory.

It stands below the ops, because ``KVCache`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast import profiling
from genfast.backends import choose
from genfast.reference import attention_cached as reference


def cache_write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, first: Tensor, end: Tensor,
    rope: tuple[Tensor, Tensor, bool] | None,
) -> None:  # fmt: skip
    """Store k and v at positions first[b] + i, as far as they are in [0, end[b]); k is rotated by them first.

    Args:
        k: [B, Hkv, n, D], v: [B, Hkv, n, Dv], with any strides.
        keys, values: the memory, with a place for what is dropped: [B, Hkv, capacity + 1, .] or
            [pages + 1, Hkv, page_size, .].
        table: int32 [B, pages of a row], or None.
        first, end: int64 [B].
        rope: (cos, sin, interleaved), or None.
    """
    call = _cache_write_op if torch.compiler.is_compiling() else _cache_write
    cos, sin, interleaved = (None, None, False) if rope is None else rope
    call(k.detach(), v.detach(), keys, values, table, first.contiguous(), end.contiguous(), cos, sin, interleaved)


def _cache_write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, first: Tensor, end: Tensor,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    if k.dtype == torch.float64:
        name, function = "reference", reference.cache_write
    else:
        name, function = choose("attention", "cache_write", k.device)
    with profiling.op_range("attention", f"cache_write[{name}]", *k.shape):
        function(k, v, keys, values, table, first, end, cos, sin, interleaved=interleaved)


_cache_write_op = torch.library.custom_op(
    "genfast::cache_write",
    _cache_write,
    mutates_args=("keys", "values"),
    schema="(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor? table, Tensor first, Tensor end, "
    "Tensor? cos, Tensor? sin, bool interleaved) -> ()",
)


@_cache_write_op.register_fake
def _cache_write_fake(k, v, keys, values, table, first, end, cos, sin, interleaved):
    return None
