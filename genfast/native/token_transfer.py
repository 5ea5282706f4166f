"""Marshalling of ``token_transfer`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

from torch import Tensor

from genfast.native.direct import prepare
from genfast.reference.token_transfer import STRATEGIES


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    prepare(module, override)
    return SimpleNamespace(
        select_transfer_direct=module.select_transfer_direct,
        commit_direct=module.commit_direct,
        select_transfer=functools.partial(_select_transfer, module),
        commit_=functools.partial(_commit, module),
    )


def _per_row(value: int | Tensor) -> tuple[int, int]:
    return (value.data_ptr(), 0) if isinstance(value, Tensor) else (0, value)


def _select_transfer(module, confidence, mask, *, n, start, end, strategy, slack, seed, out, **numbers) -> None:
    tensor = isinstance(seed, Tensor)
    module.select_transfer(
        confidence=confidence.data_ptr(),
        mask=mask.data_ptr(),
        out=out.data_ptr(),
        confidence_stride=confidence.stride(0),
        mask_stride=mask.stride(0),
        batch=confidence.shape[0],
        length=confidence.shape[1],
        n=_per_row(n),
        start=_per_row(start),
        end=_per_row(end),
        strategy=STRATEGIES.index(strategy),
        slack=-1.0 if slack is None else slack,
        seed=0 if tensor or seed is None else seed,
        seeds=seed.data_ptr() if tensor else 0,
        seed_per_sequence=tensor and seed.dim() == 1,
        **numbers,
    )


def _commit(module, x, tokens, selected, *, mask_id, eos_id, left, finished) -> None:
    module.commit(
        x=x.data_ptr(),
        tokens=tokens.data_ptr(),
        selected=selected.data_ptr(),
        x_stride=x.stride(0),
        tokens_stride=tokens.stride(0),
        selected_stride=selected.stride(0),
        batch=x.shape[0],
        length=x.shape[1],
        mask_id=mask_id,
        eos_id=eos_id,
        left=left.data_ptr(),
        finished=finished.data_ptr(),
    )
