"""Noise schedules: how much signal and how much noise there is at each time, x_t = alpha(t) x0 + sigma(t) eps.

===================== ============================== =============================== ================================
family                alpha, sigma                   time t, as the model sees it    source
===================== ============================== =============================== ================================
linear, scaled_linear sqrt(abar_t), sqrt(1 - abar_t) discrete timestep 0 .. T - 1    Ho et al. 2020; Rombach et al. 2022
cosine                the same, from a cosine        discrete timestep 0 .. T - 1    Nichol and Dhariwal 2021
vp, subvp, ve         closed forms                   t in [t_min, 1]                 Song et al. 2021
edm                   1, sigma                       sigma; ln(sigma) / 4 for "edm"  Karras et al. 2022
flow                  1 - t, t                       t in [0, 1]                     Lipman et al. 2023; Liu et al. 2023
===================== ============================== =============================== ================================

The ratio nu = sigma / alpha is the noise level of Karras et al.; every schedule here can be asked for the time at which
it reaches a ratio, which is what lets any spacing of noise levels be used with any schedule.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod

import numpy as np

from genfast._registry import export


class NoiseSchedule(ABC):
    """What a sampler asks of a noise schedule. Arrays and results are float64."""

    discrete = False
    spacing = "linspace"  # the default spacing of a sampler's steps
    unit_prior = True  # x_T has the variance alpha^2 + sigma^2 of unit data; else sigma^2

    def __init__(self, t_min: float, t_max: float, clean_time: float = 0.0):
        self.t_min, self.t_max, self.clean_time = t_min, t_max, clean_time

    @abstractmethod
    def alpha_sigma(self, t) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at times ``t``."""

    @abstractmethod
    def time_at(self, ratio) -> np.ndarray:
        """The time at which sigma / alpha equals ``ratio``."""

    def at_ratio(self, ratio) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma where sigma / alpha equals ``ratio``."""
        return self.alpha_sigma(self.time_at(ratio))

    @abstractmethod
    def rates(self, t: float) -> tuple[float, float]:
        """d alpha / dt and d sigma / dt at time ``t``."""

    def model_time(self, time: float, prediction: str) -> float:
        """The second argument of ``model(x, t)`` at a time of this schedule."""
        return time

    def ratio_range(self) -> tuple[float, float]:
        """sigma / alpha at the least and at the most noisy time; the latter is inf at zero terminal SNR."""
        alpha, sigma = self.alpha_sigma(np.array([self.t_min, self.t_max]))
        return tuple(_ratio(alpha, sigma).tolist())


class DiscreteVP(NoiseSchedule):
    """A table of T noise levels with alpha^2 + sigma^2 = 1; between timesteps ln(sigma / alpha) is linear."""

    discrete = True
    spacing = "trailing"

    def __init__(self, alphas_cumprod, zero_terminal_snr: bool = False):
        bar = np.array(alphas_cumprod, np.float64)
        if bar.ndim != 1 or len(bar) < 2 or not ((bar >= 0) & (bar < 1)).all() or not (np.diff(bar) < 0).all():
            raise ValueError("alphas_cumprod must hold at least two decreasing numbers in [0, 1)")
        root = np.sqrt(bar)
        if zero_terminal_snr:  # Lin et al. 2023, algorithm 1
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        super().__init__(0, len(bar) - 1, clean_time=-1)
        self.alphas, self.sigmas = root, np.sqrt(bar_complement(root))
        with np.errstate(divide="ignore"):
            self.log_ratios = np.log(self.sigmas) - np.log(root)

    @classmethod
    def from_betas(cls, betas, zero_terminal_snr: bool = False) -> DiscreteVP:
        return cls(np.cumprod(1 - np.asarray(betas, np.float64)), zero_terminal_snr)

    def alpha_sigma(self, t):
        t = np.asarray(t, np.float64)
        whole = np.rint(t).astype(int)
        if ((t < 0) | (t > self.t_max)).any():
            raise ValueError(f"timesteps must lie in [0, {self.t_max}]; got {t.min():g} .. {t.max():g}")
        alpha, sigma = self.at_ratio(np.exp(self._log_ratio(t)))
        exact = t == whole
        return np.where(exact, self.alphas[whole], alpha), np.where(exact, self.sigmas[whole], sigma)

    def _log_ratio(self, t):
        if np.isfinite(self.log_ratios[-1]):
            return np.interp(t, np.arange(len(self.log_ratios)), self.log_ratios)
        # Above the last finite level the logarithm has nowhere to go but infinity: half-way points stay on that level.
        finite = np.interp(t, np.arange(len(self.log_ratios) - 1), self.log_ratios[:-1])
        return np.where(np.asarray(t) == self.t_max, np.inf, finite)

    def time_at(self, ratio):
        finite = self.log_ratios[np.isfinite(self.log_ratios)]
        with np.errstate(divide="ignore"):
            return np.interp(np.log(ratio), finite, np.arange(len(finite)))

    def at_ratio(self, ratio):
        ratio = np.asarray(ratio, np.float64)
        with np.errstate(invalid="ignore"):
            alpha = 1 / np.hypot(1, ratio)
            return alpha, np.where(np.isinf(ratio), 1.0, alpha * ratio)

    def rates(self, t):
        k = int(np.clip(math.floor(t), 0, len(self.log_ratios) - 2))
        slope = self.log_ratios[k + 1] - self.log_ratios[k]
        if not np.isfinite(slope):
            raise ValueError(
                "a zero terminal SNR schedule has no finite rate of change at its last timestep: start lower"
            )
        (alpha,), (sigma,) = self.alpha_sigma(np.array([t]))
        # d sigma = alpha^2 sigma d(ln nu) and d alpha = -sigma^2 alpha d(ln nu), as alpha^2 + sigma^2 = 1
        return -slope * sigma**2 * alpha, slope * alpha**2 * sigma


class VP(NoiseSchedule):
    """Variance preserving SDE with beta(t) linear: alpha = exp(-B/2), B = t beta_min + t^2 (beta_max - beta_min)/2."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3):
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min and beta_max must satisfy 0 < beta_min < beta_max; got {beta_min}, {beta_max}")
        super().__init__(t_min, 1.0)
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def integral(self, t):
        return self.beta_min * t + self.slope * t**2 / 2

    def time_of_integral(self, b):
        return 2 * b / (self.beta_min + np.sqrt(self.beta_min**2 + 2 * self.slope * b))

    def beta(self, t):
        return self.beta_min + self.slope * t

    def alpha_sigma(self, t):
        b = self.integral(np.asarray(t, np.float64))
        return np.exp(-b / 2), np.sqrt(-np.expm1(-b))

    def time_at(self, ratio):
        return self.time_of_integral(np.log1p(np.asarray(ratio, np.float64) ** 2))

    def rates(self, t):
        alpha, sigma = self.alpha_sigma(t)
        return -self.beta(t) * alpha / 2, self.beta(t) * alpha**2 / (2 * sigma)


