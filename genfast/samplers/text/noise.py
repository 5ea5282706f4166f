"""How much noise there is at a time: sigma(t) and its derivative, for t from 0 (text) to 1 (noise).

A token has been replaced by time t with probability 1 - exp(-sigma(t)). A schedule is anything that answers
``noise(t)`` with (sigma, dsigma/dt), tensors like t; those of SEDD's and MDLM's published code do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genfast._registry import export


@export("samplers")
class LogLinearNoise:
    """sigma(t) = -log(1 - (1 - eps) t): a token has been replaced by time t with probability (1 - eps) t.

    Source: SEDD (arXiv:2310.16834), MDLM (arXiv:2406.07524).
    """

    def __init__(self, eps: float = 1e-3):
        if not 0 < eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {eps}")
        self.eps = eps

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        most = 1 - self.eps
        return -torch.log1p(-most * t), most / (1 - most * t)


@export("samplers")
class GeometricNoise:
    """sigma(t) = sigma_min^(1 - t) sigma_max^t, as SEDD uses it on the uniform graph.

    Source: SEDD (arXiv:2310.16834).
    """

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 1.0):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        growth = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(growth * t)
        return sigma, sigma * growth


NOISES = {"loglinear": LogLinearNoise, "geometric": GeometricNoise}


def find_noise(noise: str | Callable) -> Callable:
    """The schedule of a name, or the one given."""
    if isinstance(noise, str):
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, or a schedule; got {noise!r}")
        return NOISES[noise]()
    if not callable(noise):
        raise TypeError(f"noise must be a name or answer noise(t) with (sigma, rate), got {type(noise).__name__}")
    return noise


def move_chance(sigma: Tensor) -> Tensor:
    """The probability of having been replaced at noise sigma."""
    return -torch.expm1(-sigma)


class Levels(NamedTuple):
    """A schedule at steps + 1 even times from 1 down to ``eps``, float64 [steps + 1]."""

    sigma: Tensor
    rate: Tensor
    step: float
    """The difference of two times."""

    @property
    def stay(self) -> list[float]:
        """[steps]: the probability that what is noise before a step still is after it, m(s) / m(t)."""
        m = move_chance(self.sigma)
        return torch.where(m[:-1] > 0, m[1:] / m[:-1], 0.0).clamp(0, 1).tolist()


def levels(noise: str | Callable, steps: int, eps: float) -> Levels:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive whole number, got {steps!r}")
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    sigma, rate = find_noise(noise)(torch.linspace(1, eps, steps + 1, dtype=torch.float64))
    return Levels(sigma.detach().double(), rate.detach().double(), (1 - eps) / steps)
