"""SEDD's published names: graphs, samplers and losses against the formulas written out with matrices."""

from types import SimpleNamespace

import pytest
import torch
from text_peers import Joint, Mixer, chi_square, draw, rates, sedd_weights

import genfast
from genfast.dropin import sedd as ours

SIZE = 7  # the mask included
GRAPHS = {"absorb": lambda: ours.Absorbing(SIZE - 1), "uniform": lambda: ours.Uniform(SIZE)}
graphs = pytest.mark.parametrize("graph", GRAPHS)


def config(**sections):
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in sections.items()})


class Scores(Mixer):
    """Log scores, 0 at the token that is there."""

    def forward(self, x, sigma):
        return super().forward(x, sigma).scatter(-1, x[..., None], 0.0)


def published(model, graph, noise, shape, predictor, steps, denoise, eps=1e-5, project=lambda x: x):
    """The sampler written out; draws from torch's default generator."""
    x = torch.full(shape, SIZE - 1) if graph == "absorb" else torch.randint(0, SIZE, shape)
    times, dt = torch.linspace(1, eps, steps + 1), (1 - eps) / steps
    moves = []
    for t in times[:-1]:
        sigma, rate = noise(t)
        moves.append((predictor, dt * rate if predictor == "euler" else sigma - noise(t - dt)[0], sigma))
    if denoise:
        moves.append(("denoise", noise(times[-1])[0], noise(times[-1])[0]))
    for rule, amount, sigma in moves:
        x = project(x)
        weights = sedd_weights(x, model(x, sigma.expand(shape[0])), graph, rule, amount.double()).float()
        x = draw(weights, torch.rand(weights.shape))
    return x


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize(
    "noise", [ours.LogLinearNoise(), ours.GeometricNoise(1e-3, 2.0)], ids=["loglinear", "geometric"]
)
@pytest.mark.parametrize("predictor", ["euler", "analytic"])
@graphs
@torch.no_grad()
def test_a_seeded_run_gives_the_published_tokens(graph, predictor, noise, denoise):
    model, shape = Scores(SIZE), (3, 10)
    torch.manual_seed(4)
    expected = published(model, graph, noise, shape, predictor, 6, denoise)
    torch.manual_seed(4)
    sampler = ours.get_pc_sampler(GRAPHS[graph](), noise, shape, predictor, 6, denoise=denoise)
    assert torch.equal(sampler(model), expected)

    class Mine(type(GRAPHS[graph]())):
        """A graph of a user's own: the steps in plain PyTorch."""

    mine = Mine(SIZE - (graph == "absorb"))
    torch.manual_seed(4)
    assert torch.equal(ours.get_pc_sampler(mine, noise, shape, predictor, 6, denoise=denoise)(model), expected)
    with pytest.raises(ValueError, match="seed needs"):
        ours.get_pc_sampler(mine, noise, shape, predictor, 2, seed=1)(model)


