"""MDLM's published names on a stand-in for its class, against the formulas written out."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_peers import Joint, Mixer, chi_square, draw, mdlm_weights, sedd_weights

from genfast.dropin import mdlm as ours
from genfast.dropin.sedd import LogLinearNoise

SIZE = 9
MASK = SIZE - 1


class Diffusion:
    """What the functions ask of MDLM's class."""

    dtype, device, time_conditioning = torch.float32, "cpu", False

    def __init__(self, backbone, sampler="ddpm", parameterization="subs", mask=MASK, batch=3, length=10, removal=True):
        self.backbone, self.sampler, self.parameterization = backbone, sampler, parameterization
        self.noise, self.mask_index = LogLinearNoise(), mask
        self.tokenizer = SimpleNamespace(eos_token_id=0, batch_decode=lambda ids: [row.tolist() for row in ids])
        self.config = SimpleNamespace(
            noise=SimpleNamespace(type="loglinear"),
            loader=SimpleNamespace(eval_batch_size=batch),
            model=SimpleNamespace(length=length),
            sampling=SimpleNamespace(steps=8, noise_removal=removal),
        )

    def _process_sigma(self, sigma):
        sigma = sigma.reshape(-1)
        return sigma if self.time_conditioning else torch.zeros_like(sigma)

    def forward(self, x, sigma):
        """Log-probabilities, without certainty where nothing is masked; or log scores."""
        found = self.backbone(x, self._process_sigma(sigma))
        if self.parameterization == "sedd":
            return found.scatter(-1, x[..., None], 0.0)
        return found.log_softmax(-1)


def chance(t):
    return 1 - torch.exp(-LogLinearNoise()(t)[0])


