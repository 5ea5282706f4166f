"""SEDD's sampler: its tokens against the published steps written out, its law against the exact one."""

import itertools
import math

import pytest
import torch
from text_peers import Joint, Mixer, chain, chi_square, draw, sedd_weights

import genfast
from genfast.samplers.text.noise import find_noise, levels, move_chance

JOINT = Joint()
CASES = [(graph, predictor) for graph in ("absorb", "uniform") for predictor in ("analytic", "euler")]
cases = pytest.mark.parametrize("graph, predictor", CASES, ids=["-".join(c) for c in CASES])


def options(graph, size):
    """What a graph of ``size`` ids asks for; the mask is the last one."""
    return dict(mask_id=size - 1) if graph == "absorb" else dict(graph="uniform", vocab_size=size)


def plan(predictor, noise, steps, eps, denoise):
    """(rule, amount, sigma) of every step, from the formulas."""
    times = [1 - i * (1 - eps) / steps for i in range(steps + 1)]
    if noise == "loglinear":
        sigma = [-math.log(1 - (1 - 1e-3) * t) for t in times]
        rate = [(1 - 1e-3) / (1 - (1 - 1e-3) * t) for t in times]
    else:
        sigma = [1e-3 ** (1 - t) * 1.0**t for t in times]
        rate = [s * math.log(1 / 1e-3) for s in sigma]
    amounts = (
        [(1 - eps) / steps * r for r in rate] if predictor == "euler" else [a - b for a, b in itertools.pairwise(sigma)]
    )
    moves = [(predictor, amount, s) for amount, s in zip(amounts, sigma[:-1])]
    return moves + [("denoise", sigma[-1], sigma[-1])] * denoise


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@cases
def test_a_generator_gives_the_published_tokens(graph, predictor, noise):
    size, shape = 11, (4, 9)
    model, g = Mixer(size), torch.Generator().manual_seed(3)
    x = torch.full(shape, size - 1) if graph == "absorb" else torch.randint(0, size, shape, generator=g)
    for rule, amount, sigma in plan(predictor, noise, 7, 1e-5, True):
        log_score = model(x, torch.full((4,), sigma)).scatter(-1, x[..., None], 0.0)
        weights = sedd_weights(x, log_score, graph, rule, amount)
        x = draw(weights, torch.rand(weights.shape, generator=g))

    def scores(x, sigma):
        return model(x, sigma).scatter(-1, x[..., None], 0.0)

    got = genfast.generate_sedd(
        scores,
        4,
        length=9,
        steps=7,
        predictor=predictor,
        noise=noise,
        generator=torch.Generator().manual_seed(3),
        **options(graph, size),
    )
    assert torch.equal(got.tokens, x)
    assert got.evaluations == got.steps == 8


@cases
def test_joint_law_of_the_samples(graph, predictor):
    """15000 samples of two steps, exact scores: the law of the chain with the published weights."""
    scores = JOINT.absorb_scores if graph == "absorb" else JOINT.uniform_scores
    noise, eps = "loglinear", 0.02
    if graph == "absorb":
        states = JOINT.states
        start = (states, (states == JOINT.mask).all(1).double())
    else:
        states = JOINT.texts
        start = (states, torch.full((len(states),), 1 / len(states), dtype=torch.float64))

    def step(rule, amount, sigma):
        return lambda x: sedd_weights(x, scores(x, torch.full((len(x),), sigma)), graph, rule, amount)

    law = chain(JOINT, start, [step(*move) for move in plan(predictor, noise, 2, eps, True)])
    got = genfast.generate_sedd(
        scores,
        15000,
        length=3,
        steps=2,
        predictor=predictor,
        eps=eps,
        seed=5,
        **options(graph, 4 if graph == "absorb" else 3),
    )
    base = 4 if graph == "absorb" else 3
    chi_square(torch.bincount(JOINT.index(got.tokens, base), minlength=len(states)), law)