class SubVP(VP):
    """Sub-variance-preserving SDE: the same alpha, sigma = 1 - alpha^2."""

    def alpha_sigma(self, t):
        b = self.integral(np.asarray(t, np.float64))
        return np.exp(-b / 2), -np.expm1(-b)

    def time_at(self, ratio):
        # (1 - alpha^2) / alpha = ratio, so alpha = 2 / (ratio + sqrt(ratio^2 + 4)) and B = 2 asinh(ratio / 2)
        return self.time_of_integral(2 * np.arcsinh(np.asarray(ratio, np.float64) / 2))

    def rates(self, t):
        alpha, _ = self.alpha_sigma(t)
        return -self.beta(t) * alpha / 2, self.beta(t) * alpha**2


class VE(NoiseSchedule):
    """Variance exploding SDE: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t."""

    unit_prior = False

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-5):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max; got {sigma_min}, {sigma_max}"
            )
        super().__init__(t_min, 1.0)
        self.sigma_min, self.log_range = sigma_min, math.log(sigma_max / sigma_min)

    def alpha_sigma(self, t):
        t = np.asarray(t, np.float64)
        return np.ones_like(t), self.sigma_min * np.exp(self.log_range * t)

    def time_at(self, ratio):
        return np.log(np.asarray(ratio, np.float64) / self.sigma_min) / self.log_range

    def at_ratio(self, ratio):
        ratio = np.asarray(ratio, np.float64)
        return np.ones_like(ratio), ratio

    def rates(self, t):
        return 0.0, self.log_range * self.sigma_min * math.exp(self.log_range * t)


