"""Marshalling of ``token_masking`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

from torch import Tensor

from genfast.native.token_sampling import address


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The op of this part of the family over one native module."""
    return SimpleNamespace(forward_mask=functools.partial(_forward_mask, module))


def _forward_mask(
    module, x0, *, t, maskable, count, noise, tokens, seed, x, mask, weight, times_out, **numbers
) -> None:
    counts, seeds = (value if isinstance(value, Tensor) else None for value in (count, seed))
    module.forward_mask(
        x0=x0.data_ptr(),
        maskable=address(maskable),
        x0_stride=x0.stride(0),
        maskable_stride=0 if maskable is None else maskable.stride(0),
        batch=x0.shape[0],
        length=x0.shape[1],
        times=address(t),
        blocks=times_out.shape[1],
        count=None if counts is not None else count,
        counts=address(counts),
        noise=address(noise),
        tokens=address(tokens),
        seed=0 if seeds is not None or seed is None else seed,
        seeds=address(seeds),
        seed_per_sequence=seeds is not None and seeds.dim() == 1,
        x=x.data_ptr(),
        mask=mask.data_ptr(),
        weight=address(weight),
        times_out=times_out.data_ptr(),
        **numbers,
    )
