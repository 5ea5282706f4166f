"""MDLM's sampler: its tokens against the published steps written out, its law against the exact one."""

import pytest
import torch
from text_peers import Joint, Mixer, chain, chi_square, draw, mdlm_weights

import genfast
from genfast.samplers.text.transition import row_numbers

JOINT = Joint()
MASKED = (JOINT.states, (JOINT.states == JOINT.mask).all(1).double())


def chance(t):
    """1 - exp(-sigma(t)) of the loglinear noise."""
    return (1 - 1e-3) * t


def counts(tokens):
    return torch.bincount(JOINT.index(tokens), minlength=len(JOINT.states))


@pytest.mark.parametrize("predictor", ["ddpm", "ddpm_cache"])
def test_a_generator_gives_the_published_tokens(predictor):
    size, steps, eps = 11, 12, 0.1
    model, g = Mixer(size), torch.Generator().manual_seed(3)
    x = torch.full((4, 9), size - 1)
    times = torch.linspace(1, eps, steps + 1)
    dt = (1 - eps) / steps
    for t in times[:-1]:
        weights = mdlm_weights(x, model(x), chance(t), chance(t - dt), size - 1)
        x = draw(weights, torch.rand(weights.shape, generator=g))
    assert (x == size - 1).any()  # the last step has something to do
    logits = model(x)
    logits[..., size - 1] = -torch.inf
    x = torch.where(x == size - 1, logits.argmax(-1), x)
    g = torch.Generator().manual_seed(3)
    got = genfast.generate_mdlm(
        model, 4, length=9, steps=steps, predictor=predictor, eps=eps, generator=g, mask_id=size - 1
    )
    assert torch.equal(got.tokens, x)


def test_joint_law_of_ancestral_sampling():
    """15000 samples of two steps: the law of the chain with the published weights."""
    eps, dt = 0.1, 0.9 / 2
    times = [1, 1 - dt]

    def step(t):
        return lambda x: mdlm_weights(x, JOINT.logits(x), chance(t), chance(t - dt), JOINT.mask)

    law = chain(JOINT, MASKED, [step(t) for t in times])
    got = genfast.generate_mdlm(
        JOINT.logits, 15000, length=3, steps=2, eps=eps, mask_id=JOINT.mask, denoise=False, seed=1
    )
    chi_square(counts(got.tokens), law)


def test_first_hitting_draws_from_the_joint_distribution():
    """15000 samples; one position at a time with exact conditionals is exact."""
    got = genfast.generate_mdlm(JOINT.logits, 15000, length=3, predictor="first_hitting", mask_id=JOINT.mask, seed=1)
    chi_square(counts(got.tokens)[JOINT.index(JOINT.texts)], JOINT.p)
    assert (got.order.sort(1).values == torch.tensor([1, 2, 3])).all()
    orders = torch.bincount((got.order.long() * torch.tensor([9, 3, 1])).sum(1))
    chi_square(orders[orders > 0], torch.full((6,), 1 / 6, dtype=torch.float64))
    assert got.evaluations == got.steps == 3


def test_stay_probability():
    """200000 positions stay masked with probability m(s) / m(t): five standard errors."""
    got = genfast.generate_mdlm(
        lambda x: torch.zeros(*x.shape, 4), 1000, length=200, steps=3, eps=0.2, mask_id=3, denoise=False, seed=4
    )
    left = [(got.order == 0).double().mean() + (got.order > step).double().mean() for step in (1, 2, 3)]
    for found, expected in zip(left, (1 - 0.8 / 3, 1 - 1.6 / 3, 0.2)):
        assert abs(found - expected) < 5 * (expected * (1 - expected) / 200000) ** 0.5


def test_caching_saves_calls_and_nothing_else():
    size, common = 11, dict(length=10, steps=60, mask_id=10, seed=3)
    plain, cached = Mixer(size), Mixer(size)
    a = genfast.generate_mdlm(plain, 2, predictor="ddpm", **common)
    b = genfast.generate_mdlm(cached, 2, predictor="ddpm_cache", **common)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.order, b.order)
    assert plain.calls == a.evaluations and cached.calls == b.evaluations
    steps_that_changed = len(set(a.order.flatten().tolist()))
    assert a.evaluations >= 60 and b.evaluations == steps_that_changed


@pytest.mark.parametrize("predictor", ["ddpm", "ddpm_cache", "first_hitting"])
def test_rows_depend_on_nothing_but_their_seed(predictor):
    model = Mixer(13)
    steps = None if predictor == "first_hitting" else 5
    common = dict(length=6, steps=steps, mask_id=12, pad_id=0, predictor=predictor)
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
    given = torch.tensor([[-1] * 6, [-1, 3, -1, -1, 2, -1], [0] * 6])
    whole = genfast.generate_mdlm(model, prompts, seed=7, given=given, **common)
    assert torch.equal(whole.tokens[:, 3:][given >= 0], given[given >= 0])
    assert not (whole.tokens == 12).any()
    for b, prompt in enumerate(prompts):
        alone = genfast.generate_mdlm(model, [prompt], seed=7, offset=b, given=given[b], **common)
        assert torch.equal(alone.tokens[0], whole.tokens[b, whole.pad[b] :])
    own = genfast.generate_mdlm(model, prompts, seed=torch.tensor([7, 8, 7]), given=given, **common)
    assert torch.equal(own.tokens[0], whole.tokens[0])


