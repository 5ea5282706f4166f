"""The samplers of k-diffusion (``k_diffusion.sampling``) with fused steps, by their own names and signatures.

``x_t = x0 + sigma eps``; a model is called as ``model(x, sigma * ones, **extra_args)`` and returns its estimate of x0.
The levels are read to the host once per call and the coefficients of the whole run made there, in the dtype of the
levels and with the peer's operators; a step is then one kernel call, without a synchronisation. Random numbers are the
peer's: drawn in the same order, in the sample's dtype, by ``torch.randn_like`` or by the noise sampler given.
Stochastic samplers also take ``seed=``: noise drawn inside the kernel, in place of ``noise_sampler``.

A half-precision sample becomes float32 in the samplers that go along the derivative, as in the peer: there the level
has dimensions, so that it takes part in the promotion of dtypes.

Source: Crowson, k-diffusion; Karras et al. 2022 (arXiv:2206.00364), Lu et al. 2022 (arXiv:2206.00927, 2211.01095).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

from genfast.dropin.adams import adams_weights
from genfast.dropin.tensors import plain, promoted
from genfast.ops.sampler_step import sampler_step
from genfast.step_table import MAX_INPUTS, StepTable

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "DPMSolver",
    "PIDStepSizeController",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "linear_multistep_coeff",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]
REPLACEMENTS = tuple(name for name in __all__ if name.startswith("sample_"))
SECOND_DRAW = 2**31
"""Start of the streams of in-kernel noise for the second draw of a step."""


@functools.cache  # once ours are in their place, theirs are to be found here alone
def replacements() -> list[tuple[object, object]]:
    """(theirs, ours) for every sampler."""
    from k_diffusion import sampling

    return [(getattr(sampling, name), globals()[name]) for name in REPLACEMENTS]


# --- schedules and scalars -------------------------------------------------------------------------------------------


def append_zero(x: Tensor) -> Tensor:
    """The levels [n] with a 0 at the end, [n + 1]."""
    return torch.cat([x, x.new_zeros([1])])


def get_sigmas_karras(n: int, sigma_min, sigma_max, rho: float = 7.0, device="cpu") -> Tensor:
    """n levels from sigma_max to sigma_min, evenly spaced in sigma^(1 / rho), and 0 (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return append_zero((high + ramp * (low - high)) ** rho).to(device)


def get_sigmas_exponential(n: int, sigma_min, sigma_max, device="cpu") -> Tensor:
    """n levels from sigma_max to sigma_min, evenly spaced in log sigma, and 0."""
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(n: int, sigma_min, sigma_max, rho: float = 1.0, device="cpu") -> Tensor:
    """n levels from sigma_max to sigma_min, polynomial of degree rho in log sigma, and 0."""
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero(torch.exp(ramp * (math.log(sigma_max) - math.log(sigma_min)) + math.log(sigma_min)))


def get_sigmas_vp(n: int, beta_d=19.9, beta_min=0.1, eps_s=1e-3, device="cpu") -> Tensor:
    """n levels of the continuous variance-preserving schedule, and 0 (Song et al. 2021)."""
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The derivative of the probability-flow ODE: (x - denoised) / sigma; ``sigma`` 0-d or [B]."""
    sigma = sigma[(...,) + (None,) * (x.ndim - sigma.ndim)]
    return (x - denoised) / sigma


def get_ancestral_step(sigma_from, sigma_to, eta: float = 1.0):
    """(sigma_down, sigma_up): the level to step down to, and the noise to add to arrive at ``sigma_to``."""
    if not eta:
        return sigma_to, 0.0
    up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def _ancestral(sigma_from: Tensor, sigma_to: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """:func:`get_ancestral_step` of many steps at once."""
    if not eta:
        return sigma_to, torch.zeros_like(sigma_to)
    up = torch.minimum(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def linear_multistep_coeff(order: int, t, i: int, j: int) -> float:
    """The integral over [t_i, t_i+1] of the Lagrange polynomial of point t_i-j among t_i .. t_i-order+1, exactly.

    Raises:
        ValueError: there are fewer than ``order`` points before t_i+1.
    """
    if order - 1 > i:
        raise ValueError(f"Order {order} too high for step {i}")
    points = np.asarray([float(v) for v in t[i - order + 1 : i + 2]])
    return float(adams_weights(points, order)[-1, j])


# --- noise -----------------------------------------------------------------------------------------------------------


def default_noise_sampler(x: Tensor):
    """``f(sigma, sigma_next)`` that draws ``torch.randn_like(x)``."""
    return lambda sigma, sigma_next: torch.randn_like(x)


def _torchsde():
    try:
        import torchsde
    except ImportError:
        raise ImportError("Brownian noise needs the package torchsde (`pip install torchsde`)") from None
    return torchsde


class BatchedBrownianTree:
    """Brownian motion W(t1) - W(t0) over trees of torchsde: one for a batch, or one per sample.

    Args:
        x: its shape, dtype and device are those of the increments.
        t0, t1: the interval, in any order.
        seed: an int, or a list of B ints with one tree per sample; drawn from torch's generator by default.
        kwargs: of ``torchsde.BrownianTree``.
    """

    def __init__(self, x: Tensor, t0, t1, seed=None, **kwargs):
        t0, t1, self.sign = self.sort(t0, t1)
        w0 = kwargs.pop("w0", torch.zeros_like(x))
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, []).item()
        self.batched = hasattr(seed, "__len__")
        if self.batched:
            assert len(seed) == x.shape[0]
            w0 = w0[0]
        tree = _torchsde().BrownianTree
        self.trees = [tree(t0, w0, t1, entropy=s, **kwargs) for s in (seed if self.batched else [seed])]

    @staticmethod
    def sort(a, b):
        return (a, b, 1) if a < b else (b, a, -1)

    def __call__(self, t0, t1) -> Tensor:
        t0, t1, sign = self.sort(t0, t1)
        w = torch.stack([tree(t0, t1) for tree in self.trees]) * (self.sign * sign)
        return w if self.batched else w[0]


class BrownianTreeNoiseSampler:
    """``f(sigma, sigma_next)``: increments of one Brownian path, of unit variance, so that a run of any number of steps
    follows the same path.

    Args:
        x: its shape, dtype and device are those of the noise.
        sigma_min, sigma_max: the ends of the path.
        seed: as for :class:`BatchedBrownianTree`.
        transform: from sigma to the time of the path.
    """

    def __init__(self, x: Tensor, sigma_min, sigma_max, seed=None, transform=lambda x: x):
        self.transform = transform
        t0, t1 = (transform(torch.as_tensor(s)) for s in (sigma_min, sigma_max))
        self.tree = BatchedBrownianTree(x, t0, t1, seed)

    def __call__(self, sigma, sigma_next) -> Tensor:
        t0, t1 = (self.transform(torch.as_tensor(s)) for s in (sigma, sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()


# --- the frame of a run ----------------------------------------------------------------------------------------------


def _progress(steps: int, disable):
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(steps)
    return trange(steps, disable=disable)


class _Run:
    """Levels on the host and, ready for the model, on the device; tables on the device; one source of noise."""

    def __init__(self, model, x: Tensor, sigmas: Tensor, extra_args, callback, noise_sampler=None, seed=None):
        if seed is not None and noise_sampler is not None:
            raise ValueError("seed and noise_sampler exclude each other: give one source of noise")
        self.model, self.callback, self.seed = model, callback, seed
        self.extra_args = {} if extra_args is None else extra_args
        self.sigmas, self.batch, self.like = sigmas, x.shape[0], x
        self.host = sigmas.detach().cpu()
        self.now, self.after = self.host[:-1], self.host[1:]
        self.ends = (self.after == 0).tolist()
        self.tables: dict[str, StepTable] = {}
        self.by_derivative: set[str] = set()
        self.noise_sampler = noise_sampler

    def on_device(self, levels: Tensor) -> Tensor:
        return levels.to(self.sigmas.device)

    def for_model(self, levels: Tensor) -> Tensor:
        """[steps, B] in the sample's dtype: what the model is given, for every step."""
        return levels.to(self.like.device, self.like.dtype)[:, None].repeat(1, self.batch)

    def table(self, name: str, *coefficients, noise=None, second=None, derivative: bool = False) -> None:
        """Coefficients per input, each [steps]; rows that are not finite belong to steps that do not use them.

        ``derivative``: the peer goes by ``to_d``, in which the dtype of the levels counts.
        """
        if derivative:
            self.by_derivative.add(name)
        weights = torch.stack([c.double() for c in coefficients], 1)
        extra = {} if noise is None else {"noise": noise.double()}
        if second is not None:
            extra["second"] = torch.stack([c.double() for c in second], 1)
        clean = {k: torch.where(v.isfinite(), v, 0.0) for k, v in extra.items()}
        self.tables[name] = StepTable(torch.where(weights.isfinite(), weights, 0.0), **clean).to(self.like.device)

    def step(self, name: str, i: int, *inputs: Tensor, noise=None, seeded: bool = False, stream: int = 0):
        """The row i of a table applied to tensors; two tensors if the table has a second output."""
        table = self.tables[name]
        seed = self.seed if seeded and table.has_noise else None
        noise = noise if table.has_noise else None
        tensors = inputs if noise is None else (*inputs, noise)
        dtype = promoted(*tensors, self.sigmas) if name in self.by_derivative else promoted(*tensors)
        if plain(*tensors):
            return sampler_step(inputs, table, step=i, noise=noise, seed=seed, stream=stream, dtype=dtype)
        if seed is not None:
            raise ValueError("in-kernel noise (seed=) needs dense tensors of one shape; use noise_sampler here")
        return _eagerly(table, i, [t.to(dtype) for t in inputs], noise)

    def noise(self, sigma, sigma_next):
        """The noise sampler's draw, or None where the kernel draws."""
        if self.seed is not None:
            return None
        if self.noise_sampler is None:
            return torch.randn_like(self.like)
        return self.noise_sampler(sigma, sigma_next)

    def brownian(self) -> None:
        """Noise along a Brownian path, unless another source was given."""
        if self.seed is None and self.noise_sampler is None:
            low, high = self.on_device(torch.stack([self.host[self.host > 0].min(), self.host.max()]))
            self.noise_sampler = BrownianTreeNoiseSampler(self.like, low, high)

    def tell(self, x, i, sigma_hat, denoised) -> None:
        if self.callback is not None:
            sigma = self.sigmas[i]
            self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})

    # Rows that many samplers share.

    def euler_tables(self, now: Tensor, after: Tensor, noise=None, name: str = "euler") -> None:
        """x + (after - now) (x - denoised) / now, of (x, denoised)."""
        ratio = (after - now).double() / now.double()
        self.table(name, 1 + ratio, -ratio, noise=noise, derivative=True)

    def churn(self, s_churn, s_tmin, s_tmax, s_noise) -> Tensor:
        """The levels after churn; makes the table ``churn``."""
        steps = len(self.now)
        gamma = min(s_churn / max(steps, 1), 2**0.5 - 1)
        churned = (s_tmin <= self.now) & (self.now <= s_tmax) & (gamma > 0)
        hat = torch.where(churned, self.now * (gamma + 1), self.now)
        added = torch.where(churned, ((hat**2 - self.now**2) ** 0.5).double(), 0.0) * s_noise
        self.churned = churned.tolist()
        self.table("churn", torch.ones_like(added), noise=added)
        return hat

    def add_churn(self, i: int, x: Tensor) -> Tensor:
        noise = None if self.seed is not None else torch.randn_like(x)  # the peer draws even where it adds nothing
        return self.step("churn", i, x, noise=noise, seeded=True) if self.churned[i] else x


