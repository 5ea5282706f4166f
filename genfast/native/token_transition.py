"""Marshalling of ``token_transition`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.sampler_step import DTYPE_CODES
from genfast.native.token_sampling import address
from genfast.reference.token_sampling import scale, share
from genfast.reference.token_transition import LAWS


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The op of this part of the family over one native module."""
    return SimpleNamespace(discrete_transition=functools.partial(_discrete_transition, module))


def _per_sequence(value: float | Tensor) -> tuple[int, float]:
    return (value.data_ptr(), 0.0) if isinstance(value, Tensor) else (0, value)


def _states(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.data_ptr(), *t.stride())


def _discrete_transition(
    module, x, output, *, law, a, b, mask_id, temperature, top_p, keep_crossing, active, noise, seed, stream, offset,
    ids, out, changed,
) -> None:  # fmt: skip
    tensor = isinstance(seed, Tensor)
    high, low = share(top_p) if top_p < 1 else (0, 0)
    module.discrete_transition(
        x=_states(x),
        out=_states(out),
        active=_states(active),
        output=(output.data_ptr(), DTYPE_CODES[output.dtype], output.stride(0), output.stride(1)),
        batch=x.shape[0],
        length=x.shape[1],
        size=output.shape[2],
        law=LAWS.index(law),
        a=_per_sequence(a),
        b=_per_sequence(b),
        mask_id=mask_id,
        scale=scale(temperature),
        share=high << 32 | low,
        keep_crossing=keep_crossing,
        noise=address(noise),
        noise_is_float64=noise is not None and noise.dtype == torch.float64,
        noise_width=0 if noise is None else noise.shape[2],
        seed=0 if tensor or seed is None else seed,
        seeds=seed.data_ptr() if tensor else 0,
        seed_per_sequence=tensor and seed.dim() == 1,
        stream=stream,
        offset=offset,
        ids=address(ids),
        changed=changed.data_ptr(),
    )