def test_many_steps_reach_the_data():
    """What the chain of the test above converges to is the joint distribution itself."""
    states = JOINT.states
    start = (states, (states == JOINT.mask).all(1).double())

    def step(rule, amount, sigma):
        return lambda x: sedd_weights(x, JOINT.absorb_scores(x, torch.full((len(x),), sigma)), "absorb", rule, amount)

    law = chain(JOINT, start, [step(*move) for move in plan("analytic", "loglinear", 80, 1e-5, True)])
    assert (law[JOINT.index(JOINT.texts)] - JOINT.p).abs().max() < 4e-3


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_rows_depend_on_nothing_but_their_seed(graph):
    model = Mixer(13)
    common = dict(length=6, steps=5, pad_id=0, **options(graph, 13))
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]

    def run(prompt, **other):
        return genfast.generate_sedd(model, prompt, **common, **other)

    whole = run(prompts, seed=7)
    assert whole.start == 3 and whole.pad.tolist() == [0, 2, 1]
    for b, prompt in enumerate(prompts):
        alone = run([prompt], seed=7, offset=b)
        assert torch.equal(alone.tokens[0], whole.tokens[b, whole.pad[b] :])
        assert torch.equal(whole.tokens[b, whole.pad[b] : 3], prompt)
    seeds = torch.tensor([7, 8, 7])
    own = run(prompts, seed=seeds)
    assert torch.equal(own.tokens[:1], run(prompts[:1], seed=7).tokens)
    assert torch.equal(own.tokens[2, 1:], run(prompts[2:], seed=7).tokens[0])
    assert not torch.equal(run(prompts, seed=8).tokens, whole.tokens)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_infilling_keeps_what_is_given(graph):
    given = torch.full((2, 8), -1)
    given[:, 2] = torch.tensor([3, 4])
    given[:, 7] = 5
    seen = []

    def model(x, sigma):
        seen.append(x.clone())
        return Mixer(9)(x, sigma)

    prompt = torch.tensor([[1, 2], [2, 1]])
    got = genfast.generate_sedd(model, prompt, length=8, steps=6, given=given, seed=1, **options(graph, 9))
    for x in (*seen, got.tokens):
        assert torch.equal(x[:, :2], prompt)
        assert torch.equal(x[:, 2:][given >= 0], given[given >= 0])
    assert (got.order[:, 2:][given >= 0] == 0).all() and (got.order[:, :2] == 0).all()
    again = genfast.generate_sedd(model, prompt, length=8, steps=6, given=given[0], seed=1, **options(graph, 9))
    assert (again.tokens[:, 4] == 3).all()


def test_uniform_start_is_uniform():
    """60000 draws of 7: chi-square, a false alarm once in 10^5 seeds."""
    got = genfast.generate_sedd(
        lambda x, sigma: torch.zeros(*x.shape, 7).scatter(-1, x[..., None], 30.0),
        10000,
        length=6,
        steps=1,
        graph="uniform",
        vocab_size=7,
        denoise=False,
        predictor="euler",
        seed=2,
    )
    chi_square(torch.bincount(got.tokens.flatten(), minlength=7), torch.full((7,), 1 / 7, dtype=torch.float64))


def test_without_the_last_step_masks_may_stay():
    got = genfast.generate_sedd(JOINT.absorb_scores, 50, length=3, steps=2, mask_id=3, eps=0.3, denoise=False, seed=0)
    assert (got.tokens == 3).any() and (got.tokens != 3).any()
    assert ((got.order == 0) == (got.tokens == 3)).all()


def test_callback_sees_every_step():
    seen = []
    got = genfast.generate_sedd(
        Mixer(6),
        2,
        length=4,
        steps=3,
        mask_id=5,
        seed=0,
        callback=lambda s: seen.append((s.step, s.x.clone(), s.block)),
    )
    assert [s for s, *_ in seen] == [1, 2, 3, 4] and seen[0][2] == (0, 4)
    assert torch.equal(seen[-1][1], got.tokens)


@pytest.mark.parametrize("name, published", [("loglinear", 1e-3), ("geometric", (1e-3, 1.0))])
def test_noise(name, published):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma, rate = find_noise(name)(t)
    h = 1e-6
    slope = (find_noise(name)(t + h)[0] - find_noise(name)(t - h)[0]) / (2 * h)
    assert torch.allclose(slope[1:-1], rate[1:-1], rtol=1e-6)
    if name == "loglinear":
        assert torch.allclose(move_chance(sigma), (1 - published) * t)
    else:
        assert torch.allclose(sigma, published[0] ** (1 - t) * published[1] ** t)
    table = levels(name, 10, 0.0)
    m = move_chance(sigma).flip(0)
    assert torch.allclose(torch.tensor(table.stay, dtype=torch.float64), m[1:] / m[:-1])


REFUSALS = [
    (dict(graph="ring"), "graph must be"),
    (dict(predictor="exact"), "predictor must be"),
    (dict(mask_id=None), "mask_id goes with"),
    (dict(vocab_size=4), "vocab_size goes with"),
    (dict(graph="uniform", mask_id=None), "needs vocab_size"),
    (dict(noise="cosine"), "noise must be"),
    (dict(noise=3), "noise must be"),
    (dict(steps=0), "steps must be"),
    (dict(eps=1.0), "eps must be"),
    (dict(given=torch.zeros(5, dtype=torch.int64)), "given is"),
    (dict(given=torch.zeros(4)), "given must be"),
    (dict(seed=1, generator=torch.Generator()), "exclude"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        genfast.generate_sedd(Mixer(6), 2, **{**dict(length=4, steps=3, mask_id=5), **changes})
    with pytest.raises(ValueError, match="sigma_min"):
        genfast.GeometricNoise(1.0, 0.5)
    with pytest.raises(ValueError, match="eps must be"):
        genfast.LogLinearNoise(0.0)
