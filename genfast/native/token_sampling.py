"""Marshalling of ``token_sampling`` to the native CPU modules, which take addresses, sizes and strides."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.direct import DTYPE_CODES
from genfast.reference.token_sampling import scale, share

CONFIDENCES = {None: 0, "probability": 1, "tempered": 2, "margin": 3, "entropy": 4, "random": 5}


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The family's ops over one native module."""
    return SimpleNamespace(
        sample_tokens=functools.partial(_sample_tokens, module),
    )


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _logits(t: Tensor | None):
    return None if t is None else (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0), t.stride(1))


def _sample_tokens(
    module,
    logits,
    *,
    temperature,
    top_k,
    top_p,
    keep_crossing,
    uncond,
    guidance,
    suppress,
    suppress_confidence,
    rows,
    shift,
    confidence,
    noise,
    seed,
    stream,
    offset,
    ids,
    tokens,
    confidences,
    logsumexp,
    entropy,
    margin,
) -> None:
    per_row = isinstance(temperature, Tensor)
    scales = scale(temperature)
    temperatures = temperature.double().contiguous() if per_row and noise is not None else None
    high, low = share(top_p) if top_p < 1 else (0, 0)
    module.sample_tokens(
        _logits(logits),
        uncond=_logits(uncond),
        guidance=guidance,
        length=logits.shape[1],
        size=logits.shape[2],
        rows=address(rows),
        count=tokens.numel(),
        shift=shift,
        scales=scales.data_ptr() if per_row else 0,
        scale=0.0 if per_row else scales,
        temperatures=address(temperatures),
        temperature=0.0 if per_row else temperature,
        top_k=top_k,
        share=high << 32 | low,
        keep_crossing=keep_crossing,
        suppress=(address(suppress), 0 if suppress is None else suppress.numel()),
        suppress_confidence=(
            address(suppress_confidence),
            0 if suppress_confidence is None else suppress_confidence.numel(),
        ),
        noise=address(noise),
        noise_is_float64=noise is not None and noise.dtype == torch.float64,
        seed=None if isinstance(seed, Tensor) else seed,
        seeds=seed.data_ptr() if isinstance(seed, Tensor) else 0,
        seed_per_sequence=isinstance(seed, Tensor) and seed.dim() == 1,
        stream=stream,
        offset=offset,
        ids=address(ids),
        confidence=CONFIDENCES[confidence],
        tokens=tokens.data_ptr(),
        confidences=address(confidences),
        logsumexp=address(logsumexp),
        entropy=address(entropy),
        margin=address(margin),
    )