def _eagerly(table: StepTable, row: int, inputs, noise):
    """The same row by PyTorch's own operations: any shapes that broadcast, gradients, tensor subclasses."""
    n = table.inputs
    values = table.data[row].tolist()

    def weighted(coefficients, of_noise):
        total = sum(c * t for c, t in zip(coefficients, inputs))
        return total if noise is None else total + of_noise * noise

    first = weighted(values[:n], values[n + 1])
    return (first, weighted(values[n + 2 : 2 * n + 2], values[2 * n + 3])) if table.has_second else first


# --- samplers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_euler(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
    *,
    seed=None,
):
    """Euler steps with churn (Karras et al. 2022, Algorithm 2)."""
    run = _Run(model, x, sigmas, extra_args, callback, seed=seed)
    hat = run.churn(s_churn, s_tmin, s_tmax, s_noise)
    run.euler_tables(hat, run.after)
    hats, given = run.on_device(hat), run.for_model(hat)
    for i in _progress(len(sigmas) - 1, disable):
        x = run.add_churn(i, x)
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, hats[i], denoised)
        x = run.step("euler", i, x, denoised)
    return x


@torch.no_grad()
def sample_euler_ancestral(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    *,
    seed=None,
):
    """Euler steps to a lower level, with noise put back."""
    run = _Run(model, x, sigmas, extra_args, callback, noise_sampler, seed)
    down, up = _ancestral(run.now, run.after, eta)
    run.euler_tables(run.now, down, noise=torch.where(run.after > 0, up.double() * s_noise, 0.0))
    given = run.for_model(run.now)
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        noise = None if run.ends[i] else run.noise(sigmas[i], sigmas[i + 1])
        x = run.step("euler", i, x, denoised, noise=noise, seeded=not run.ends[i])
    return x