@torch.no_grad()
def published(diffusion, eps=1e-5):
    """The loop of the published class, SUBS; draws from torch's default generator."""
    config, mask = diffusion.config, diffusion.mask_index
    steps, batch = config.sampling.steps, config.loader.eval_batch_size
    x = torch.full((batch, config.model.length), mask)
    times, dt = torch.linspace(1, eps, steps + 1), (1 - eps) / steps

    def logits(t):
        return diffusion.backbone(x, diffusion._process_sigma(diffusion.noise(t)[0].expand(batch)))

    for t in times[:-1]:
        # The caching update takes t itself for the probability of being masked.
        weights = mdlm_weights(
            x, logits(t), *((t, t - dt) if "cache" in diffusion.sampler else map(chance, (t, t - dt))), mask
        )
        x = draw(weights, torch.rand(weights.shape))
    if config.sampling.noise_removal:
        weights = mdlm_weights(x, logits(times[-1]), 1.0, 0.0, mask)
        x = draw(weights, torch.rand(weights.shape)) if diffusion.sampler == "analytic" else weights.argmax(-1)
    return x


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("removal", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache", "analytic"])
def test_a_seeded_run_gives_the_published_tokens(sampler, removal, timed):
    diffusion = Diffusion(Mixer(SIZE), sampler, removal=removal)
    diffusion.time_conditioning = timed
    torch.manual_seed(3)
    expected = published(diffusion, eps=0.2)
    assert removal == (expected != MASK).all()
    torch.manual_seed(3)
    assert torch.equal(ours._sample(diffusion, eps=0.2), expected)
    assert torch.equal(ours._sample(diffusion, 5, seed=4), ours._sample(diffusion, num_steps=5, seed=4))


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache", "analytic"])
def test_seeded_in_the_kernel_rows_do_not_depend_on_the_batch(sampler):
    whole = ours._sample(Diffusion(Mixer(SIZE), sampler, batch=4), seed=3)
    part = ours._sample(Diffusion(Mixer(SIZE), sampler, batch=2), seed=3, offset=1)
    assert torch.equal(part, whole[1:3])


def test_in_the_place_of_the_published_methods():
    class Patched(Diffusion):
        _sample = functools.partialmethod(ours._sample, seed=torch.default_generator)
        sample_subs_guidance = ours.sample_subs_guidance

    diffusion = Patched(Mixer(SIZE))
    torch.manual_seed(0)
    first, second = diffusion._sample(num_steps=4, eps=1e-5), diffusion._sample(num_steps=4)
    torch.manual_seed(0)
    assert torch.equal(diffusion._sample(num_steps=4), first) and not torch.equal(first, second)
    assert len(diffusion.sample_subs_guidance(n_samples=1, stride_length=2, num_strides=1, dt=0.5)) == 3


def test_caching_saves_calls():
    plain, cached = Mixer(SIZE), Mixer(SIZE)
    a = ours._sample(Diffusion(plain, "ddpm", length=4, batch=1), 60, seed=1)
    b = ours._sample(Diffusion(cached, "ddpm_cache", length=4, batch=1), 60, seed=1)
    assert torch.equal(a, b) and plain.calls == 61 and cached.calls <= 6


def test_ids_above_100000():
    """torch.allclose finds no difference between the mask and its neighbour; what the model said is then kept."""
    mask = 100_001

    def model(x, sigma):
        calls.append(1)
        logits = torch.zeros(*x.shape, mask + 1)
        logits[..., mask - 1] = 40.0
        return logits

    counts = []
    for compat in (False, True):
        calls = []
        found = ours._sample(Diffusion(model, "ddpm_cache", mask=mask, batch=1, length=3), 6, seed=0, compat=compat)
        assert (found == mask - 1).all()
        counts.append(len(calls))
    assert counts[1] == 2 < counts[0]


@torch.no_grad()
def test_updates():
    diffusion, g = Diffusion(Mixer(SIZE)), torch.Generator().manual_seed(0)
    x = torch.randint(0, SIZE - 1, (3, 10), generator=g)
    x[torch.rand(3, 10, generator=g) < 0.7] = MASK
    t, dt = torch.tensor([[0.9], [0.5], [0.2]]), 0.1
    torch.manual_seed(1)
    weights = torch.cat(
        [mdlm_weights(x[b : b + 1], diffusion.backbone(x)[b : b + 1], t[b], t[b] - dt, MASK) for b in range(3)]
    )
    expected = draw(weights, torch.rand(weights.shape))
    torch.manual_seed(1)
    kept, found = ours._ddpm_caching_update(diffusion, x, t, dt)
    assert torch.equal(found, expected)
    p = kept.probabilities(x)
    assert torch.allclose(p.sum(-1), torch.ones(3, 10)) and (p[..., MASK] == 0).all()
    assert torch.allclose(p, ours._subs_parameterization(diffusion, kept.logits, x).exp())
    calls = diffusion.backbone.calls
    for given in (kept, p):
        torch.manual_seed(1)
        again, found = ours._ddpm_caching_update(diffusion, x, t, dt, p_x0=given)
        assert again is given and torch.equal(found, expected) and diffusion.backbone.calls == calls
    torch.manual_seed(1)
    assert torch.equal(ours._ddpm_update(diffusion, x, t, dt), expected)
    torch.manual_seed(1)
    assert torch.equal(ours._analytic_update(diffusion, x, t, dt), expected)
    a = ours._ddpm_update(diffusion, x, t, dt, seed=5, stream=2)
    assert torch.equal(a, ours._ddpm_caching_update(diffusion, x, t, dt, kept, seed=5, stream=2)[1])
    done = ours._denoiser_update(diffusion, x, t)
    assert (done != MASK).all() and torch.equal(done[x != MASK], x[x != MASK])
    diffusion.config.noise.type = "geometric"
    with pytest.raises(ValueError, match="loglinear"):
        ours._ddpm_caching_update(diffusion, x, t, dt)


@torch.no_grad()
def test_other_parameterisations():
    """D3PM: the mask has a share of its own in p(x0). SEDD: log scores."""
    x = torch.full((3, 10), MASK)
    x[:, ::3] = 2
    t, dt = torch.full((3, 1), 0.5), 0.1
    diffusion = Diffusion(Mixer(SIZE), parameterization="d3pm")
    weights = diffusion.forward(x, t).exp() * (chance(t) - chance(t - dt))[..., None]
    weights[..., MASK] = chance(t - dt)
    torch.manual_seed(2)
    expected = torch.where(x == MASK, draw(weights, torch.rand(weights.shape)), x)
    torch.manual_seed(2)
    assert torch.equal(ours._ddpm_update(diffusion, x, t, dt), expected)
    with pytest.raises(ValueError, match="seed needs"):
        ours._ddpm_update(diffusion, x, t, dt, seed=1)
    assert (ours._sample(diffusion, 4) >= 0).all()

    diffusion = Diffusion(Mixer(SIZE), "analytic", parameterization="sedd")
    sigma, before = LogLinearNoise()(t)[0], LogLinearNoise()(t - dt)[0]
    score = diffusion.forward(x, sigma)
    weights = sedd_weights(x, score, "absorb", "analytic", float((sigma - before)[0])).float()
    torch.manual_seed(2)
    expected = draw(weights, torch.rand(weights.shape))
    torch.manual_seed(2)
    assert torch.equal(ours._analytic_update(diffusion, x, t, dt), expected)
    weights = torch.nn.functional.pad(sedd_weights(x, score, "absorb", "denoise", float(sigma[0])).float(), (0, 1))
    torch.manual_seed(2)
    expected = draw(weights, torch.rand(weights.shape))
    torch.manual_seed(2)
    assert torch.equal(ours._denoiser_update(diffusion, x, t), expected)
    assert (ours._sample(diffusion, 4, seed=1) != MASK).all()


@torch.no_grad()
def test_strides():
    diffusion, dt, stride = Diffusion(Mixer(SIZE), length=8), 0.125, 3
    torch.manual_seed(6)
    pieces, kept, changes = [], None, 0
    for _ in range(3):
        x = torch.full((2, 8), MASK)
        if kept is not None:
            x[:, :5] = kept
        for i in range(9):
            t = torch.tensor(1 - i * dt)
            weights = mdlm_weights(x, diffusion.backbone(x), t, t - dt, MASK)
            found = draw(weights, torch.rand(weights.shape))
            changes += int((found != x).any())
            x = found
        pieces.append(x[:, :stride])
        kept = x[:, stride:]
    expected = torch.cat([*pieces, kept], 1)
    torch.manual_seed(6)
    steps, texts, lengths = ours.sample_subs_guidance(diffusion, 2, stride, 2, dt)
    assert steps == changes
    assert texts == [expected[:, :6].tolist(), expected[:, :9].tolist(), expected.tolist()]
    after = expected[:, 1:]
    ended = [row.tolist().index(0) if 0 in row else len(row) for row in after]
    assert lengths.tolist() == ended and isinstance(lengths, np.ndarray)
    a = ours.sample_subs_guidance(diffusion, 2, stride, 1, dt, seed=1)
    b = ours.sample_subs_guidance(diffusion, 1, stride, 1, dt, seed=1, offset=1)
    assert a[1][-1][1] == b[1][-1][0]


def test_law_of_many_steps():
    """8000 samples of 60 steps with exact conditionals; two positions in one step are rarer than the test sees."""
    joint = Joint(size=2, length=2, seed=4)
    diffusion = Diffusion(lambda x, sigma: joint.logits(x), "ddpm_cache", mask=2, batch=8000, length=2)
    found = ours._sample(diffusion, 60, seed=2)
    chi_square(torch.bincount(joint.index(found, 2), minlength=4), joint.p)


def test_autoregressive_models_have_their_own_loop():
    diffusion = Diffusion(Mixer(SIZE), parameterization="ar")
    diffusion._ar_sampler = lambda batch: torch.full((batch, 2), 5)
    assert ours._sample(diffusion).tolist() == [[5, 5]] * 3


def test_losses():
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    sigma, rate = LogLinearNoise(1e-9)(t)
    assert torch.allclose(ours.nelbo_weight(sigma, rate)[:-1], 1 / t[:-1], rtol=1e-6)
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, SIZE - 1, (6, 5), generator=g)
    for mask in (MASK, 3):
        x0 = torch.where(x0 == mask, 1, x0)
        diffusion = Diffusion(Mixer(SIZE), mask=mask)
        xt = torch.where(torch.rand(6, 5, generator=g) < 0.5, mask, x0)
        sigma = torch.rand(6, 1, generator=g) + 0.1
        truth = torch.full((6, 5, SIZE), -60.0).scatter(-1, x0[..., None], 0.0) - torch.expm1(sigma).log()[..., None]
        loss = ours._score_entropy(diffusion, truth, sigma, xt, x0)
        masked = xt == mask
        assert loss.shape == (6, 5) and loss.abs().max() < 1e-5
        noise = torch.randn(truth.shape, generator=g) * 0.3
        noise[..., mask] = 100.0  # has no share
        worse = ours._score_entropy(diffusion, truth + noise, sigma, xt, x0)
        assert (worse[masked] > 0).all() and (worse[~masked] == 0).all()
    assert math.isclose(
        float(ours.nelbo_weight(torch.tensor(0.5), torch.tensor(2.0))), 2 / math.expm1(0.5), rel_tol=1e-6
    )