def test_windows_slide():
    size, seen = 11, []

    def model(x):
        seen.append(x.clone())
        return Mixer(size)(x)

    prompt = torch.tensor([[1, 2], [3, 4]])
    common = dict(mask_id=10, steps=6, seed=2, predictor="ddpm")
    got = genfast.generate_mdlm(model, prompt, length=15, window=8, stride=4, **common)
    assert {x.shape[1] for x in seen} == {8} and not (got.tokens == 10).any()
    # Every window begins with what the one before has left, and its new columns masked.
    starts = [torch.cat([prompt, torch.full((2, 6), 10)], 1)]
    for first, new in ((4, 4), (8, 4), (9, 1)):
        starts.append(torch.cat([got.tokens[:, first : first + 8 - new], torch.full((2, new), 10)], 1))
    calls = [next(k for k, x in enumerate(seen) if torch.equal(x, start)) for start in starts]
    assert calls == sorted(calls) and len(set(calls)) == 4
    alone = genfast.generate_mdlm(model, prompt, length=6, **common)
    assert torch.equal(alone.tokens, got.tokens[:, :8])


def test_a_model_that_knows_the_time():
    seen = []

    def model(x, sigma):
        seen.append(sigma)
        return Mixer(6)(x, sigma)

    common = dict(mask_id=5, seed=1, time_conditioning=True)
    genfast.generate_mdlm(model, 3, length=4, steps=4, predictor="ddpm", **common)
    expected = [-torch.log1p(-torch.tensor(1 - 1e-3) * t) for t in torch.linspace(1, 1e-5, 5)]
    for sigma, e in zip(seen, expected):
        assert sigma.dtype == torch.float32 and torch.allclose(sigma, e.expand(3), rtol=1e-4)
    seen.clear()
    genfast.generate_mdlm(model, 3, length=4, predictor="first_hitting", **common)
    sigma = torch.stack(seen)
    assert (sigma[1:] < sigma[:-1]).all() and len(set(sigma[0].tolist())) == 3


def test_times_of_first_hitting():
    """The largest of n uniform numbers, u^(1/n) of one: 20000 means and their powers, five standard errors."""
    u = row_numbers(5, 20000, 0, 0, "cpu")
    assert ((u > 0) & (u < 1)).all()
    for n in (1, 3):
        assert abs(float((u ** (1 / n)).mean()) - n / (n + 1)) < 5 * (n / (n + 1) ** 2 / (n + 2) / 2e4) ** 0.5
    assert torch.equal(u[10:20], row_numbers(5, 10, 10, 0, "cpu"))
    assert torch.equal(row_numbers(torch.tensor([5, 6]), 2, 3, 0, "cpu")[:1], u[3:4])


def test_temperature_and_nucleus():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def model(x):
        return torch.nn.functional.pad(law.log(), (0, 1), value=9.0).expand(*x.shape, 5)

    def tokens(**options):
        options.setdefault("predictor", "first_hitting")
        return genfast.generate_mdlm(model, 50, length=20, mask_id=4, seed=0, **options).tokens

    assert set(tokens(top_p=0.7).flatten().tolist()) == {0, 1}
    assert (tokens(temperature=0.0) == 0).all()
    assert (tokens(temperature=0.0, predictor="ddpm", steps=3) == 0).all()


REFUSALS = [
    (dict(predictor="analytic"), "predictor must be"),
    (dict(steps=None), "steps goes with"),
    (dict(predictor="first_hitting"), "steps goes with"),
    (dict(time_conditioning=True), "ddpm_cache"),
    (dict(stride=2), "stride goes with window"),
    (dict(window=4), "stride must be"),
    (dict(window=0, stride=1), "window must be"),
    (dict(window=4, stride=5), "leave columns out"),
    (dict(eps=-0.1), "eps must be"),
    (dict(given=torch.zeros(3, 4, dtype=torch.int64)), "given is"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        genfast.generate_mdlm(Mixer(6), 2, **{**dict(length=4, steps=3, mask_id=5), **changes})


def test_windows_refuse_padding():
    prompts = [torch.tensor([1]), torch.tensor([1, 2])]
    with pytest.raises(ValueError, match="prompts of one length"):
        genfast.generate_mdlm(Mixer(6), prompts, length=9, steps=3, mask_id=5, window=4, stride=2)
