"""Marshalling of ``sampler_step`` to the CUDA module, which takes addresses, sizes, batch strides and a stream."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.layout import arrange, give_back, is_flat
from genfast.native.direct import DTYPE_CODES
from genfast.step_table import StepTable, quantile_rank


@functools.cache
def bind(module) -> SimpleNamespace:
    """The family's ops over the CUDA module."""
    return SimpleNamespace(sampler_step=functools.partial(_sampler_step, module))


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
    """Fill ``out`` (and ``second_out``) on the current stream of their device, without a synchronisation.

    A tensor whose samples are not one dense run in the order of the others goes through a contiguous copy; with
    Philox noise that order is row-major. Reductions use at most 17 KB per sample of fewer than 2^31 elements, 25 KB in
    float64, from torch's allocator, so that a captured CUDA graph owns them.
    """
    count = out.numel()
    if count == 0:
        return
    philox = noise is None and seed is not None
    operands, strides = arrange([*inputs, uncond, log_variance, noise, out, second_out], 2, ordered=philox)
    results = operands[-2:]

    batch = out.shape[0] if out.dim() else 1
    inner = count // batch
    float64 = any(t.dtype == torch.float64 for t in inputs)
    rescale = 0.0 if uncond is None else guidance_rescale

    row, row_stride, steps = 0, 0, 0
    if step is None:
        row_stride = int(table.rows > 1)
    elif isinstance(step, Tensor):
        steps, row_stride = step.data_ptr(), int(step.numel() > 1)
    else:
        row = step
        stream += step
    guidances, guidance_stride = 0, 0
    if isinstance(guidance, Tensor):
        guidances, guidance_stride, guidance = guidance.data_ptr(), int(guidance.numel() > 1), 1.0
    seeds, seed_stride = 0, 0
    if not philox:
        seed = None
    elif isinstance(seed, Tensor):
        seeds, seed_stride, seed = seed.data_ptr(), seed.dim(), None

    reduces = rescale != 0.0 or threshold is not None
    alike = row_stride == 0 and guidance_stride == 0 and not philox and not reduces
    if alike and is_flat(operands, strides, batch, inner):
        batch, inner = 1, count
    workspace = None
    if reduces:
        size = module.workspace_bytes(batch, inner, float64, rescale != 0.0, threshold is not None)
        workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
    if threshold is not None:
        ratio, maximum = threshold
        threshold = (*quantile_rank(ratio, inner, torch.float64 if float64 else torch.float32), maximum)

    *inputs, uncond, log_variance, noise, first, second = (
        t if t is None else (t.data_ptr(), DTYPE_CODES[t.dtype], stride) for t, stride in zip(operands, strides)
    )
    module.sampler_step(
        inputs=inputs,
        uncond=uncond,
        log_variance=log_variance,
        noise=noise,
        out=first,
        second=second,
        batch=batch,
        inner=inner,
        float64=float64,
        table=table.data.data_ptr(),
        rows=table.rows,
        row=row,
        row_stride=row_stride,
        steps=steps,
        has_x0=table.has_x0,
        guidance=guidance,
        guidances=guidances,
        guidance_stride=guidance_stride,
        rescale=rescale,
        clip=clip,
        threshold=threshold,
        seed=seed,
        seeds=seeds,
        seed_stride=seed_stride,
        stream=stream,
        offset=offset,
        workspace=0 if workspace is None else workspace.data_ptr(),
        device=out.device.index or 0,
        cuda_stream=torch.cuda.current_stream(out.device).cuda_stream,
    )
    give_back((out, second_out), results)
