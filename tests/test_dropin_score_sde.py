"""Predictors, correctors and samplers of score SDEs against the published formulas written out in PyTorch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast.dropin import score_sde as ours

N = 24  # with fewer, a beta would be above 1
SDES = {
    "vp": lambda: ours.VPSDE(0.1, 20.0, N),
    "subvp": lambda: ours.subVPSDE(0.1, 20.0, N),
    "ve": lambda: ours.VESDE(0.01, 5.0, N),
}


def model(x, labels):
    """Bounded and smooth, different at every label."""
    s = labels.double().view(-1, *[1] * (x.dim() - 1)) / 500
    return (torch.tanh(x.double() + 0.2 * torch.sin(s)) - 0.1 * x.double()).to(x.dtype)


def wide(v, x):
    return v.view(-1, *[1] * (x.dim() - 1))


class Published:
    """The formulas of the paper, one SDE by name."""

    def __init__(self, kind, continuous):
        self.kind, self.continuous = kind, continuous
        self.betas = torch.linspace(0.1 / N, 20.0 / N, N)
        self.sigmas = torch.exp(torch.linspace(math.log(0.01), math.log(5.0), N))

    def index(self, t):
        return (t * (N - 1)).long()

    def std(self, t):
        if self.kind == "ve":
            return 0.01 * 500**t
        mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        return torch.sqrt(1 - torch.exp(2 * mean)) if self.kind == "vp" else 1 - torch.exp(2 * mean)

    def score(self, x, t):
        if self.kind == "ve":
            return model(x, self.std(t) if self.continuous else torch.round((1 - t) * (N - 1)).long())
        if self.continuous or self.kind == "subvp":
            return -model(x, t * 999) / wide(self.std(t), x)
        labels = t * (N - 1)
        std = torch.sqrt(1 - torch.cumprod(1 - self.betas, 0))[labels.long()]
        return -model(x, labels) / wide(std, x)

    def drift_diffusion(self, x, t):
        if self.kind == "ve":
            return torch.zeros_like(x), self.std(t) * math.sqrt(2 * math.log(500))
        beta = 0.1 + t * 19.9
        spread = beta if self.kind == "vp" else beta * (1 - torch.exp(-2 * 0.1 * t - 19.9 * t**2))
        return -0.5 * wide(beta, x) * x, torch.sqrt(spread)

    def f_G(self, x, t):
        if self.kind == "vp":
            beta = self.betas[self.index(t)]
            return wide(torch.sqrt(1 - beta), x) * x - x, torch.sqrt(beta)
        if self.kind == "ve":
            i = self.index(t)
            before = torch.where(i == 0, 0.0, self.sigmas[i - 1])
            return torch.zeros_like(x), torch.sqrt(self.sigmas[i] ** 2 - before**2)
        f, g = self.drift_diffusion(x, t)
        return f / N, g * math.sqrt(1 / N)

    def predict(self, name, x, t, flow):
        if name == "none":
            return x, x
        share = 0.5 if flow else 1.0
        if name == "euler_maruyama":
            z = torch.randn_like(x)
            f, g = self.drift_diffusion(x, t)
            mean = x - (f - wide(g, x) ** 2 * self.score(x, t) * share) / N
            return mean + (0 if flow else wide(g, x) * math.sqrt(1 / N)) * z, mean
        if name == "reverse_diffusion":
            f, g = self.f_G(x, t)
            mean = x - (f - wide(g, x) ** 2 * self.score(x, t) * share)
            return mean + (0 if flow else wide(g, x)) * torch.randn_like(x), mean
        i = self.index(t)
        if self.kind == "ve":
            sigma, before = self.sigmas[i], torch.where(i == 0, 0.0, self.sigmas[i - 1])
            mean = x + self.score(x, t) * wide(sigma**2 - before**2, x)
            std = torch.sqrt(before**2 * (sigma**2 - before**2) / sigma**2)
            return mean + wide(std, x) * torch.randn_like(x), mean
        beta = wide(self.betas[i], x)
        mean = (x + beta * self.score(x, t)) / torch.sqrt(1 - beta)
        return mean + torch.sqrt(beta) * torch.randn_like(x), mean

    def correct(self, name, x, t, snr, n_steps):
        if name == "none":
            return x, x
        alpha = torch.ones_like(t) if self.kind == "ve" else (1 - self.betas)[self.index(t)]
        for _ in range(n_steps):
            grad, noise = self.score(x, t), torch.randn_like(x)
            if name == "ald":
                size = (snr * self.std(t)) ** 2 * 2 * alpha
            else:
                norms = [torch.norm(v.reshape(len(v), -1), dim=-1).mean() for v in (noise, grad)]
                size = (snr * norms[0] / norms[1]) ** 2 * 2 * alpha
            mean = x + wide(size, x) * grad
            x = mean + torch.sqrt(wide(size, x) * 2) * noise
        return x, mean

    def sample(self, shape, predictor, corrector, snr, n_steps, flow, denoise, eps):
        x = torch.randn(*shape) * (5.0 if self.kind == "ve" else 1.0)
        mean = x
        for t in torch.linspace(1, eps, N):
            t = torch.ones(shape[0]) * t
            x, mean = self.correct(corrector, x, t, snr, n_steps)
            x, mean = self.predict(predictor, x, t, flow)
        return mean if denoise else x


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(tuple(SDES)),
    predictor=st.sampled_from(("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none")),
    corrector=st.sampled_from(("langevin", "ald", "none")),
    n_steps=st.integers(1, 2),
    flow=st.booleans(),
    continuous=st.booleans(),
    denoise=st.booleans(),
    shape=st.sampled_from(((1, 3, 4, 4), (3, 2, 5, 3), (2, 7))),
)
def test_pc_sampler_is_the_published_one(kind, predictor, corrector, n_steps, flow, continuous, denoise, shape):
    if predictor == "ancestral_sampling":
        flow = False
        if kind == "subvp":
            return
    snr, eps = 0.16, 1e-3
    torch.manual_seed(3)
    sampler = ours.get_pc_sampler(
        SDES[kind](),
        shape,
        ours.get_predictor(predictor),
        ours.get_corrector(corrector),
        lambda x: 2 * x,
        snr,
        n_steps=n_steps,
        probability_flow=flow,
        continuous=continuous,
        denoise=denoise,
        eps=eps,
        device="cpu",
    )
    mine, count = sampler(model)
    left = torch.rand(())
    torch.manual_seed(3)
    exact = 2 * Published(kind, continuous).sample(shape, predictor, corrector, snr, n_steps, flow, denoise, eps)
    assert left == torch.rand(()), "the number of draws differs"
    assert count == N * (n_steps + 1) and mine.shape == exact.shape and mine.dtype == exact.dtype
    # Near t = 0 a noise prediction is divided by a standard deviation of 0.01: loops drift apart by that much more.
    torch.testing.assert_close(mine, exact, rtol=2e-3, atol=2e-4 * (1 + exact.abs().max().item()))


@pytest.mark.parametrize("kind", SDES)
@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_update_of_samples_at_times_of_their_own(kind, name, dtype):
    if kind == "subvp" and name == "ancestral_sampling":
        return
    sde, published = SDES[kind](), Published(kind, True)
    x, t = torch.randn(4, 3, 5).to(dtype), torch.tensor([0.9, 0.5, 0.2, 0.05])
    predictor = ours.get_predictor(name)(sde, ours.get_score_fn(sde, model, continuous=True))
    torch.manual_seed(1)
    mine = predictor.update_fn(x, t)
    torch.manual_seed(1)
    exact = published.predict(name, x, t, False)
    for a, b in zip(mine, exact):
        assert a.dtype == b.dtype
        torch.testing.assert_close(
            a, b, rtol=2e-2 if dtype is torch.bfloat16 else 2e-6, atol=2e-2 if dtype is torch.bfloat16 else 2e-6
        )


@pytest.mark.parametrize("kind", SDES)
def test_sdes(kind):
    sde, published = SDES[kind](), Published(kind, True)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.9, 0.5, 0.02])
    for a, b in zip(sde.sde(x, t), published.drift_diffusion(x, t)):
        torch.testing.assert_close(a, b)
    for a, b in zip(sde.discretize(x, t), published.f_G(x, t)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sde.marginal_prob(x, t)[1], published.std(t))
    assert sde.T == 1 and sde.prior_sampling((2, 3)).shape == (2, 3)
    std = 5.0 if kind == "ve" else 1.0
    exact = torch.distributions.Normal(0, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(sde.prior_logp(x).to(exact), exact)
    for flow in (False, True):
        drift, diffusion = sde.reverse(published.score, flow).sde(x, t)
        f, g = published.drift_diffusion(x, t)
        torch.testing.assert_close(drift, f - wide(g, x) ** 2 * published.score(x, t) * (0.5 if flow else 1))
        assert diffusion == 0.0 if flow else torch.equal(diffusion, g)


class Gaussian:
    """The exact noise prediction for N(mean, spread^2) under the VP SDE."""

    mean, spread = 0.5, 0.3

    def __init__(self, sde):
        self.sde = sde

    def __call__(self, x, labels):
        t = (labels / 999).view(-1, *[1] * (x.dim() - 1))
        a, s = self.sde.marginal_prob(torch.ones_like(t), t)
        total = a**2 * self.spread**2 + s**2
        return s * (x - a * self.mean) / total


def test_ode_sampler_on_gaussian_data():
    pytest.importorskip("scipy")
    sde = ours.VPSDE(N=1000)
    z = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    sampler = ours.get_ode_sampler(sde, (2, 50), lambda x: x, device="cpu", eps=1e-4)
    x, calls = sampler(Gaussian(sde), z)
    a, s = (float(v) for v in sde.marginal_prob(torch.ones(1), torch.ones(1)))
    exact = 0.5 + 0.3 / math.sqrt(a**2 * 0.09 + s**2) * (z - a * 0.5)
    torch.testing.assert_close(x, exact, rtol=0, atol=3e-3)
    assert calls > 10
    denoised, _ = ours.get_ode_sampler(sde, (2, 50), lambda x: x, denoise=True, device="cpu")(Gaussian(sde), z)
    assert not torch.equal(denoised, x)


def test_pc_sampler_on_gaussian_data():
    sde = ours.VPSDE(N=300)
    torch.manual_seed(0)
    sampler = ours.get_pc_sampler(
        sde,
        (1, 20_000),
        ours.ReverseDiffusionPredictor,
        None,
        lambda x: x,
        0.1,
        device="cpu",
    )
    x, _ = sampler(Gaussian(sde))
    # A false alarm is beyond five standard errors, the discretisation's own bias within one percent.
    assert x.mean().item() == pytest.approx(0.5, abs=5 * 0.3 / math.sqrt(20_000) + 0.01)
    assert x.std().item() == pytest.approx(0.3, rel=0.05)


def test_an_sde_of_the_user_s_own():
    class Mine(ours.VPSDE):
        def sde(self, x, t):
            drift, diffusion = super().sde(x, t)
            return 2 * drift, diffusion

    sde = Mine(N=N)
    x, t = torch.randn(2, 3, 4), torch.tensor([0.7, 0.3])
    predictor = ours.EulerMaruyamaPredictor(sde, lambda x, t: model(x, t * 999))
    torch.manual_seed(0)
    new, mean = predictor.update_fn(x, t)
    torch.manual_seed(0)
    z = torch.randn_like(x)
    drift, g = sde.sde(x, t)
    exact = x - (drift - wide(g, x) ** 2 * model(x, t * 999)) / N
    torch.testing.assert_close(mean, exact)
    torch.testing.assert_close(new, exact + wide(g, x) * np.sqrt(1 / N) * z)


def test_a_predictor_of_the_user_s_own():
    @ours.register_predictor(name="halving")
    class Halving(ours.Predictor):
        def update_fn(self, x, t):
            return x / 2, x / 2

    try:
        assert ours.get_predictor("halving") is Halving
        with pytest.raises(ValueError, match="Already registered model with name: halving"):
            ours.register_predictor(Halving, name="halving")
        torch.manual_seed(0)
        x, _ = ours.get_pc_sampler(SDES["vp"](), (1, 3), Halving, None, lambda x: x, 0.1, device="cpu")(model)
        torch.manual_seed(0)
        torch.testing.assert_close(x, torch.randn(1, 3) / 2**N)
    finally:
        del ours._predictors["halving"]


def test_gradients_and_broadcasts():
    sde = SDES["vp"]()
    x = torch.randn(2, 3, requires_grad=True)
    predictor = ours.ReverseDiffusionPredictor(sde, ours.get_score_fn(sde, model))
    predictor.update_fn(x, torch.tensor([0.5, 0.6]))[1].sum().backward()
    assert x.grad.abs().sum() > 0
    x = x.detach()
    flat = ours.ReverseDiffusionPredictor(sde, lambda x, t: x.mean(1, keepdim=True))
    full = ours.ReverseDiffusionPredictor(sde, lambda x, t: x.mean(1, keepdim=True).expand_as(x).clone())
    results = []
    for p in (flat, full):
        torch.manual_seed(0)
        results.append(p.update_fn(x, torch.tensor([0.5, 0.6]))[0])
    torch.testing.assert_close(*results)


def test_sampler_by_configuration():
    sampling = dict(
        predictor="Euler_Maruyama",
        corrector="none",
        snr=0.1,
        n_steps_each=1,
        probability_flow=False,
        noise_removal=True,
    )
    for method in ("pc", "ode"):
        config = SimpleNamespace(
            sampling=SimpleNamespace(method=method, **sampling), training=SimpleNamespace(continuous=True), device="cpu"
        )
        sampler = ours.get_sampling_fn(config, SDES["vp"](), (2, 3), lambda x: x, 1e-3)
        assert sampler(model)[0].shape == (2, 3)
    config.sampling.method = "other"
    with pytest.raises(ValueError, match=r"Sampler name other unknown\."):
        ours.get_sampling_fn(config, SDES["vp"](), (2, 3), lambda x: x, 1e-3)


def test_shared_updates_and_refusals():
    sde, x, t = SDES["ve"](), torch.randn(2, 3), torch.tensor([0.5, 0.6])
    assert ours.shared_predictor_update_fn(x, t, sde, model, None, False, True) == (x, x)
    assert ours.shared_corrector_update_fn(x, t, sde, model, None, True, 0.1, 1) == (x, x)
    assert (
        ours.shared_predictor_update_fn(x, t, sde, model, ours.AncestralSamplingPredictor, False, True)[0].shape
        == x.shape
    )
    assert ours.shared_corrector_update_fn(x, t, sde, model, ours.LangevinCorrector, True, 0.1, 1)[0].shape == x.shape
    with pytest.raises(NotImplementedError, match=r"SDE class subVPSDE not yet supported\."):
        ours.AncestralSamplingPredictor(SDES["subvp"](), model)
    with pytest.raises(NotImplementedError, match=r"SDE class int not yet supported\."):
        ours.get_score_fn(3, model)
    with pytest.raises(AssertionError, match="Probability flow not supported"):
        ours.AncestralSamplingPredictor(sde, model, probability_flow=True)
