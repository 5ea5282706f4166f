"""How the tensors of one elementwise step lie in memory: as [batch, inner] with one stride per tensor; of rows: as
[batch, rows, ...]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def is_flat(operands: Sequence[Tensor | None], strides: Sequence[int], batch: int, inner: int) -> bool:
    """Whether every operand is one dense run over the whole batch."""
    return batch == 1 or all(t is None or stride == inner for t, stride in zip(operands, strides))


def arrange(operands: Sequence[Tensor | None], outputs: int, *, ordered: bool) -> tuple[list[Tensor | None], list[int]]:
    """The operands of a step (None: not given), laid out so that each sample is one dense run, and their batch strides.

    Where the tensors do not share a layout, those that are not contiguous are replaced: inputs by contiguous copies,
    the last ``outputs`` operands by new tensors, for :func:`give_back` to copy out of.
    """
    given = [t for t in operands if t is not None]
    strides = batch_strides(given, ordered=ordered)
    operands = list(operands)
    if strides is None:
        first_output = len(operands) - outputs
        for i, t in enumerate(operands):
            if t is not None and not t.is_contiguous():
                contiguous = torch.contiguous_format
                operands[i] = t.contiguous() if i < first_output else torch.empty_like(t, memory_format=contiguous)
        strides = batch_strides([t for t in operands if t is not None], ordered=ordered)
    found = iter(strides)
    return operands, [0 if t is None else next(found) for t in operands]


def give_back(targets: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> None:
    """Copy results that :func:`arrange` had put elsewhere to where they belong."""
    for target, result in zip(targets, results):
        if target is not result:
            target.copy_(result)


def merged(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """[B, S, ...] as [1, B S, ...], where that is a view of all: rows are worked on in runs of S."""
    given = [t for t in tensors if t is not None]
    if given[0].shape[0] == 1 or any(t.stride(0) != t.shape[1] * t.stride(1) for t in given):
        return tensors
    return tuple(None if t is None else t.flatten(0, 1)[None] for t in tensors)