class EDM(NoiseSchedule):
    """Elucidated diffusion: alpha = 1 and time is the noise level sigma itself, from sigma_max down to sigma_min."""

    spacing = "karras"
    unit_prior = False

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max; got {sigma_min}, {sigma_max}"
            )
        super().__init__(sigma_min, sigma_max)

    def alpha_sigma(self, t):
        t = np.asarray(t, np.float64)
        return np.ones_like(t), t

    def time_at(self, ratio):
        return np.asarray(ratio, np.float64)

    def rates(self, t):
        return 0.0, 1.0

    def model_time(self, time, prediction):
        return math.log(time) / 4 if prediction == "edm" else time


class Flow(NoiseSchedule):
    """Rectified flow: alpha = 1 - t, sigma = t. ``shift`` k moves a sampler's times, t <- k t / (1 + (k - 1) t)."""

    spacing = "trailing"
    unit_prior = False

    def __init__(self, shift: float = 1.0, t_min: float = 1e-3):
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        super().__init__(t_min, 1.0)
        self.shift = shift

    def alpha_sigma(self, t):
        t = np.asarray(t, np.float64)
        return 1 - t, t

    def time_at(self, ratio):
        ratio = np.asarray(ratio, np.float64)
        with np.errstate(divide="ignore"):
            return np.where(np.isinf(ratio), 1.0, 1 / (1 + 1 / ratio))

    def at_ratio(self, ratio):
        t = self.time_at(ratio)
        return np.where(np.isinf(ratio), 0.0, 1 / (1 + np.asarray(ratio, np.float64))), t

    def rates(self, t):
        return -1.0, 1.0


def bar_complement(root: np.ndarray) -> np.ndarray:
    """1 - root^2 without cancellation near 1."""
    return (1 - root) * (1 + root)


def _ratio(alpha, sigma):
    with np.errstate(divide="ignore"):
        return sigma / alpha


def _linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False):
    return DiscreteVP.from_betas(np.linspace(beta_start, beta_end, timesteps), zero_terminal_snr)


def _scaled_linear(
    timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, zero_terminal_snr: bool = False
):
    return DiscreteVP.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2, zero_terminal_snr)


def _cosine(timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999, zero_terminal_snr: bool = False):
    bar = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return DiscreteVP.from_betas(np.minimum(1 - bar[1:] / bar[:-1], max_beta), zero_terminal_snr)


SCHEDULES = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "alphas_cumprod": DiscreteVP,
    "betas": DiscreteVP.from_betas,
    "vp": VP,
    "subvp": SubVP,
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
}


@export("samplers")
def noise_schedule(name: str, **options) -> NoiseSchedule:
    """A noise schedule by name, for :class:`genfast.Sampler`: x_t = alpha(t) x0 + sigma(t) eps.

    ======================================= ==========================================================================
    name                                    options (and their defaults)
    ======================================= ==========================================================================
    ``linear``                              timesteps (1000), beta_start (1e-4), beta_end (0.02), zero_terminal_snr
    ``scaled_linear``                       timesteps (1000), beta_start (0.00085), beta_end (0.012), zero_terminal_snr
    ``cosine``                              timesteps (1000), s (0.008), max_beta (0.999), zero_terminal_snr
    ``betas``, ``alphas_cumprod``           the array of that name, zero_terminal_snr
    ``vp``, ``subvp``                       beta_min (0.1), beta_max (20), t_min (1e-3)
    ``ve``                                  sigma_min (0.01), sigma_max (50), t_min (1e-5)
    ``edm``                                 sigma_min (0.002), sigma_max (80)
    ``flow``                                shift (1), t_min (1e-3, where adaptive integration stops)
    ======================================= ==========================================================================

    The first five have discrete timesteps 0 .. T - 1; ``zero_terminal_snr`` rescales them so that nothing of the data
    is left at the last one (Lin et al. 2023). The model is called with the schedule's time: a discrete timestep, t in
    [0, 1], or for ``edm`` the noise level sigma (ln(sigma) / 4 when the model predicts ``"edm"``).

    Raises:
        ValueError: an unknown name, an option that the schedule does not have, or a value out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}")
    make = SCHEDULES[name]
    if name in ("betas", "alphas_cumprod") and name not in options:
        raise ValueError(f"schedule {name!r} needs the array {name}=")
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"schedule {name!r} has no option {option!r}; it has {', '.join(known)}")
    return make(**options)