@torch.no_grad()
def sample_heun(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
    *,
    seed=None,
):
    """Heun steps with churn (Karras et al. 2022, Algorithm 2)."""
    run = _Run(model, x, sigmas, extra_args, callback, seed=seed)
    hat = run.churn(s_churn, s_tmin, s_tmax, s_noise)
    run.euler_tables(hat, run.after)
    dt = (run.after - hat).double()
    first, second = dt / hat.double() / 2, dt / run.after.double() / 2
    run.table("heun", 1 + first, -first, second, -second, derivative=True)
    hats, given, given_next = run.on_device(hat), run.for_model(hat), run.for_model(run.after)
    for i in _progress(len(sigmas) - 1, disable):
        x = run.add_churn(i, x)
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, hats[i], denoised)
        x_2 = run.step("euler", i, x, denoised)
        if run.ends[i]:
            x = x_2
        else:
            denoised_2 = model(x_2, given_next[i], **run.extra_args)
            x = run.step("heun", i, x, denoised, x_2, denoised_2)
    return x


def _midpoint_tables(run: _Run, now: Tensor, after: Tensor, noise=None) -> Tensor:
    """DPM-Solver-2: ``mid`` of (x, denoised), then ``full`` of (x, x_2, denoised_2). Returns the middle levels."""
    mid = now.log().lerp(after.log(), 0.5).exp()
    run.euler_tables(now, mid, name="mid")
    ratio = (after - now).double() / mid.double()
    run.table("full", torch.ones_like(ratio), ratio, -ratio, noise=noise, derivative=True)
    return mid