@graphs
def test_seeded_in_the_kernel_it_is_generate_sedd(graph):
    model = Scores(SIZE)
    sampler = ours.get_pc_sampler(GRAPHS[graph](), ours.LogLinearNoise(), (4, 9), "analytic", 6, seed=3)
    own = dict(mask_id=SIZE - 1) if graph == "absorb" else dict(graph="uniform", vocab_size=SIZE)
    whole = sampler(model)
    assert torch.equal(whole, genfast.generate_sedd(model, 4, length=9, steps=6, seed=3, **own).tokens)
    part = ours.get_pc_sampler(GRAPHS[graph](), ours.LogLinearNoise(), (2, 9), "analytic", 6, seed=3, offset=1)
    assert torch.equal(part(model), whole[1:3])
    fresh = ours.get_pc_sampler(
        GRAPHS[graph](), ours.LogLinearNoise(), (4, 9), "euler", 2, seed=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(fresh(model), fresh(model))
    seeds = torch.tensor([3, 5])
    rows = ours.get_pc_sampler(GRAPHS[graph](), ours.LogLinearNoise(), (2, 9), "analytic", 6, seed=seeds)
    assert torch.equal(rows(model)[:1], whole[:1])


@torch.no_grad()
def test_known_tokens_are_put_back_before_every_step():
    seen = []

    def project(x):
        x[:, :2] = 1
        return x

    class Watching(Scores):
        def forward(self, x, sigma):
            seen.append(x[:, :2].clone())
            return super().forward(x, sigma)

    args = (ours.LogLinearNoise(), (3, 6), "analytic", 4)
    torch.manual_seed(0)
    got = ours.get_pc_sampler(GRAPHS["uniform"](), *args, proj_fun=project)(Watching(SIZE))
    assert all((x == 1).all() for x in seen) and len(seen) == 5
    torch.manual_seed(0)
    expected = published(Scores(SIZE), "uniform", args[0], (3, 6), "analytic", 4, True, project=project)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rule", ["euler", "analytic", "denoise"])
@graphs
@torch.no_grad()
def test_a_score_function_of_a_users_own(graph, rule):
    model, noise = Scores(SIZE), ours.LogLinearNoise()
    x = torch.randint(0, SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    x[:, ::2] = SIZE - 1
    t = torch.full((2, 1), 0.4)

    def own(x, sigma):
        return model(x, sigma).exp()

    results = []
    for score_fn in (own, ours.get_score_fn(model, sampling=True)):
        torch.manual_seed(5)
        if rule == "denoise":
            results.append(ours.Denoiser(GRAPHS[graph](), noise).update_fn(score_fn, x, t))
        else:
            results.append(ours.get_predictor(rule)(GRAPHS[graph](), noise).update_fn(score_fn, x, t, 0.1))
    assert torch.equal(*results)
    assert torch.equal(ours.get_score_fn(model)(x, t).exp(), ours.get_score_fn(model, sampling=True)(x, t))


@graphs
def test_rows_and_columns_of_the_rates(graph):
    g, q = GRAPHS[graph](), rates(graph, SIZE).float()
    i = torch.arange(SIZE).repeat(2, 1)
    sigma = torch.tensor([[0.3], [1.7]])
    powers = [torch.matrix_exp(s * rates(graph, SIZE)).float() for s in sigma.flatten()]
    assert g.dim == SIZE and g.absorb == (graph == "absorb")
    assert torch.allclose(g.rate(i).float(), q.T[i]) and torch.allclose(g.transp_rate(i).float(), q[i])
    for b in range(2):
        assert torch.allclose(g.transition(i, sigma)[b], powers[b].T, atol=1e-6)
        assert torch.allclose(g.transp_transition(i, sigma)[b], powers[b], atol=1e-6)
    score = torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    before = score.clone()
    for b in range(2):
        inverse = torch.matrix_exp(-sigma[b] * rates(graph, SIZE)).float()
        assert torch.allclose(g.staggered_score(score, sigma)[b], score[b] @ inverse.T, atol=1e-5)
    flow = g.reverse_rate(i, score)
    assert torch.allclose(flow.sum(-1), torch.zeros(2, SIZE), atol=1e-5)
    off = ~torch.eye(SIZE, dtype=torch.bool)
    assert torch.allclose(flow[:, off], (q * score)[:, off]) and torch.equal(score, before)


@graphs
def test_noising(graph):
    """40000 tokens, chi-square, a false alarm once in 10^5 seeds."""
    g = GRAPHS[graph]()
    torch.manual_seed(1)
    i = torch.full((40000, 1), 2)
    found = g.sample_transition(i, torch.tensor([[0.8]]))
    law = torch.matrix_exp(0.8 * rates(graph, SIZE))[:, 2].clamp_min(0)
    chi_square(torch.bincount(found.flatten(), minlength=SIZE), law)
    limit = torch.bincount(g.sample_limit(40000, 1).flatten(), minlength=SIZE)
    if graph == "absorb":
        assert limit[-1] == 40000
    else:
        chi_square(limit, torch.full((SIZE,), 1 / SIZE, dtype=torch.float64))


@graphs
def test_the_loss_is_zero_at_the_true_ratios_and_nowhere_below(graph):
    g = GRAPHS[graph]()
    gen = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, SIZE - 1, (64, 5), generator=gen)
    sigma = torch.rand(64, 1, generator=gen) * 2 + 0.01
    torch.manual_seed(0)
    x = g.sample_transition(x0, sigma)
    assert (x != x0).any() and (x == x0).any()
    columns = torch.stack([torch.matrix_exp(s * rates(graph, SIZE)) for s in sigma.double().flatten()])
    p = columns[torch.arange(64)[:, None], :, x0]  # p(y | x0)
    truth = (p / p.gather(-1, x[..., None])).log().float().clamp_min(-80).requires_grad_()
    loss = g.score_entropy(truth, sigma, x, x0)
    assert loss.shape == (64, 5) and loss.abs().max() < 1e-4 * (1 + 1 / sigma.min())
    (gradient,) = torch.autograd.grad(loss.sum(), truth)
    assert gradient.abs().max() < 1e-4 * (1 + 1 / sigma.min())
    for scale in (0.1, 1.0):
        other = truth + scale * torch.randn(truth.shape, generator=gen)
        worse = g.score_entropy(other, sigma, x, x0)
        moved = x == SIZE - 1 if graph == "absorb" else torch.ones_like(x, dtype=torch.bool)
        assert (worse[moved] > 0).all() and (worse[~moved] == 0).all()


@graphs
def test_loss_function(graph):
    g, noise, model = GRAPHS[graph](), ours.LogLinearNoise(), Scores(SIZE)
    loss_fn = ours.get_loss_fn(noise, g, train=True)
    x0 = torch.randint(0, SIZE - 1, (3, 6), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.9])
    x = g.sample_transition(x0, noise(t)[0][:, None])
    sigma, rate = noise(t)
    expected = (rate[:, None] * g.score_entropy(model(x, sigma), sigma[:, None], x, x0)).sum(1)
    assert torch.allclose(loss_fn(model, x0, t=t, perturbed_batch=x), expected)
    assert model.training and loss_fn(model, x0).shape == (3,)
    ours.get_loss_fn(noise, g, train=False)(model, x0)
    assert not model.training
    with pytest.raises(NotImplementedError):
        ours.get_loss_fn(noise, g, train=False, lv=True)(model, x0)


