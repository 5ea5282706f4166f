"""One step of a sampler that is linear in its inputs, in plain PyTorch: the specification of ``sampler_step``."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.random import reference_normal
from genfast.step_table import StepTable, quantile_rank


def sampler_step(
    inputs,
    table: StepTable,
    *,
    step: int | Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    guidance_rescale: float = 0.0,
    clip: tuple[float, float] | None = None,
    threshold: tuple[float, float] | None = None,
    log_variance: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    second_out: Tensor | None = None,
):
    """See :func:`genfast.sampler_step`. Differentiable, because it is plain PyTorch."""
    f64 = any(t.dtype == torch.float64 for t in inputs)
    compute = torch.float64 if f64 else torch.float32
    x = [t.to(compute) for t in inputs]
    like = inputs[0] if inputs else out
    batch = like.shape[0] if like.dim() else 1
    n = table.inputs

    rows = _rows(table, step)
    column = iter(rows.to(compute).unbind(1))

    def take(count):
        return [next(column).view(-1, *[1] * (like.dim() - 1)) if like.dim() else next(column)[0] for _ in range(count)]

    c, (c_x0, c_noise), d, (d_x0, d_noise) = take(n), take(2), take(n), take(2)
    (k_x, k_m), (log_offset, log_slope) = take(2), take(2)

    if uncond is not None:
        x[1] = guide(x[1], uncond.to(compute), guidance, guidance_rescale)

    terms = list(zip(x, c, d, strict=True))
    if table.has_x0:
        x0 = k_x * x[0] + k_m * x[1]
        if clip is not None:
            x0 = x0.clamp(*clip)
        if threshold is not None:
            x0 = dynamic_threshold(x0, *threshold)
        terms.append((x0, c_x0, d_x0))
    if noise is None and seed is not None:
        streams = stream + (0 if step is None else step)
        noise = reference_normal(
            batch, like[0].numel() if batch and like.dim() else 1, seed, streams, offset, like.device
        )
        noise = noise.view(like.shape)
    if noise is not None:
        z = noise.to(compute)
        if log_variance is not None:
            z = z * torch.exp(log_offset + log_slope * log_variance.to(compute))
        terms.append((z, c_noise, d_noise))

    dtype = dtype or (out.dtype if out is not None else like.dtype)
    result = sum(t * a for t, a, _ in terms).to(dtype)
    if out is not None:
        second = sum(t * b for t, _, b in terms) if table.has_second else None
        result = out.copy_(result)
        return (result, second_out.copy_(second)) if table.has_second else result
    if not table.has_second:
        return result
    return result, sum(t * b for t, _, b in terms).to(second_out.dtype if second_out is not None else dtype)


def guide(cond: Tensor, uncond: Tensor, guidance: float | Tensor, rescale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022), then the rescaling of Lin et al. 2023, section 3.4.

    The ratio of standard deviations is 1 where the guided output is constant, so that nothing becomes NaN.
    """
    if isinstance(guidance, Tensor):
        guidance = guidance.to(cond.dtype).reshape(-1, *[1] * (cond.dim() - 1)) if cond.dim() else guidance.reshape(())
    guided = uncond + guidance * (cond - uncond)
    if rescale == 0.0:
        return guided
    dims = tuple(range(1, cond.dim()))
    std_cond, std_guided = (t.var(dim=dims, keepdim=True, correction=0).sqrt() for t in (cond, guided))
    ratio = torch.where(std_guided > 0, std_cond / std_guided, torch.ones_like(std_guided))
    return guided * (rescale * ratio + (1 - rescale))


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022): clip to the exact per-sample quantile s of |x0|, divide by s.

    s is kept within [1, maximum]. A sample with a NaN becomes NaN, as with ``torch.quantile``.
    """
    flat = x0.reshape(x0.shape[0], -1) if x0.dim() else x0.reshape(1, 1)
    if flat.numel() == 0:
        return x0
    below, weight = quantile_rank(ratio, flat.shape[1], x0.dtype)
    ordered = flat.abs().sort(dim=1).values
    s = torch.lerp(ordered[:, below], ordered[:, min(below + 1, flat.shape[1] - 1)], weight)
    s = torch.where(ordered[:, -1].isnan(), ordered[:, -1], s).clamp(1.0, maximum)
    s = s.view(-1, *[1] * (x0.dim() - 1)) if x0.dim() else s[0]
    return torch.minimum(torch.maximum(x0, -s), s) / s


def _rows(table: StepTable, step: int | Tensor | None) -> Tensor:
    if step is None:
        return table.data
    if isinstance(step, int):
        return table.data[step : step + 1]
    return table.data[step.reshape(-1)]