@torch.no_grad()
def sample_dpm_2(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
    *,
    seed=None,
):
    """DPM-Solver-2 with churn: the derivative at the geometric mean of two levels."""
    run = _Run(model, x, sigmas, extra_args, callback, seed=seed)
    hat = run.churn(s_churn, s_tmin, s_tmax, s_noise)
    run.euler_tables(hat, run.after)
    mid = _midpoint_tables(run, hat, run.after)
    hats, given, given_mid = run.on_device(hat), run.for_model(hat), run.for_model(mid)
    for i in _progress(len(sigmas) - 1, disable):
        x = run.add_churn(i, x)
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, hats[i], denoised)
        if run.ends[i]:
            x = run.step("euler", i, x, denoised)
        else:
            x_2 = run.step("mid", i, x, denoised)
            x = run.step("full", i, x, x_2, model(x_2, given_mid[i], **run.extra_args))
    return x


@torch.no_grad()
def sample_dpm_2_ancestral(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    *,
    seed=None,
):
    """DPM-Solver-2 to a lower level, with noise put back."""
    run = _Run(model, x, sigmas, extra_args, callback, noise_sampler, seed)
    down, up = _ancestral(run.now, run.after, eta)
    run.euler_tables(run.now, down)
    mid = _midpoint_tables(run, run.now, down, noise=up.double() * s_noise)
    stops = (down == 0).tolist()
    given, given_mid = run.for_model(run.now), run.for_model(mid)
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        if stops[i]:
            x = run.step("euler", i, x, denoised)
        else:
            x_2 = run.step("mid", i, x, denoised)
            denoised_2 = model(x_2, given_mid[i], **run.extra_args)
            x = run.step("full", i, x, x_2, denoised_2, noise=run.noise(sigmas[i], sigmas[i + 1]), seeded=True)
    return x


@torch.no_grad()
def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
    """Linear multistep steps of up to ``order`` derivatives, with exact weights where the peer integrates numerically.

    Raises:
        ValueError: ``order`` is not from 1 to 7, as many as a step can read.
    """
    if not 1 <= order < MAX_INPUTS:
        raise ValueError(f"order must be from 1 to {MAX_INPUTS - 1}, got {order}")
    run = _Run(model, x, sigmas, extra_args, callback)
    weights = torch.from_numpy(adams_weights(run.host.double().numpy(), order))
    inverse = 1 / run.now.double()
    none = torch.zeros_like(inverse)
    for count in range(1, order + 1):
        newest, older = weights[:, 0], [weights[:, k] for k in range(1, count)]
        second = [inverse, -inverse, *[none] * len(older)]
        direct = (1 + newest * inverse, -newest * inverse, *older)
        run.table(f"lms {count}", *direct, second=second, derivative=True)
    given, derivatives = run.for_model(run.now), []
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        count = min(i + 1, order)
        x, derivative = run.step(f"lms {count}", i, x, denoised, *derivatives[: count - 1])
        derivatives = [derivative, *derivatives][: order - 1]
    return x


def _log_levels(levels: Tensor) -> Tensor:
    return levels.log().neg()


def _levels(t: Tensor) -> Tensor:
    return t.neg().exp()


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    *,
    seed=None,
):
    """DPM-Solver++(2S) to a lower level, with noise put back."""
    run = _Run(model, x, sigmas, extra_args, callback, noise_sampler, seed)
    down, up = _ancestral(run.now, run.after, eta)
    added = torch.where(run.after > 0, up.double() * s_noise, 0.0)
    run.euler_tables(run.now, down, noise=added)
    t, t_next = _log_levels(run.now), _log_levels(down)
    h = t_next - t
    s = t + 0.5 * h
    run.table("half", _levels(s) / _levels(t), -(-h * 0.5).expm1())
    run.table("full", _levels(t_next) / _levels(t), -(-h).expm1(), noise=added)
    stops = (down == 0).tolist()
    given, given_half = run.for_model(run.now), run.for_model(_levels(s))
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        name = "euler"
        if not stops[i]:
            x_2 = run.step("half", i, x, denoised)
            name, denoised = "full", model(x_2, given_half[i], **run.extra_args)
        noise = None if run.ends[i] else run.noise(sigmas[i], sigmas[i + 1])
        x = run.step(name, i, x, denoised, noise=noise, seeded=not run.ends[i])
    return x


