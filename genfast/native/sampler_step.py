"""Marshalling of ``sampler_step`` to the native modules, which take addresses, sizes and strides."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.layout import batch_strides
from genfast.native.direct import DTYPE_CODES, prepare
from genfast.step_table import StepTable, quantile_rank


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The family's ops over one native module; ``override`` holds the backend that was ordered, or None."""
    if not hasattr(module, "sampler_step_direct"):
        from genfast.native import sampler_step_cuda

        return sampler_step_cuda.bind(module)
    prepare(module, override)
    return SimpleNamespace(
        sampler_step=functools.partial(_sampler_step, module),
        sampler_step_direct=module.sampler_step_direct,
        plain_step_direct=module.plain_step_direct,
        plain_object_direct=module.plain_object_direct,
    )


def _sampler_step(
    module,
    inputs,
    table: StepTable,
    *,
    step,
    uncond,
    guidance,
    guidance_rescale,
    clip,
    threshold,
    log_variance,
    noise,
    seed,
    stream,
    offset,
    out: Tensor,
    second_out: Tensor | None,
) -> None:
    float64 = any(t.dtype == torch.float64 for t in inputs)
    batch = out.shape[0] if out.dim() else 1
    inner = out.numel() // batch if batch else 0
    if threshold is not None:
        ratio, maximum = threshold
        threshold = (*quantile_rank(ratio, inner, torch.float64 if float64 else torch.float32), maximum)
    operands = [*inputs, uncond, log_variance, noise, out, second_out]
    present = [t for t in operands if t is not None]
    # One dense order for all (channels-last, say) is as good as contiguous, but in-kernel draws count row-major.
    flat = batch_strides(present, ordered=seed is not None) is not None
    *inputs, uncond, log_variance, noise, target, second = (_operand(t, flat) for t in operands)
    module.sampler_step(
        inputs,
        uncond=uncond,
        log_variance=log_variance,
        noise=noise,
        out=target,
        second=second,
        batch=batch,
        inner=inner,
        sizes=list(out.shape[1:]) or [1],
        float64=float64,
        table=table.data.data_ptr(),
        rows=table.rows,
        row=step if isinstance(step, int) else -1,
        steps=step.data_ptr() if isinstance(step, Tensor) else 0,
        step_count=step.numel() if isinstance(step, Tensor) else 0,
        has_x0=table.has_x0,
        has_log_std=table.has_log_std,
        guidance=1.0 if isinstance(guidance, Tensor) else guidance,
        guidances=guidance.data_ptr() if isinstance(guidance, Tensor) else 0,
        guidance_count=guidance.numel() if isinstance(guidance, Tensor) else 0,
        rescale=guidance_rescale,
        clip=clip,
        threshold=threshold,
        seed=None if isinstance(seed, Tensor) else seed,
        seeds=seed.data_ptr() if isinstance(seed, Tensor) else 0,
        seed_per_sample=isinstance(seed, Tensor) and seed.dim() == 1,
        stream=stream,
        offset=offset,
    )


def _operand(t: Tensor | None, flat: bool):
    """(address, dtype code, batch stride, inner strides), the last empty where the inner dimensions are one run."""
    if t is None:
        return None
    contiguous = flat or t.dim() < 2 or t.numel() == 0 or t[0].is_contiguous()
    return (
        t.data_ptr(),
        DTYPE_CODES[t.dtype],
        t.stride(0) if t.dim() else 0,
        [] if contiguous else list(t.stride()[1:]),
    )
