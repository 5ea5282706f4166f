"""The samplers of EDM (Karras et al. 2022, arXiv:2206.00364) with fused steps, by their published names.

The state is float64, as published, and so is the arithmetic of the kernels; the network's output is read in the dtype
it has. A network is called as ``net(x, sigma, class_labels)``, with x float64 and sigma 0-d float64, and returns its
estimate of the clean sample. Its ``sigma_min``, ``sigma_max`` and ``round_sigma`` are honoured where it has them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genfast.dropin.tensors import plain
from genfast.ops.sampler_step import sampler_step
from genfast.step_table import StepTable

__all__ = ["ablation_sampler", "edm_sampler"]


class _Net:
    """A network with the attributes that it may lack."""

    def __init__(self, net, device):
        self.call, self.device = net, device
        self.low, self.high = getattr(net, "sigma_min", 0), getattr(net, "sigma_max", float("inf"))
        self.round = getattr(net, "round_sigma", None)

    def rounded(self, sigma: np.ndarray) -> np.ndarray:
        """Levels float64 as the network knows them; one copy to the device and back for all of them."""
        if self.round is None:
            return sigma
        return torch.as_tensor(self.round(torch.from_numpy(sigma).to(self.device))).detach().cpu().double().numpy()

    def __call__(self, x: Tensor, sigma: Tensor, class_labels) -> Tensor:
        return self.call(x, sigma, class_labels)


class _Steps:
    """Tables of a run, float64, on the state's device."""

    def __init__(self, device):
        self.device = device
        self.tables: dict[str, StepTable] = {}

    def table(self, name: str, *coefficients, noise=None, second=None, second_noise=None) -> None:
        parts = {
            "second": None if second is None else np.stack(second, 1),
            "noise": noise,
            "second_noise": second_noise,
        }
        given = {k: np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for k, v in parts.items() if v is not None}
        # Rows that are not finite belong to steps that do not use them: the last one has no second order.
        weights = np.nan_to_num(np.stack(coefficients, 1), nan=0.0, posinf=0.0, neginf=0.0)
        self.tables[name] = StepTable(weights, **given, device=self.device)

    def __call__(self, name: str, i: int, *inputs: Tensor, noise=None, seed=None):
        table = self.tables[name]
        if plain(*inputs, *([] if noise is None else [noise])):
            return sampler_step(inputs, table, step=i, noise=noise, seed=seed, dtype=torch.float64)
        if seed is not None:
            raise ValueError("in-kernel noise (seed=) needs a dense state without gradients; use randn_like here")
        row, n = table.data[i].tolist(), table.inputs
        pairs = [(row[:n], row[n + 1]), (row[n + 2 : 2 * n + 2], row[2 * n + 3])][: 1 + table.has_second]
        results = []
        for weights, of_noise in pairs:
            total = sum(c * t.to(torch.float64) for c, t in zip(weights, inputs))
            results.append(total if noise is None else total + of_noise * noise)
        return tuple(results) if table.has_second else results[0]


def _check_steps(num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")


def _fractions(num_steps: int) -> np.ndarray:
    """0 .. 1 in ``num_steps`` numbers; 0 alone for a single step."""
    return np.arange(num_steps, dtype=np.float64) / max(num_steps - 1, 1)


def _karras(sigma_min: float, sigma_max: float, rho: float, num_steps: int) -> np.ndarray:
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + _fractions(num_steps) * (low - high)) ** rho


def _churn(levels: np.ndarray, num_steps: int, S_churn, S_min, S_max) -> np.ndarray:
    gamma = min(S_churn / num_steps, np.sqrt(2) - 1)
    return np.where((S_min <= levels) & (levels <= S_max), gamma, 0.0)


