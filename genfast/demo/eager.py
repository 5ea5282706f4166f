"""The demo's samplers once more, as they are usually written: plain PyTorch operations, one readable loop each.

They follow the papers' formulas with Python floats, take the same nodes and draw the same noise in the same order as
the fused samplers, and so differ from them by rounding alone. ``a``, ``s`` are the levels before a step, ``a1``, ``s1``
after it; ``times`` are what the model is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Guided = Callable[[Tensor, Tensor], Tensor]


def guided(model, guidance: float) -> Guided:
    """Classifier-free guidance around a model that returns a pair."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(x, t)
        return unconditional + guidance * (conditional - unconditional)

    return call


def ddpm(model: Guided, x: Tensor, nodes, times, generator: torch.Generator) -> Tensor:
    """Ho et al. 2020: the posterior mean of a step, plus noise with its variance; v-prediction."""
    for (a, s), (a1, s1), t in zip(nodes, nodes[1:], times):
        x0 = a * x - s * model(x, t)
        beta = s**2 - (a / a1) ** 2 * s1**2
        mean = a1 * beta / s**2 * x0 + a / a1 * s1**2 / s**2 * x
        x = mean
        if s1 > 0:
            x = mean + math.sqrt(beta) * s1 / s * torch.randn(x.shape, generator=generator)
    return x


def ddim(model: Guided, x: Tensor, nodes, times, generator: torch.Generator) -> Tensor:
    """Song, Meng and Ermon 2021 with eta = 0; v-prediction."""
    for (a, s), (a1, s1), t in zip(nodes, nodes[1:], times):
        v = model(x, t)
        x0, eps = a * x - s * v, s * x + a * v
        x = a1 * x0 + s1 * eps
    return x


def edm_heun(model: Guided, x: Tensor, nodes, times, generator: torch.Generator) -> Tensor:
    """Karras et al. 2022, algorithm 1: Euler, then the trapezoidal rule; the model returns the denoised image."""
    for i, ((_, s), (_, s1)) in enumerate(pairwise(nodes)):
        slope = (x - model(x, times[i])) / s
        following = x + (s1 - s) * slope
        if s1 > 0:
            slope_after = (following - model(following, times[i + 1])) / s1
            following = x + (s1 - s) * (slope + slope_after) / 2
        x = following
    return x


def dpmpp_2m(model: Guided, x: Tensor, nodes, times, generator: torch.Generator) -> Tensor:
    """Lu et al. 2022, algorithm 2 (DPM-Solver++ 2M); v-prediction."""
    previous, h_previous = None, 0.0
    for (a, s), (a1, s1), t in zip(nodes, nodes[1:], times):
        x0 = a * x - s * model(x, t)
        h = math.log(a1 * s / (s1 * a)) if s1 > 0 else math.inf
        estimate = x0
        if previous is not None and s1 > 0:
            r = h_previous / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = s1 / s * x - a1 * math.expm1(-h) * estimate
        previous, h_previous = x0, h
    return x


def rectified_flow(model: Guided, x: Tensor, nodes, times, generator: torch.Generator) -> Tensor:
    """Liu et al. 2023: Euler steps along the velocity from data to noise."""
    for (_, s), (_, s1), t in zip(nodes, nodes[1:], times):
        x = x + (s1 - s) * model(x, t)
    return x
