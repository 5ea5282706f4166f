"""EDM's samplers against the formulas of the paper written out in PyTorch, and against exact solutions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast.dropin.edm import LIMITS, ablation_sampler, edm_sampler


class Net:
    """A bounded denoiser with limits and, perhaps, levels of its own."""

    def __init__(self, dtype=torch.float32, sigma_min=0.01, sigma_max=50.0, grid=None):
        self.sigma_min, self.sigma_max, self.dtype, self.grid, self.seen = sigma_min, sigma_max, dtype, grid, []

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        if self.grid is None:
            return sigma
        return self.grid[(sigma.reshape(-1, 1) - self.grid).abs().argmin(1)].reshape(sigma.shape)

    def __call__(self, x, sigma, class_labels=None):
        assert x.dtype == torch.float64 and sigma.dtype == torch.float64 and sigma.dim() == 0
        self.seen.append(float(sigma))
        shift = 0.0 if class_labels is None else class_labels.double().view(-1, *[1] * (x.dim() - 1))
        return torch.tanh(x / (1 + sigma) + shift).to(self.dtype)


def published_edm(
    net, latents, labels, randn_like, num_steps, sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise
):
    """Algorithm 2 of the paper, sigma(t) = t."""
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    i = torch.arange(num_steps, dtype=torch.float64)
    t = (sigma_max ** (1 / rho) + i / (num_steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    t = torch.cat([net.round_sigma(t), torch.zeros(1, dtype=torch.float64)])
    x = latents.double() * t[0]
    for k in range(num_steps):
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= t[k] <= S_max else 0
        hat = net.round_sigma(t[k] + gamma * t[k])
        x = x + (hat**2 - t[k] ** 2).sqrt() * S_noise * randn_like(x)
        d = (x - net(x, hat, labels).double()) / hat
        following = x + (t[k + 1] - hat) * d
        if k < num_steps - 1:
            other = (following - net(following, t[k + 1], labels).double()) / t[k + 1]
            following = x + (t[k + 1] - hat) * (d + other) / 2
        x = following
    return x


def start(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


churns = st.sampled_from(((0, 0, float("inf"), 1), (10.0, 0.05, 20.0, 1.007), (60.0, 0, float("inf"), 1.0)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(((1, 3), (2, 3, 4, 5), (3, 1, 2))),
    num_steps=st.integers(2, 9),
    rho=st.sampled_from((3.0, 7.0)),
    churn=churns,
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16)),
    grid=st.booleans(),
    labelled=st.booleans(),
)
def test_edm_sampler_is_the_paper_s(shape, num_steps, rho, churn, dtype, grid, labelled):
    levels = torch.linspace(0.01, 60, 4000, dtype=torch.float64) if grid else None
    labels = torch.arange(shape[0]) if labelled else None
    results = []
    for sampler in (edm_sampler, published_edm):
        net = Net(dtype, grid=levels)
        torch.manual_seed(1)
        options = (num_steps, 0.002, 80, rho, *churn)
        results.append((sampler(net, start(shape), labels, torch.randn_like, *options), net.seen, torch.rand(())))
    (mine, seen, left), (exact, seen_exact, left_exact) = results
    assert left == left_exact and seen == pytest.approx(seen_exact, rel=1e-12)
    assert mine.dtype == torch.float64
    # A network that answers in half precision may round a bit the other way.
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 3e-2}[dtype]
    torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


def published_ablation(
    net,
    latents,
    randn_like,
    num_steps,
    solver,
    discretization,
    schedule,
    scaling,
    alpha,
    S_churn,
    S_min,
    S_max,
    S_noise,
):
    """The general form, one number at a time."""
    eps_s, C_1, C_2, M, rho = 1e-3, 0.001, 0.008, 1000, 7
    low, high = LIMITS[discretization](eps_s)
    low, high = max(low, net.sigma_min), min(high, net.sigma_max)
    beta_d = 2 * (math.log(low**2 + 1) / eps_s - math.log(high**2 + 1)) / (eps_s - 1)
    beta_min = math.log(high**2 + 1) - 0.5 * beta_d

    def vp(t):
        return math.sqrt(math.exp(0.5 * beta_d * t * t + beta_min * t) - 1)

    sigma = {"vp": vp, "ve": math.sqrt, "linear": float}[schedule]
    inverse = {
        "vp": lambda v: (math.sqrt(beta_min**2 + 2 * beta_d * math.log(v * v + 1)) - beta_min) / beta_d,
        "ve": lambda v: v * v,
        "linear": float,
    }[schedule]
    rate = {
        "vp": lambda t: 0.5 * (beta_min + beta_d * t) * (vp(t) + 1 / vp(t)),
        "ve": lambda t: 0.5 / math.sqrt(t),
        "linear": lambda t: 1.0,
    }[schedule]

    def s(t):
        return 1 / math.sqrt(1 + sigma(t) ** 2) if scaling == "vp" else 1.0

    def s_rate(t):
        return -sigma(t) * rate(t) * s(t) ** 3 if scaling == "vp" else 0.0

    share = [k / (num_steps - 1) for k in range(num_steps)]
    if discretization == "vp":
        levels = [vp(1 + f * (eps_s - 1)) for f in share]
    elif discretization == "ve":
        levels = [math.sqrt(high**2 * (low**2 / high**2) ** f) for f in share]
    elif discretization == "iddpm":
        u = [0.0] * (M + 1)
        for j in range(M, 0, -1):
            a = [math.sin(0.5 * math.pi * k / M / (C_2 + 1)) ** 2 for k in (j - 1, j)]
            u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(a[0] / a[1], C_1) - 1)
        u = [v for v in u if low <= v <= high]
        levels = [u[int(np.round((len(u) - 1) * f))] for f in share]
    else:
        levels = [(high ** (1 / rho) + f * (low ** (1 / rho) - high ** (1 / rho))) ** rho for f in share]
    t = [inverse(v) for v in levels] + [0.0]
    x = latents.double() * (sigma(t[0]) * s(t[0]))

    def slope(x, t):
        denoised = net(x / s(t), torch.tensor(sigma(t), dtype=torch.float64)).double()
        return (rate(t) / sigma(t) + s_rate(t) / s(t)) * x - rate(t) * s(t) / sigma(t) * denoised

    for k in range(num_steps):
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= sigma(t[k]) <= S_max else 0
        hat = inverse(sigma(t[k]) * (1 + gamma))
        noise = randn_like(x)
        added = math.sqrt(max(sigma(hat) ** 2 - sigma(t[k]) ** 2, 0))
        x = s(hat) / s(t[k]) * x + added * s(hat) * S_noise * noise
        h = t[k + 1] - hat
        d = slope(x, hat)
        if solver == "euler" or k == num_steps - 1:
            x = x + h * d
        else:
            other = slope(x + alpha * h * d, hat + alpha * h)
            x = x + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * other)
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(((1, 3), (2, 3, 4, 5))),
    num_steps=st.integers(2, 7),
    solver=st.sampled_from(("euler", "heun")),
    discretization=st.sampled_from(("vp", "ve", "iddpm", "edm")),
    schedule=st.sampled_from(("vp", "ve", "linear")),
    scaling=st.sampled_from(("vp", "none")),
    alpha=st.sampled_from((1, 0.5, 2 / 3)),
    churn=churns,
)
def test_ablation_sampler_is_the_paper_s(shape, num_steps, solver, discretization, schedule, scaling, alpha, churn):
    results = []
    for sampler in (
        lambda net, x: ablation_sampler(
            net,
            x,
            num_steps=num_steps,
            solver=solver,
            discretization=discretization,
            schedule=schedule,
            scaling=scaling,
            alpha=alpha,
            **dict(zip(("S_churn", "S_min", "S_max", "S_noise"), churn)),
        ),
        lambda net, x: published_ablation(
            net, x, torch.randn_like, num_steps, solver, discretization, schedule, scaling, alpha, *churn
        ),
    ):
        torch.manual_seed(1)
        net = Net(torch.float64)
        results.append((sampler(net, start(shape)), net.seen, torch.rand(())))
    (mine, seen, left), (exact, seen_exact, left_exact) = results
    assert left == left_exact and seen == pytest.approx(seen_exact, rel=1e-7)
    torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-7 * (1 + exact.abs().max().item()))


def test_general_form_contains_the_special_one():
    options = dict(num_steps=8, S_churn=20.0, S_noise=1.01)
    results = []
    for sampler, more in ((edm_sampler, {}), (ablation_sampler, {})):
        torch.manual_seed(3)
        results.append(sampler(Net(torch.float64), start((2, 5)), **options, **more))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


class Gaussian:
    """The exact denoiser of N(mean, std^2), a plain function without limits."""

    mean, std = 0.7, 0.4

    def __call__(self, x, sigma, class_labels):
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


@pytest.mark.parametrize("sampler", [edm_sampler, ablation_sampler])
def test_gaussian_data(sampler):
    """The probability-flow ODE of Gaussian data is linear: its solution is known in closed form."""
    z = start((4, 1000)).double()
    x = sampler(Gaussian(), z, num_steps=120)
    top = math.sqrt(Gaussian.std**2 + 80**2)
    exact = Gaussian.mean + Gaussian.std / top * (80 * z - Gaussian.mean)
    torch.testing.assert_close(x, exact, rtol=0, atol=2e-3)


def test_seeded_noise():
    calls = []
    options = dict(num_steps=5, S_churn=30.0, randn_like=lambda x: calls.append(x))
    for sampler in (edm_sampler, ablation_sampler):
        first = sampler(Net(), start((2, 6)), seed=4, **options)
        assert torch.equal(first, sampler(Net(), start((2, 6)), seed=4, **options)) and not calls
        assert not torch.equal(first, sampler(Net(), start((2, 6)), seed=5, **options))
        alone = sampler(Net(), start((2, 6)), num_steps=5, randn_like=torch.randn_like)
        assert not torch.equal(first, alone)


def test_one_step_and_refusals():
    net = Net(torch.float64)
    x = edm_sampler(net, start((1, 3)), num_steps=1)
    torch.testing.assert_close(x, torch.tanh(start((1, 3)).double() * 50 / 51), rtol=1e-12, atol=1e-12)
    for sampler in (edm_sampler, ablation_sampler):
        with pytest.raises(ValueError, match="num_steps must be a positive int, got 0"):
            sampler(net, start((1, 3)), num_steps=0)
    for name in ("solver", "discretization", "schedule", "scaling"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'other'"):
            ablation_sampler(net, start((1, 3)), **{name: "other"})


def test_gradients_reach_the_latents():
    latents = start((2, 3)).double().requires_grad_()
    edm_sampler(Net(torch.float64), latents, num_steps=3).sum().backward()
    assert latents.grad.abs().sum() > 0