@torch.no_grad()
def sample_dpmpp_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    r=1 / 2,
    *,
    seed=None,
):
    """DPM-Solver++ SDE: two model calls and two draws a step, along a Brownian path by default."""
    run = _Run(model, x, sigmas, extra_args, callback, noise_sampler, seed)
    run.brownian()
    run.euler_tables(run.now, run.after)
    t, t_next = _log_levels(run.now), _log_levels(run.after)
    s = t + (t_next - t) * r
    fac = 1 / (2 * r)
    at_t, at_s, at_next = _levels(t), _levels(s), _levels(t_next)
    down, up = _ancestral(at_t, at_s, eta)
    s_ = _log_levels(down)
    run.table("half", _levels(s_) / at_t, -(t - s_).expm1(), noise=up.double() * s_noise)
    down, up = _ancestral(at_t, at_next, eta)
    t_next_ = _log_levels(down)
    weight = -(t - t_next_).expm1().double()
    run.table("full", _levels(t_next_) / at_t, (1 - fac) * weight, fac * weight, noise=up.double() * s_noise)
    given, given_half = run.for_model(run.now), run.for_model(at_s)
    at_t, at_s, at_next = (run.on_device(v) for v in (at_t, at_s, at_next))
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        if run.ends[i]:
            x = run.step("euler", i, x, denoised)
        else:
            x_2 = run.step("half", i, x, denoised, noise=run.noise(at_t[i], at_s[i]), seeded=True)
            denoised_2 = model(x_2, given_half[i], **run.extra_args)
            noise = run.noise(at_t[i], at_next[i])
            x = run.step("full", i, x, denoised, denoised_2, noise=noise, seeded=True, stream=SECOND_DRAW)
    return x


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++(2M)."""
    run = _Run(model, x, sigmas, extra_args, callback)
    t, t_next = _log_levels(run.now), _log_levels(run.after)
    h = t_next - t
    ratio, weight = _levels(t_next) / _levels(t), -(-h).expm1().double()
    run.table("first", ratio, weight)
    r = (h.roll(1) / h).double()  # of the step before; the first has none and does not look
    run.table("second", ratio, weight * (1 + 1 / (2 * r)), -weight / (2 * r))
    given, old = run.for_model(run.now), None
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        if old is None or run.ends[i]:
            x = run.step("first", i, x, denoised)
        else:
            x = run.step("second", i, x, denoised, old)
        old = denoised
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    solver_type="midpoint",
    *,
    seed=None,
):
    """DPM-Solver++(2M) SDE, along a Brownian path by default.

    Raises:
        ValueError: ``solver_type`` is neither "heun" nor "midpoint".
    """
    if solver_type not in {"heun", "midpoint"}:
        raise ValueError("solver_type must be 'heun' or 'midpoint'")
    run = _Run(model, x, sigmas, extra_args, callback, noise_sampler, seed)
    run.brownian()
    h = run.now.log() - run.after.log()
    eta_h = eta * h
    ratio, weight = run.after / run.now * (-eta_h).exp(), (-h - eta_h).expm1().neg()
    added = (run.after * (-2 * eta_h).expm1().neg().sqrt()).double() * s_noise if eta else None
    run.table("first", ratio, weight, noise=added)
    more = weight / (-h - eta_h) + 1 if solver_type == "heun" else 0.5 * weight
    more = more.double() * (1 / (h.roll(1) / h)).double()
    run.table("second", ratio, weight.double() + more, -more, noise=added)
    given, old = run.for_model(run.now), None
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        if run.ends[i]:
            x = denoised
        else:
            noise = run.noise(sigmas[i], sigmas[i + 1]) if eta else None
            name, past = ("first", ()) if old is None else ("second", (old,))
            x = run.step(name, i, x, denoised, *past, noise=noise, seeded=bool(eta))
        old = denoised
    return x


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    *,
    seed=None,
):
    """DPM-Solver++(3M) SDE, along a Brownian path by default."""
    run = _Run(model, x, sigmas, extra_args, callback, noise_sampler, seed)
    run.brownian()
    h = run.now.log() - run.after.log()
    h_eta = h * (eta + 1)
    ratio, weight = torch.exp(-h_eta), (-h_eta).expm1().neg().double()
    added = (run.after * (-2 * h * eta).expm1().neg().sqrt()).double() * s_noise if eta else None
    run.table("first", ratio, weight, noise=added)
    phi_2 = h_eta.neg().expm1() / h_eta + 1
    phi_3 = (phi_2 / h_eta - 0.5).double()
    phi_2, r0, r1 = phi_2.double(), (h.roll(1) / h).double(), (h.roll(2) / h).double()
    run.table("second", ratio, weight + phi_2 / r0, -phi_2 / r0, noise=added)
    # d1 = d1_0 + (d1_0 - d1_1) r0 / (r0 + r1), d2 = (d1_0 - d1_1) / (r0 + r1)
    newer = (phi_2 * (1 + r0 / (r0 + r1)) - phi_3 / (r0 + r1)) / r0
    older = (-phi_2 * r0 / (r0 + r1) + phi_3 / (r0 + r1)) / r1
    run.table("third", ratio, weight + newer, older - newer, -older, noise=added)
    given, past = run.for_model(run.now), ()
    for i in _progress(len(sigmas) - 1, disable):
        denoised = model(x, given[i], **run.extra_args)
        run.tell(x, i, sigmas[i], denoised)
        if run.ends[i]:
            x = denoised
        else:
            noise = run.noise(sigmas[i], sigmas[i + 1]) if eta else None
            name = ("first", "second", "third")[len(past)]
            x = run.step(name, i, x, denoised, *past, noise=noise, seeded=bool(eta))
        past = (denoised, *past)[:2]
    return x


# --- DPM-Solver with steps of its own choice -------------------------------------------------------------------------


class PIDStepSizeController:
    """The step size of an adaptive solver, by the errors of the last three steps (Soederlind 2003)."""

    def __init__(self, h, pcoeff, icoeff, dcoeff, order=1, accept_safety=0.81, eps=1e-8):
        self.h = h
        self.b1 = (pcoeff + icoeff + dcoeff) / order
        self.b2 = -(pcoeff + 2 * dcoeff) / order
        self.b3 = dcoeff / order
        self.accept_safety = accept_safety
        self.eps = eps
        self.errs: list[float] = []

    def limiter(self, x: float) -> float:
        return 1 + math.atan(x - 1)

    def propose_step(self, error) -> bool:
        """Whether a step of this error is accepted; sets ``h`` for the next."""
        inverse = 1 / (float(error) + self.eps)
        if not self.errs:
            self.errs = [inverse] * 3
        self.errs[0] = inverse
        factor = self.limiter(self.errs[0] ** self.b1 * self.errs[1] ** self.b2 * self.errs[2] ** self.b3)
        accept = factor >= self.accept_safety
        if accept:
            self.errs[2], self.errs[1] = self.errs[1], self.errs[0]
        self.h *= factor
        return accept


def _combined(inputs, coefficients, noise=None, weight=0.0):
    """sum_k c_k x_k + weight noise, in one pass."""
    tensors = [*inputs, *([] if noise is None else [noise])]
    values = [float(c) for c in coefficients]
    if plain(*tensors):
        if noise is not None:
            return sampler_step(inputs, [*values, float(weight)], noise=noise, dtype=promoted(*tensors))
        return sampler_step(inputs, values, dtype=promoted(*tensors))
    total = sum(c * t for c, t in zip(values, inputs))
    return total if noise is None else total + float(weight) * noise


class DPMSolver(nn.Module):
    """DPM-Solver of orders 1 to 3 in t = -log sigma (Lu et al. 2022, arXiv:2206.00927), fixed and adaptive steps.

    Times are 0-d tensors on the host.
    """

    def __init__(self, model, extra_args=None, eps_callback=None, info_callback=None):
        super().__init__()
        self.model = model
        self.extra_args = {} if extra_args is None else extra_args
        self.eps_callback = eps_callback
        self.info_callback = info_callback

    def t(self, sigma: Tensor) -> Tensor:
        return -sigma.log()

    def sigma(self, t: Tensor) -> Tensor:
        return t.neg().exp()

    def eps(self, eps_cache, key, x, t, *args, **kwargs):
        """The model's estimate of eps at (x, t), kept under ``key``; (eps, cache)."""
        if key in eps_cache:
            return eps_cache[key], eps_cache
        level = self.sigma(t)
        denoised = self.model(x, level * x.new_ones([x.shape[0]]), *args, **self.extra_args, **kwargs)
        eps = _combined([x, denoised], [1 / float(level), -1 / float(level)])
        if self.eps_callback is not None:
            self.eps_callback()
        return eps, {key: eps, **eps_cache}

    def dpm_solver_1_step(self, x, t, t_next, eps_cache=None):
        h = t_next - t
        eps, eps_cache = self.eps(eps_cache or {}, "eps", x, t)
        return _combined([x, eps], [1, -self.sigma(t_next) * h.expm1()]), eps_cache

    def dpm_solver_2_step(self, x, t, t_next, r1=1 / 2, eps_cache=None):
        h = t_next - t
        eps, eps_cache = self.eps(eps_cache or {}, "eps", x, t)
        s1 = t + r1 * h
        u1 = _combined([x, eps], [1, -self.sigma(s1) * (r1 * h).expm1()])
        eps_r1, eps_cache = self.eps(eps_cache, "eps_r1", u1, s1)
        base, more = (self.sigma(t_next) * h.expm1()).double(), (self.sigma(t_next) / (2 * r1) * h.expm1()).double()
        return _combined([x, eps, eps_r1], [1, more - base, -more]), eps_cache

    def dpm_solver_3_step(self, x, t, t_next, r1=1 / 3, r2=2 / 3, eps_cache=None):
        h = t_next - t
        eps, eps_cache = self.eps(eps_cache or {}, "eps", x, t)
        s1, s2 = t + r1 * h, t + r2 * h
        u1 = _combined([x, eps], [1, -self.sigma(s1) * (r1 * h).expm1()])
        eps_r1, eps_cache = self.eps(eps_cache, "eps_r1", u1, s1)
        base = (self.sigma(s2) * (r2 * h).expm1()).double()
        more = (self.sigma(s2) * (r2 / r1) * ((r2 * h).expm1() / (r2 * h) - 1)).double()
        u2 = _combined([x, eps, eps_r1], [1, more - base, -more])
        eps_r2, eps_cache = self.eps(eps_cache, "eps_r2", u2, s2)
        base = (self.sigma(t_next) * h.expm1()).double()
        more = (self.sigma(t_next) / r2 * (h.expm1() / h - 1)).double()
        return _combined([x, eps, eps_r2], [1, more - base, -more]), eps_cache

    def _noisy(self, s, t, t_end, eta):
        """(where the step goes, how much noise brings it to t)."""
        if not eta:
            return t, 0.0
        down, _ = get_ancestral_step(self.sigma(s), self.sigma(t), eta)
        lower = torch.minimum(t_end, self.t(down))
        return lower, (self.sigma(t) ** 2 - self.sigma(lower) ** 2) ** 0.5

    def dpm_solver_fast(self, x, t_start, t_end, nfe, eta=0.0, s_noise=1.0, noise_sampler=None):
        """``nfe`` model calls in steps of order 3, the last ones shorter."""
        noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
        t_start, t_end = t_start.cpu(), t_end.cpu()
        if not t_end > t_start and eta:
            raise ValueError("eta must be 0 for reverse sampling")
        m = math.floor(nfe / 3) + 1
        ts = torch.linspace(float(t_start), float(t_end), m + 1)
        orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
        for i, order in enumerate(orders):
            t, t_next = ts[i], ts[i + 1]
            lower, up = self._noisy(t, t_next, t_end, eta)
            eps, cache = self.eps({}, "eps", x, t)
            if self.info_callback is not None:
                denoised = _combined([x, eps], [1, -self.sigma(t)])
                self.info_callback({"x": x, "i": i, "t": ts[i], "t_up": t, "denoised": denoised})
            take = (self.dpm_solver_1_step, self.dpm_solver_2_step, self.dpm_solver_3_step)[order - 1]
            x, _ = take(x, t, lower, eps_cache=cache)
            noise = noise_sampler(self.sigma(t), self.sigma(t_next))
            if eta:
                x = _combined([x], [1], noise, up * s_noise)
        return x

    def dpm_solver_adaptive(
        self,
        x,
        t_start,
        t_end,
        order=3,
        rtol=0.05,
        atol=0.0078,
        h_init=0.05,
        pcoeff=0.0,
        icoeff=1.0,
        dcoeff=0.0,
        accept_safety=0.81,
        eta=0.0,
        s_noise=1.0,
        noise_sampler=None,
    ):
        """Steps as long as the difference of two orders allows: its norm is read to the host once a step, as in the
        peer, since it decides what comes next."""
        noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
        if order not in {2, 3}:
            raise ValueError("order should be 2 or 3")
        t_start, t_end = t_start.cpu(), t_end.cpu()
        forward = bool(t_end > t_start)
        if not forward and eta:
            raise ValueError("eta must be 0 for reverse sampling")
        h_init = abs(h_init) * (1 if forward else -1)
        atol, rtol = torch.tensor(atol), torch.tensor(rtol)
        s, x_prev = t_start, x
        pid = PIDStepSizeController(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
        info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
        while s < t_end - 1e-5 if forward else s > t_end + 1e-5:
            t = torch.minimum(t_end, s + pid.h) if forward else torch.maximum(t_end, s + pid.h)
            lower, up = self._noisy(s, t, t_end, eta)
            eps, cache = self.eps({}, "eps", x, s)
            denoised = _combined([x, eps], [1, -self.sigma(s)])
            if order == 2:
                x_low, cache = self.dpm_solver_1_step(x, s, lower, eps_cache=cache)
                x_high, cache = self.dpm_solver_2_step(x, s, lower, eps_cache=cache)
            else:
                x_low, cache = self.dpm_solver_2_step(x, s, lower, r1=1 / 3, eps_cache=cache)
                x_high, cache = self.dpm_solver_3_step(x, s, lower, eps_cache=cache)
            delta = torch.maximum(atol, rtol * torch.maximum(x_low.abs(), x_prev.abs()))
            error = torch.linalg.norm((x_low - x_high) / delta) / x.numel() ** 0.5
            if pid.propose_step(error):
                x_prev = x_low
                noise = noise_sampler(self.sigma(s), self.sigma(t))
                x = _combined([x_high], [1], noise, up * s_noise) if eta else x_high
                s = t
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            if self.info_callback is not None:
                told = {"x": x, "i": info["steps"] - 1, "t": s, "t_up": s, "denoised": denoised, "error": error}
                self.info_callback({**told, "h": pid.h, **info})
        return x, info


class _Calls:
    """A progress bar that counts model calls, where tqdm is installed."""

    def __init__(self, total, disable):
        try:
            from tqdm.auto import tqdm
        except ImportError:
            self.bar, self.update = None, None
        else:
            self.bar = tqdm(total=total, disable=disable)
            self.update = self.bar.update

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def _solver(model, extra_args, callback, calls: _Calls) -> DPMSolver:
    solver = DPMSolver(model, extra_args, eps_callback=calls.update)
    if callback is not None:
        solver.info_callback = lambda info: callback(
            {"sigma": solver.sigma(info["t"]), "sigma_hat": solver.sigma(info["t_up"]), **info}
        )
    return solver


def _check_ends(sigma_min, sigma_max) -> None:
    if sigma_min <= 0 or sigma_max <= 0:
        raise ValueError("sigma_min and sigma_max must not be 0")


@torch.no_grad()
def sample_dpm_fast(
    model,
    x,
    sigma_min,
    sigma_max,
    n,
    extra_args=None,
    callback=None,
    disable=None,
    eta=0.0,
    s_noise=1.0,
    noise_sampler=None,
):
    """DPM-Solver with ``n`` model calls.

    Raises:
        ValueError: an end that is not positive, or ``eta`` with ``sigma_min`` above ``sigma_max``.
    """
    _check_ends(sigma_min, sigma_max)
    with _Calls(n, disable) as calls:
        solver = _solver(model, extra_args, callback, calls)
        t_start, t_end = solver.t(torch.tensor(sigma_max)), solver.t(torch.tensor(sigma_min))
        return solver.dpm_solver_fast(x, t_start, t_end, n, eta, s_noise, noise_sampler)


@torch.no_grad()
def sample_dpm_adaptive(
    model,
    x,
    sigma_min,
    sigma_max,
    extra_args=None,
    callback=None,
    disable=None,
    order=3,
    rtol=0.05,
    atol=0.0078,
    h_init=0.05,
    pcoeff=0.0,
    icoeff=1.0,
    dcoeff=0.0,
    accept_safety=0.81,
    eta=0.0,
    s_noise=1.0,
    noise_sampler=None,
    return_info=False,
):
    """DPM-Solver of orders 1 and 2, or 2 and 3, with adaptive steps; see :meth:`DPMSolver.dpm_solver_adaptive`.

    Raises:
        ValueError: as for :func:`sample_dpm_fast`, or ``order`` is neither 2 nor 3.
    """
    _check_ends(sigma_min, sigma_max)
    with _Calls(None, disable) as calls:
        solver = _solver(model, extra_args, callback, calls)
        t_start, t_end = solver.t(torch.tensor(sigma_max)), solver.t(torch.tensor(sigma_min))
        options = (order, rtol, atol, h_init, pcoeff, icoeff, dcoeff, accept_safety, eta, s_noise, noise_sampler)
        x, info = solver.dpm_solver_adaptive(x, t_start, t_end, *options)
    return (x, info) if return_info else x


@torch.no_grad()
def log_likelihood(model, x, sigma_min, sigma_max, extra_args=None, atol=1e-4, rtol=1e-4):
    """(log p(x) [B], {"fevals": calls}) by the probability-flow ODE and Hutchinson's estimate of its divergence.

    Raises:
        ImportError: torchdiffeq, which solves the ODE, is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError("log_likelihood needs the package torchdiffeq (`pip install torchdiffeq`)") from None
    extra_args = {} if extra_args is None else extra_args
    ones = x.new_ones([x.shape[0]])
    v = torch.randint_like(x, 2) * 2 - 1
    fevals = 0

    def slope(sigma, state):
        nonlocal fevals
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            d = to_d(y, sigma, model(y, sigma * ones, **extra_args))
            fevals += 1
            grad = torch.autograd.grad((d * v).sum(), y)[0]
        return d.detach(), (v * grad).flatten(1).sum(1)

    times = x.new_tensor([sigma_min, sigma_max])
    latents, changes = odeint(slope, (x, x.new_zeros([x.shape[0]])), times, atol=atol, rtol=rtol, method="dopri5")
    prior = torch.distributions.Normal(0, sigma_max).log_prob(latents[-1]).flatten(1).sum(1)
    return prior + changes[-1], {"fevals": fevals}
