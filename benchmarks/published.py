"""The samplers' published arithmetic, written out in eager PyTorch, one tensor operation after the other.

In float32 this is the peer that anyone would write; in float64 it is the oracle for genfast and for the other peers.
Coefficients are Python floats. A level is (alpha, sigma) with x_t = alpha x0 + sigma eps; a loop over N steps has N + 1
levels, the last one (1, 0). ``outputs(k)`` is the model's k-th output (here always a prediction of eps, or x0 where the
docstring says so).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Levels = Sequence[tuple[float, float]]
Outputs = Callable[[int], Tensor]


def linear_levels(timesteps: Iterable[int], start: float = 1e-4, end: float = 0.02, train: int = 1000) -> Levels:
    """(alpha, sigma) at the timesteps of the linear schedule of Ho et al. 2020, and (1, 0) after them, in float64."""
    signal = np.cumprod(1 - np.linspace(start, end, train))
    return [(math.sqrt(signal[t]), math.sqrt(1 - signal[t])) for t in timesteps] + [(1.0, 0.0)]


def ddim_step(x: Tensor, eps: Tensor, a: float, s: float, a_next: float, s_next: float, clip: float | None) -> Tensor:
    """Song et al. 2021, equation 12 with eta = 0. Where x0 is clipped, eps is what leads from it to x."""
    x0 = (x - s * eps) / a
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        eps = (x - a * x0) / s
    return a_next * x0 + s_next * eps


def ddim_loop(x: Tensor, outputs: Outputs, levels: Levels, clip: float | None = None) -> Tensor:
    """DDIM with eta = 0."""
    for k in range(len(levels) - 1):
        x = ddim_step(x, outputs(k), *levels[k], *levels[k + 1], clip)
    return x


def ddpm_loop(
    x: Tensor, outputs: Outputs, levels: Levels, noise: Callable[[int], Tensor], clip: float | None = None
) -> Tensor:
    """Ho et al. 2020, equations 6 and 7, variance fixed small, on a sub-sequence of the timesteps."""
    for k in range(len(levels) - 1):
        (a, s), (a_next, s_next) = levels[k], levels[k + 1]
        alpha = (a / a_next) ** 2
        x0 = (x - s * outputs(k)) / a
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        x = a_next * (1 - alpha) / s**2 * x0 + math.sqrt(alpha) * s_next**2 / s**2 * x
        if s_next > 0:
            x = x + math.sqrt((1 - alpha) * s_next**2 / s**2) * noise(k)
    return x


def euler_loop(x: Tensor, outputs: Outputs, levels: Levels) -> Tensor:
    """Euler's method on dx/dsigma = eps with sigma = s / a (Karras et al. 2022, algorithm 1 without the correction)."""
    for k in range(len(levels) - 1):
        (a, s), (a_next, s_next) = levels[k], levels[k + 1]
        x = x + outputs(k) * (s_next / a_next - s / a)
    return x


def dpmpp_2m_loop(x: Tensor, outputs: Outputs, levels: Levels) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2); first order at the first step and at the last."""
    steps, before = len(levels) - 1, None
    for k in range(steps):
        (a, s), (a_next, s_next) = levels[k], levels[k + 1]
        x0 = (x - s * outputs(k)) / a
        h = _half_log_snr(levels[k + 1]) - _half_log_snr(levels[k])
        data = x0
        if before is not None and k < steps - 1:
            r = (_half_log_snr(levels[k]) - _half_log_snr(levels[k - 1])) / h
            data = x0 + (x0 - before) / (2 * r)
        x = (s_next / s) * x - a_next * math.expm1(-h) * data
        before = x0
    return x


def unipc_loop(x: Tensor, outputs: Outputs, levels: Levels) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 and data prediction (Zhao et al. 2023); the last predictor is of order 1."""
    steps, history, last, order = len(levels) - 1, [], x, 0
    for k in range(steps):
        (a, s), lam = levels[k], _half_log_snr(levels[k])
        x0 = (x - s * outputs(k)) / a
        if k > 0:
            s_last = levels[k - 1][1]
            lam_last = _half_log_snr(levels[k - 1])
            h = lam - lam_last
            growth = math.expm1(-h)
            change = x0 - history[-1]
            if order == 1:
                correction = 0.5 * change
            else:
                r = (_half_log_snr(levels[k - 2]) - lam_last) / h
                b1 = (growth / -h - 1) / growth
                b2 = ((growth / -h - 1) / -h - 0.5) * 2 / growth
                w_old, w_new = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [b1, b2])
                correction = w_old * ((history[-2] - history[-1]) / r) + w_new * change
            x = (s / s_last) * last - a * growth * history[-1] - a * growth * correction
        a_next, s_next = levels[k + 1]
        h = _half_log_snr(levels[k + 1]) - lam
        growth = math.expm1(-h)
        order = min(2, k + 1, steps - k)
        following = (s_next / s) * x - a_next * growth * x0
        if order == 2:
            r = (_half_log_snr(levels[k - 1]) - lam) / h
            following = following - a_next * growth * 0.5 * ((history[-1] - x0) / r)
        history, last, x = [*history[-1:], x0], x, following
    return x


def edm_sigmas(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> list[float]:
    """The noise levels of Karras et al. 2022, equation 5, and 0 after them."""
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
    return [*ramp.tolist(), 0.0]


def edm_heun_loop(
    x: Tensor, network: Callable[[int, Tensor], Tensor], sigmas: Sequence[float], sigma_data: float = 0.5
) -> Tensor:
    """Heun's method without churn on a preconditioned network (Karras et al. 2022, algorithm 1 and table 1).

    ``network(k, scaled)`` is the k-th of 2 N - 1 evaluations of the raw network, on the input scaled by c_in.
    """
    calls = itertools.count()

    def denoised(x, sigma):
        total = sigma**2 + sigma_data**2
        raw = network(next(calls), x / math.sqrt(total))
        return sigma_data**2 / total * x + sigma * sigma_data / math.sqrt(total) * raw

    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - denoised(x, sigma)) / sigma
        x_next = x + (following - sigma) * slope
        if following > 0:
            slope_next = (x_next - denoised(x_next, following)) / following
            x_next = x + (following - sigma) * (0.5 * slope + 0.5 * slope_next)
        x = x_next
    return x


def guided_ddim_step(
    x: Tensor, cond: Tensor, uncond: Tensor, guidance: float, rescale: float, levels: Sequence[float]
) -> Tensor:
    """Classifier-free guidance, its rescaling (Lin et al. 2023, section 3.4), then a DDIM step."""
    guided = uncond + guidance * (cond - uncond)
    dims = list(range(1, cond.dim()))
    matched = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    eps = rescale * matched + (1 - rescale) * guided
    return ddim_step(x, eps, *levels, None)


def thresholded_ddim_step(x: Tensor, eps: Tensor, levels: Sequence[float], ratio: float, maximum: float) -> Tensor:
    """Dynamic thresholding of x0 (Saharia et al. 2022) by ``torch.quantile``, then a DDIM step."""
    a, s, a_next, s_next = levels
    x0 = (x - s * eps) / a
    bound = torch.quantile(x0.reshape(x0.shape[0], -1).abs(), ratio, dim=1).clamp(1.0, maximum)
    bound = bound.view(-1, *[1] * (x.dim() - 1))
    x0 = torch.maximum(torch.minimum(x0, bound), -bound) / bound
    return a_next * x0 + s_next * eps


def _half_log_snr(level: tuple[float, float]) -> float:
    alpha, sigma = level
    return math.inf if sigma == 0 else math.log(alpha / sigma)
