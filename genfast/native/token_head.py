"""Marshalling of ``token_head`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.sampler_step import DTYPE_CODES
from genfast.native.token_sampling import address


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    return SimpleNamespace(
        lm_head_partials=functools.partial(_partials, module),
        merge_head_partials=functools.partial(_merge, module),
    )


def _ids(t: Tensor | None) -> tuple[int, int]:
    return address(t), 0 if t is None else t.numel()


def _partials(
    module,
    hidden,
    weight,
    *,
    bias,
    first,
    scale,
    judged_scale,
    suppress,
    suppress_confidence,
    softcap,
    rows,
    seed,
    stream,
    offset,
    ids,
    largest,
    index,
    **outputs,
) -> None:
    count, tiles = largest.shape
    if not count:
        return
    size, depth = weight.shape
    threads = module.head_threads(count, size, depth)
    # From torch, so that it is seen where memory is counted.
    workspace = torch.empty(threads * module.head_workspace(count), dtype=torch.uint8)
    tensor = isinstance(seed, Tensor)
    module.head_partials(
        (hidden.data_ptr(), DTYPE_CODES[hidden.dtype], hidden.stride(0), hidden.stride(1)),
        (weight.data_ptr(), DTYPE_CODES[weight.dtype], weight.stride(0), 1),
        bias=(0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype]),
        length=hidden.shape[1],
        depth=depth,
        size=size,
        first=first,
        tiles=tiles,
        rows=address(rows),
        count=count,
        softcap=softcap,
        suppress=_ids(suppress),
        suppress_confidence=_ids(suppress_confidence),
        scale=address(scale),
        judged_scale=address(judged_scale),
        seed=None if tensor else seed,
        seeds=seed.data_ptr() if tensor else 0,
        seed_per_sequence=tensor and seed.dim() == 1,
        stream=stream,
        offset=offset,
        ids=address(ids),
        workspace=workspace.data_ptr(),
        threads=threads,
        largest=largest.data_ptr(),
        index=index.data_ptr(),
        **{name: address(t) for name, t in outputs.items()},
    )


def _merge(module, largest, index, **fields) -> None:
    module.merge_partials(
        largest.data_ptr(),
        index.data_ptr(),
        count=largest.shape[0],
        tiles=largest.shape[1],
        **{name: address(t) for name, t in fields.items()},
    )
