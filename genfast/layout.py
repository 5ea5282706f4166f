"""How the tensors of one elementwise step lie in memory: as [batch, inner] with one stride per tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def batch_strides(tensors: Sequence[Tensor], *, ordered: bool) -> list[int] | None:
    """Element strides between samples, if within a sample all tensors are one dense run in one common order.

    The common order is row-major if ``ordered``, and otherwise any permutation (channels-last, for example) that all
    tensors share. None if some tensor is laid out differently.
    """
    like = tensors[0]
    if like.dim() == 0:
        return [0] * len(tensors)
    if all(t.is_contiguous() for t in tensors):
        return [like.stride(0)] * len(tensors)
    # A stride over one element says nothing, so it takes no part in the comparison.
    dims = [d for d in range(1, like.dim()) if like.shape[d] > 1]
    order = dims[::-1] if ordered else sorted(dims, key=lambda d: like.stride(d))
    dense, expected = 1, {}
    for d in order:
        expected[d] = dense
        dense *= like.shape[d]
    if any(t.stride(d) != expected[d] for t in tensors for d in dims):
        return None
    return [t.stride(0) for t in tensors]


def is_flat(strides: Sequence[int], batch: int, inner: int) -> bool:
    """Whether every tensor is one dense run over the whole batch."""
    return batch == 1 or all(stride == inner for stride in strides)
