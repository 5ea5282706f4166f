"""Where a sampler puts its N steps on a noise schedule: N times, or N noise levels nu = sigma / alpha."""

from __future__ import annotations

import inspect

import numpy as np

from genfast.samplers.schedules import Flow, NoiseSchedule


def linspace(schedule: NoiseSchedule, n: int):
    """Even in time, from the noisiest time to the least noisy one."""
    t = np.linspace(schedule.t_max, schedule.t_min, n)
    return "time", np.rint(t) if schedule.discrete else t


def leading(schedule: NoiseSchedule, n: int, *, steps_offset: int = 0):
    """Even in time, each step at the start of its interval: the noisiest time is left out."""
    if schedule.discrete:
        return "time", np.arange(n - 1, -1, -1.0) * (len(schedule.alphas) // n) + steps_offset
    if steps_offset:
        raise ValueError("steps_offset counts discrete timesteps; this schedule's time is continuous")
    return "time", schedule.t_min + (schedule.t_max - schedule.t_min) * np.arange(n - 1, -1, -1) / n


def trailing(schedule: NoiseSchedule, n: int):
    """Even in time, each step at the end of its interval: the noisiest time is where it starts (Lin et al. 2023)."""
    if schedule.discrete:
        count = len(schedule.alphas)
        return "time", np.rint(count * np.arange(n, 0, -1) / n) - 1
    return "time", schedule.t_max * np.arange(n, 0, -1) / n


def consistency(schedule: NoiseSchedule, n: int, *, original_steps: int = 50):
    """Even among the ``original_steps`` times of a latent consistency model's training (Luo et al. 2023)."""
    if n > original_steps:
        raise ValueError(f"spacing 'consistency' takes at most original_steps = {original_steps} steps; got {n}")
    kept = np.arange(n) * original_steps // n
    if schedule.discrete:
        return "time", (np.arange(original_steps, 0, -1.0) * (len(schedule.alphas) // original_steps) - 1)[kept]
    return "time", (schedule.t_max * np.arange(original_steps, 0, -1) / original_steps)[kept]


def karras(schedule: NoiseSchedule, n: int, *, rho: float = 7.0, sigma_min=None, sigma_max=None):
    """Even in nu^(1/rho) (Karras et al. 2022, equation 5)."""
    low, high = _limits(schedule, "karras", sigma_min, sigma_max)
    return "ratio", np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho


def exponential(schedule: NoiseSchedule, n: int, *, sigma_min=None, sigma_max=None):
    """Even in ln nu, which is even in the log signal-to-noise ratio (Lu et al. 2022)."""
    low, high = _limits(schedule, "exponential", sigma_min, sigma_max)
    return "ratio", np.exp(np.linspace(np.log(high), np.log(low), n))


def beta(schedule: NoiseSchedule, n: int, *, a: float = 0.6, b: float = 0.6, sigma_min=None, sigma_max=None):
    """At the quantiles of a beta distribution over [sigma_min, sigma_max] (Lee et al. 2024). Needs scipy."""
    try:
        from scipy.special import betaincinv
    except ImportError:
        raise ImportError(
            "spacing 'beta' needs scipy, for the beta distribution's quantiles: pip install scipy"
        ) from None
    low, high = _limits(schedule, "beta", sigma_min, sigma_max)
    return "ratio", low + (high - low) * betaincinv(a, b, 1 - np.linspace(0, 1, n))


SPACINGS = {f.__name__: f for f in (linspace, leading, trailing, consistency, karras, exponential, beta)}
INCLUSIVE = ("linspace", "leading", "karras", "exponential", "beta")
"""Spacings whose last point is the schedule's least noisy level."""


def space(schedule: NoiseSchedule, n: int, name: str, **options) -> tuple[str, np.ndarray]:
    """N falling values and what they are, ``"time"`` or ``"ratio"``; a flow schedule's shift is applied here."""
    if name not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}; got {name!r}")
    known = list(inspect.signature(SPACINGS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise ValueError(f"spacing {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    if schedule.discrete and n > len(schedule.alphas):
        raise ValueError(f"steps is {n}, but the schedule has only {len(schedule.alphas)} timesteps")
    kind, values = SPACINGS[name](schedule, n, **options)
    if isinstance(schedule, Flow):
        # t <- k t / (1 + (k - 1) t) is nu <- k nu
        k = schedule.shift
        values = k * values if kind == "ratio" else k * values / (1 + (k - 1) * values)
    return kind, values


def _limits(schedule: NoiseSchedule, name: str, sigma_min, sigma_max) -> tuple[float, float]:
    low, high = schedule.ratio_range()
    low, high = (default if given is None else float(given) for default, given in ((low, sigma_min), (high, sigma_max)))
    if not np.isfinite(high):
        raise ValueError(
            f"spacing {name!r} works on sigma / alpha, which is infinite at this schedule's end (no signal is left "
            "there): give sigma_max, or take linspace or trailing"
        )
    if not 0 < low < high:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max; got {low:g}, {high:g}")
    return low, high