def edm_sampler(
    net,
    latents: Tensor,
    class_labels=None,
    randn_like=torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Heun steps with churn: Algorithm 2 of the paper with sigma(t) = t and s(t) = 1.

    Args:
        net: ``net(x, sigma, class_labels)`` returns the clean sample's estimate, any floating dtype.
        latents: standard normal [B, ...], any floating dtype.
        class_labels: passed on to the network.
        randn_like: draws the noise of every step (also of those without churn, as published), float64.
        num_steps: N; the network is called 2 N - 1 times.
        sigma_min, sigma_max, rho: of the noise levels, within what the network supports.
        S_churn, S_min, S_max, S_noise: of the churn.
        seed: draw the noise inside the kernel instead (see ``genfast.random``); ``randn_like`` is then not called.

    Returns:
        float64 [B, ...].

    Raises:
        ValueError: ``num_steps`` is not a positive int.

    Source: Karras et al. 2022, Algorithm 2.
    """
    _check_steps(num_steps)
    wrapped = _Net(net, latents.device)
    sigma_min, sigma_max = max(sigma_min, wrapped.low), min(sigma_max, wrapped.high)
    t = wrapped.rounded(_karras(sigma_min, sigma_max, rho, num_steps))
    after = np.append(t[1:], 0.0)
    hat = wrapped.rounded(t + _churn(t, num_steps, S_churn, S_min, S_max) * t)

    steps = _Steps(latents.device)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (after - hat) / hat, (after - hat) / after
        churned = np.sqrt(np.maximum(hat**2 - t**2, 0))
    steps.table("churn", np.ones_like(t), noise=churned * S_noise)
    steps.table("euler", 1 + first, -first)
    steps.table("heun", 1 + first / 2, -first / 2, second / 2, -second / 2)
    hats, afters = (torch.from_numpy(v).to(latents.device) for v in (hat, after))

    x = latents.to(torch.float64) * float(t[0])
    for i in range(num_steps):
        noise = randn_like(x) if seed is None else None
        if churned[i] > 0:
            x = steps("churn", i, x, noise=noise, seed=seed)
        denoised = wrapped(x, hats[i], class_labels)
        x_next = steps("euler", i, x, denoised)
        if i < num_steps - 1:
            denoised_next = wrapped(x_next, afters[i], class_labels)
            x_next = steps("heun", i, x, denoised, x_next, denoised_next)
        x = x_next
    return x


# --- the general form ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _VP:
    """sigma(t) of the variance-preserving SDE, its derivative and inverse (Table 1)."""

    beta_d: float
    beta_min: float

    def sigma(self, t):
        return np.sqrt(np.exp(0.5 * self.beta_d * t**2 + self.beta_min * t) - 1)

    def derivative(self, t):
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def inverse(self, sigma):
        return (np.sqrt(self.beta_min**2 + 2 * self.beta_d * np.log(sigma**2 + 1)) - self.beta_min) / self.beta_d


class _VE:
    """sigma(t) = sqrt(t)."""

    sigma = staticmethod(np.sqrt)
    derivative = staticmethod(lambda t: 0.5 / np.sqrt(t))
    inverse = staticmethod(np.square)


class _Linear:
    """sigma(t) = t."""

    sigma = inverse = staticmethod(lambda t: t)
    derivative = staticmethod(np.ones_like)


def _iddpm_levels(M: int, C_1: float, C_2: float, sigma_min: float, sigma_max: float, num_steps: int) -> np.ndarray:
    """A choice of the levels u_j of improved DDPM within the limits (Table 1)."""

    def alpha_bar(j):
        return np.sin(0.5 * np.pi * j / M / (C_2 + 1)) ** 2

    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1)
    within = u[(u >= sigma_min) & (u <= sigma_max)]
    return within[np.round((len(within) - 1) * _fractions(num_steps)).astype(np.int64)]


_published = _VP(beta_d=19.1, beta_min=0.1)
LIMITS = {
    "vp": lambda eps_s: (float(_published.sigma(eps_s)), float(_published.sigma(1.0))),
    "ve": lambda _: (0.02, 100.0),
    "iddpm": lambda _: (0.002, 81.0),
    "edm": lambda _: (0.002, 80.0),
}
"""Default (sigma_min, sigma_max) of each discretization."""


def _checked(name: str, value: str, known) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    return value


def ablation_sampler(
    net,
    latents: Tensor,
    class_labels=None,
    randn_like=torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The general form of the paper: any schedule sigma(t), scaling s(t), discretization, and second-order method.

    Args:
        net, latents, class_labels, randn_like, num_steps, rho, S_churn, S_min, S_max, S_noise, seed: as for
            :func:`edm_sampler`.
        sigma_min, sigma_max: by default those of the discretization, see ``LIMITS``.
        solver: ``"euler"`` or ``"heun"``, the second-order method with parameter ``alpha``.
        discretization: of the levels: ``"vp"``, ``"ve"``, ``"iddpm"`` (C_1, C_2, M) or ``"edm"`` (rho).
        schedule: sigma(t): ``"vp"``, ``"ve"`` or ``"linear"``.
        scaling: s(t): ``"vp"`` or ``"none"``.
        epsilon_s: the smallest time of the vp discretization.
        alpha: where the second derivative is taken: 1 Heun, 1/2 midpoint, 2/3 Ralston.

    Returns:
        float64 [B, ...].

    Raises:
        ValueError: an unknown name, or ``num_steps`` is not a positive int.

    Source: Karras et al. 2022, Algorithms 1 and 2 and Table 1; the second-order method is its equation in appendix D.
    """
    _check_steps(num_steps)
    _checked("solver", solver, ("euler", "heun"))
    _checked("discretization", discretization, tuple(LIMITS))
    _checked("schedule", schedule, ("vp", "ve", "linear"))
    _checked("scaling", scaling, ("vp", "none"))
    wrapped = _Net(net, latents.device)
    low, high = LIMITS[discretization](epsilon_s)
    sigma_min = max(low if sigma_min is None else sigma_min, wrapped.low)
    sigma_max = min(high if sigma_max is None else sigma_max, wrapped.high)

    log_low, log_high = np.log(sigma_min**2 + 1), np.log(sigma_max**2 + 1)
    beta_d = 2 * (log_low / epsilon_s - log_high) / (epsilon_s - 1)
    vp = _VP(beta_d, log_high - 0.5 * beta_d)
    if discretization == "vp":
        levels = vp.sigma(1 + _fractions(num_steps) * (epsilon_s - 1))
    elif discretization == "ve":
        levels = np.sqrt(sigma_max**2 * (sigma_min**2 / sigma_max**2) ** _fractions(num_steps))
    elif discretization == "iddpm":
        levels = _iddpm_levels(M, C_1, C_2, sigma_min, sigma_max, num_steps)
    else:
        levels = _karras(sigma_min, sigma_max, rho, num_steps)

    path = {"vp": vp, "ve": _VE, "linear": _Linear}[schedule]
    scaled = scaling == "vp"

    def s(t):
        return 1 / np.sqrt(1 + path.sigma(t) ** 2) if scaled else np.ones_like(t)

    def slope(t):
        """(a, b) of dx/dt = a x + b denoised."""
        sigma, rate, size = path.sigma(t), path.derivative(t), s(t)
        return rate / sigma - (sigma * rate * size**2 if scaled else 0), -rate * size / sigma

    t = path.inverse(wrapped.rounded(levels))
    after = np.append(t[1:], 0.0)
    gamma = _churn(path.sigma(t), num_steps, S_churn, S_min, S_max)
    hat = path.inverse(wrapped.rounded(path.sigma(t) * (1 + gamma)))
    h = after - hat
    prime = hat + alpha * h

    steps = _Steps(latents.device)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        noise = np.sqrt(np.maximum(path.sigma(hat) ** 2 - path.sigma(t) ** 2, 0)) * S_noise
        a, b = slope(hat)
        a_prime, b_prime = slope(prime)
        keep, given = (1 - 1 / (2 * alpha)) * h, 1 / (2 * alpha) * h
        # Second outputs are what the network sees: x / s.
        steps.table("churn", s(hat) / s(t), noise=s(hat) * noise, second=[1 / s(t)], second_noise=noise)
        half = (1 + alpha * h * a, alpha * h * b)
        steps.table("prime", *half, second=[v / s(prime) for v in half])
        steps.table("euler", 1 + h * a, h * b)
        steps.table("second", 1 + keep * a, keep * b, given * a_prime, given * b_prime)
        primes = path.sigma(prime)
    on_device = functools.partial(torch.as_tensor, device=latents.device)
    hats, primes = on_device(path.sigma(hat)), on_device(np.nan_to_num(primes))

    x = latents.to(torch.float64) * float(path.sigma(t[:1])[0] * s(t[:1])[0])
    for i in range(num_steps):
        drawn = randn_like(x) if seed is None else None
        x, seen = steps("churn", i, x, noise=drawn, seed=seed)
        denoised = wrapped(seen if scaled else x, hats[i], class_labels)
        if solver == "euler" or i == num_steps - 1:
            x = steps("euler", i, x, denoised)
        else:
            x_prime, seen = steps("prime", i, x, denoised)
            denoised_prime = wrapped(seen if scaled else x_prime, primes[i], class_labels)
            x = steps("second", i, x, denoised, x_prime, denoised_prime)
    return x