def test_expected_loss_bounds_the_likelihood():
    """The expected loss of exact scores is the divergence of the text from the model's law, up to the last noise.

    On the absorbing graph with exact conditionals the integral over t of E[loss] is the entropy of the data less that
    of a text given itself: -log P averaged over the data, here by quadrature over t and the sum over all noisings.
    """
    joint = Joint(size=2, length=2, seed=3)
    graph, noise = ours.Absorbing(2), ours.LogLinearNoise(1e-5)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)[1:] - 0.5 / 2000
    keep = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)
    bound = 0.0
    for x0, p in zip(joint.texts, joint.p):
        for stays in keep:
            x = torch.where(stays, x0, 2).expand(len(t), 2)
            sigma, rate = noise(t)
            chance = torch.where(stays, torch.exp(-sigma)[:, None], -torch.expm1(-sigma)[:, None]).prod(1)
            loss = graph.score_entropy(joint.absorb_scores(x, sigma).double(), sigma[:, None], x, x0.expand(len(t), 2))
            bound += p * (chance * rate * loss.double().sum(1)).mean()
    assert float(bound) == pytest.approx(-float((joint.p * joint.p.log()).sum()), rel=2e-3)


def test_by_configuration():
    assert isinstance(ours.get_noise(config(noise=dict(type="loglinear"))), ours.LogLinearNoise)
    noise = ours.get_noise(config(noise=dict(type="geometric", sigma_min=1e-4, sigma_max=20.0)))
    assert float(noise(torch.tensor(1.0))[0]) == pytest.approx(20.0)
    assert len(list(ours.GeometricNoise(learnable=True).parameters())) == 2
    with pytest.raises(ValueError, match="not a valid noise"):
        ours.get_noise(config(noise=dict(type="cosine")))
    graph = ours.get_graph(config(graph=dict(type="absorb"), tokens=SIZE - 1), "cpu")
    assert isinstance(ours.get_graph(config(graph=dict(type="uniform"), tokens=4), "cpu"), ours.Uniform)
    with pytest.raises(ValueError, match="not valid"):
        ours.get_graph(config(graph=dict(type="ring"), tokens=4), "cpu")
    asked = config(sampling=dict(predictor="analytic", steps=5, noise_removal=True))
    sample = ours.get_sampling_fn(asked, graph, ours.LogLinearNoise(), (2, 4), 1e-5, "cpu")
    assert (sample(Scores(SIZE)) < SIZE - 1).all()


def test_predictors_of_a_users_own():
    @ours.register_predictor(name="test-backwards")
    class Backwards(ours.Predictor):
        def update_fn(self, score_fn, x, t, step_size):
            return x.flip(1)

    assert ours.get_predictor("test-backwards") is Backwards
    with pytest.raises(ValueError, match="Already registered"):
        ours.register_predictor(name="test-backwards")(Backwards)
    graph, noise = ours.Absorbing(SIZE - 1), ours.LogLinearNoise()
    x = ours.get_pc_sampler(graph, noise, (1, 3), "test-backwards", 3, denoise=False)(Scores(SIZE))
    assert (x == SIZE - 1).all()
    x = ours.get_pc_sampler(graph, noise, (1, 3), "none", 3, denoise=False, seed=1)(Scores(SIZE))
    assert (x == SIZE - 1).all()


def test_drawing_from_weights():
    """40000 draws, chi-square, a false alarm once in 10^5 seeds; a negative weight never wins."""
    weights = torch.tensor([0.5, 0.0, -0.2, 1.5])
    torch.manual_seed(0)
    found = torch.bincount(ours.sample_categorical(weights.expand(40000, 4)), minlength=4)
    chi_square(found, torch.tensor([0.25, 0.0, 0.0, 0.75], dtype=torch.float64))
    with pytest.raises(ValueError, match="not valid"):
        ours.sample_categorical(weights, method="soft")
    x, y = torch.zeros(2, 3), torch.zeros(2, 3, 4, 5)
    assert ours.unsqueeze_as(x, y).shape == (2, 3, 1, 1) and ours.unsqueeze_as(x, y, False).shape == (1, 1, 2, 3)
