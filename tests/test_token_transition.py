"""``discrete_transition``: backends against the reference, its law against matrices and closed forms, parity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from benchmarks import token_transition as published
from genfast import backends
from genfast.checks import token_transition as checks

PLACES = backends.machine_isas()
SIZE, DRAWS = 13, 200_000
SCORES = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) - 2
POSTERIOR = dict(kind="logits", rule="posterior")
POSTERIOR_TOP_P = dict(POSTERIOR, temperature=1.5, top_p=0.6)


@pytest.mark.parametrize("isa", PLACES)
def test_every_instruction_set(isa):
    with backends.instruction_set(isa):
        assert [case.name for case in checks.cases() if checks.check(case, "cpu") != (0, 0)] == []


@settings(max_examples=40)
@given(
    st.integers(1, 5000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([dict(rule=rule) for rule in ("euler", "analytic", "denoise")] + [POSTERIOR, POSTERIOR_TOP_P]),
    st.booleans(),
    st.floats(0, 1),
    st.booleans(),
)
def test_any_size(size, dtype, options, uniform, amount, noisy):
    if uniform and "kind" not in options:
        options = dict(options, graph="uniform")
    case = checks.TransitionCase((2, 3, size), amount, options, ("noise",) * noisy, dtype)
    for isa in PLACES:
        with backends.instruction_set(isa):
            assert checks.check(case, "cpu") == (0, 0), isa


def test_the_cases_go_and_stay():
    """Equality says little where nothing moves: of each law, some rows must go, and some stay."""
    for case in checks.cases():
        if case.shape == (3, 4, 777) and case.odd and "temperature" not in case.options:
            x = case.arguments()[0]
            moved = (case.run("cpu")[0] != x).sum()
            assert 0 < moved < x.numel(), case.name


# --- the law ---------------------------------------------------------------------------------------------------------


def rate_matrix(graph: str, size: int) -> torch.Tensor:
    """Q[y, x], the forward rate from x to y; columns add up to 0."""
    if graph == "uniform":
        return torch.full((size, size), 1.0 / size, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)
    q = -torch.eye(size, dtype=torch.float64)
    q[-1] += 1
    return q


def probabilities(x: int, score: torch.Tensor, amount: float, graph: str, rule: str) -> torch.Tensor:
    """Of the next token, by matrices: for any graph, no formula of ours."""
    q = rate_matrix(graph, len(score))
    if rule == "euler":
        p = amount * q[x] * score
        p[x] = 0
        p[x] = 1 - p.sum()
    else:
        p = (torch.matrix_exp(-amount * q) @ score) * torch.matrix_exp(amount * q)[x]
        if rule == "denoise" and graph == "absorb":
            p[-1] = 0
    p = p.clamp_min(0)
    return p / p.sum()


def close_to(tokens: torch.Tensor, p: torch.Tensor) -> bool:
    """Chi-square of draws against the law, an alarm at 4.9 standard deviations: once in 10^6 seeds."""
    counts = torch.bincount(tokens.flatten(), minlength=len(p)).double()
    possible = p > 1e-12
    expected = p[possible] * tokens.numel()
    freedom = int(possible.sum()) - 1
    if counts[~possible].sum() > 0:
        return False
    if freedom == 0:
        return True
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum().item()
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return abs(z) < 4.9


def step(x: int, output: torch.Tensor, amount: float, **options) -> torch.Tensor:
    """The next tokens of many equal positions, whose rows are one in memory."""
    state = torch.full((2, DRAWS // 2), x)
    return genfast.discrete_transition(state, output.expand(2, DRAWS // 2, -1), amount, **{"seed": 17, **options}).x


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
@pytest.mark.parametrize("rule", ["euler", "analytic", "denoise"])
@pytest.mark.parametrize("amount", [0.05, 0.6, 3.0])
def test_draws_follow_the_matrices(graph, rule, amount):
    x = SIZE - 1 if graph == "absorb" else 4
    scores = SCORES.scatter(0, torch.tensor(x), 0.0)
    p = probabilities(x, scores.double().exp(), amount, graph, rule)
    tokens = step(x, scores, amount, graph=graph, rule=rule)
    assert close_to(tokens, p)
    other = probabilities(x, scores.double().exp(), 1.1 * amount, graph, rule)
    if (other - p).abs().max() > 0.005:  # the test can tell
        assert not close_to(tokens, other)


def test_negative_probabilities_are_never_drawn():
    scores = SCORES.scatter(0, torch.tensor(SIZE - 1), 0.0)
    for rule in ("euler", "analytic"):
        tokens = step(SIZE - 1, scores, 20.0, rule=rule)
        assert (tokens != SIZE - 1).all()
        assert close_to(tokens, scores[:-1].double().softmax(0))


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.5), dict(top_p=0.7), dict(temperature=2.0, top_p=0.4)])
def test_the_posterior_stays_masked_or_draws(options):
    stay, mask_id = 0.3, 5
    t, top_p = options.get("temperature", 1.0), options.get("top_p", 1.0)
    p = (SCORES.double() / t).scatter(0, torch.tensor(mask_id), -torch.inf).softmax(0)
    order = p.argsort(descending=True)
    kept = p[order].cumsum(0) - p[order] <= top_p
    p = torch.zeros_like(p).scatter(0, order, p[order] * kept)
    p = (1 - stay) * p / p.sum()
    p[mask_id] = stay
    assert close_to(step(mask_id, SCORES, stay, mask_id=mask_id, **POSTERIOR, **options), p)


def test_true_scores_of_absorbed_data():
    """From noise sigma to sigma - d: p0(y) expm1(d) / expm1(sigma), and the stay of MDLM, m_s / m_t."""
    p0 = SCORES[:-1].double().softmax(0)
    sigma, d = 0.9, 0.5
    scores = torch.cat([p0 / math.expm1(sigma), torch.ones(1)]).log().float()
    stay = -math.expm1(d - sigma) / -math.expm1(-sigma)
    p = torch.cat([p0 * (1 - stay), torch.tensor([stay])])
    torch.testing.assert_close(p[:-1], p0 * math.expm1(d) / math.expm1(sigma))
    assert close_to(step(SIZE - 1, scores, d), p)
    logits = torch.cat([p0.log().float(), torch.tensor([3.0])])
    assert close_to(step(SIZE - 1, logits, stay, seed=3, **POSTERIOR), p)


def test_true_scores_of_uniform_noise_lead_back():
    """One token, marginals known: from x ~ p_t the analytic step gives y ~ p_s exactly."""
    p0 = SCORES.double().softmax(0)
    noised = lambda sigma: math.exp(-sigma) * p0 - math.expm1(-sigma) / SIZE  # noqa: E731
    pt = noised(1.0)
    x = pt.multinomial(DRAWS, replacement=True, generator=torch.Generator().manual_seed(1))
    scores = (pt.log() - pt.log()[x][:, None]).float()
    tokens = genfast.discrete_transition(x[None], scores[None], 0.6, graph="uniform", seed=5).x
    assert not close_to(x, noised(0.4)) and close_to(tokens, noised(0.4))
    clean = genfast.discrete_transition(x[None], scores[None], 1.0, graph="uniform", rule="denoise", seed=6).x
    assert close_to(clean, p0)


def score_entropy(log_score: torch.Tensor, sigma: float, x0: torch.Tensor) -> torch.Tensor:
    """SEDD's loss of masked positions, without the factor sigma'(t)."""
    r = 1 / math.expm1(sigma)
    taken = log_score.gather(-1, x0[..., None])[..., 0]
    return log_score[..., :-1].exp().sum(-1) - r * taken + r * (math.log(r) - 1)


def test_score_entropy_is_zero_at_the_ratio_that_leads_home():
    sigma, d = 1.2, 0.7
    x0 = torch.randint(0, SIZE - 1, (2, 20000), generator=torch.Generator().manual_seed(2))
    truth = torch.full((2, 20000, SIZE), -torch.inf, dtype=torch.float64)
    truth.scatter_(2, x0[..., None], -math.log(math.expm1(sigma)))
    assert score_entropy(truth, sigma, x0).abs().max() < 1e-12
    assert (score_entropy(truth + 0.01, sigma, x0) > 1e-6).all()
    masked = torch.full_like(x0, SIZE - 1)
    found = genfast.discrete_transition(masked, truth.float(), d, seed=1).x
    stay = -math.expm1(d - sigma) / -math.expm1(-sigma)
    assert abs((found == masked).double().mean() - stay) < 5 * math.sqrt(stay * (1 - stay) / x0.numel())
    assert torch.equal(found[found != masked], x0[found != masked])
    assert torch.equal(genfast.discrete_transition(found, truth.float(), sigma, rule="denoise").x, x0)


# --- the published draw ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
@pytest.mark.parametrize("rule", ["euler", "analytic", "denoise"])
@pytest.mark.parametrize("amount", [0.1, 2.0])
def test_a_generator_gives_the_tokens_of_sedds_code(graph, rule, amount):
    size = 300
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 50, size, generator=generator) - 4
    x = torch.randint(0, size, (3, 50), generator=generator)
    x[:, ::2] = size - 1
    scores.scatter_(2, x[..., None], 0.0)
    amounts = torch.full((3, 1), amount)
    p = published.sedd_probabilities(x, scores, amounts, graph, rule)
    expected = published.categorical(p, torch.rand(p.shape, generator=torch.Generator().manual_seed(4)))
    draw = torch.Generator().manual_seed(4)
    got = genfast.discrete_transition(x, scores, amounts, graph=graph, rule=rule, generator=draw)
    assert torch.equal(got.x, expected) and (got.x != x).any()
    assert torch.equal(got.changed, (expected != x).any(1))


@pytest.mark.parametrize("stay", [0.0, 0.6, 1.0])
def test_a_generator_gives_the_tokens_of_mdlms_code(stay):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 60, 300, generator=generator) * 2
    x = torch.randint(0, 300, (2, 60), generator=generator)
    x[:, ::2] = 7
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(6))
    now = torch.full((2,), 0.5)
    expected = published.mdlm_step(x, published.subs(x, logits, 7).exp(), now, now * stay, 7, noise)
    draw = torch.Generator().manual_seed(6)
    got = genfast.discrete_transition(x, logits, stay, mask_id=7, generator=draw, **POSTERIOR)
    assert torch.equal(got.x, expected) and (got.x != x).any() == (stay < 1)
    again = genfast.discrete_transition(x, logits, now * 2 * stay, mask_id=7, noise=noise, **POSTERIOR)
    assert torch.equal(again.x, expected)
    exact = published.mdlm_step(x, published.subs(x, logits.double(), 7).exp(), now, now * stay, 7, noise.double())
    assert torch.equal(
        genfast.discrete_transition(x, logits, stay, mask_id=7, noise=noise.double(), **POSTERIOR).x, exact
    )


# --- random numbers and rows -----------------------------------------------------------------------------------------


OUTPUT = torch.randn(4, 10, 500, generator=torch.Generator().manual_seed(7)) * 2 - 8.5
X = torch.randint(0, 500, (4, 10), generator=torch.Generator().manual_seed(8))
X[:, :7] = 499


def test_tokens_are_those_of_sample_tokens():
    """Where a masked position goes, it is to the token that sample_tokens draws with the same numbers."""
    drawn = genfast.sample_tokens(OUTPUT, temperature=1.0, mask_id=499, seed=1, stream=2, offset=3).tokens
    for options in ({}, POSTERIOR):
        got = genfast.discrete_transition(X, OUTPUT, 0.5, seed=1, stream=2, offset=3, **options)
        gone = got.x != X
        assert 0 < gone.sum() < 28 and torch.equal(got.x[gone], drawn[gone])
        assert torch.equal(got.changed, gone.any(1))
    greedy = genfast.discrete_transition(X, OUTPUT, 0.0, temperature=0.0, **POSTERIOR).x
    assert torch.equal(greedy, torch.where(X == 499, OUTPUT[..., :-1].argmax(-1), X))


@pytest.mark.parametrize("options", [{}, dict(graph="uniform"), POSTERIOR])
def test_any_company_threads_and_layout_give_the_same(options):
    whole = genfast.discrete_transition(X, OUTPUT, 0.5, seed=9, **options)
    parts = [
        genfast.discrete_transition(X[i : i + 1], OUTPUT[i : i + 1], 0.5, seed=9, offset=i, **options) for i in range(4)
    ]
    assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
    assert torch.equal(whole.changed, torch.cat([p.changed for p in parts]))
    ids = torch.arange(4)[:, None] * 2**32 + torch.arange(10)
    again = genfast.discrete_transition(
        X.T.contiguous().T, OUTPUT.mT.contiguous().mT, 0.5, seed=9, row_ids=ids, **options
    )
    assert torch.equal(again.x, whole.x)
    before = torch.get_num_threads()
    try:
        found = []
        big = torch.randn(2, 4, 40000, generator=torch.Generator().manual_seed(1))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(genfast.discrete_transition(torch.full((2, 4), 39999), big, 0.5, seed=9, **options).x)
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)
    seeds = torch.full((4,), 9)
    same = genfast.discrete_transition(X[:1].expand(4, -1), OUTPUT[:1].expand(4, -1, -1), 0.5, seed=seeds, **options)
    assert (same.x == same.x[0]).all() and torch.equal(same.x[0], whole.x[0])


def test_only_rows_that_can_change_are_read():
    broken = OUTPUT.masked_fill((X != 499)[..., None], torch.nan)
    expected = genfast.discrete_transition(X, OUTPUT, 0.5, seed=4).x
    assert torch.equal(genfast.discrete_transition(X, broken, 0.5, seed=4).x, expected)
    stays = genfast.discrete_transition(X, OUTPUT, 0.5, seed=4, **POSTERIOR).x == X
    broken = OUTPUT.masked_fill(stays[..., None], torch.nan)
    got = genfast.discrete_transition(X, broken, 0.5, seed=4, **POSTERIOR).x
    assert torch.equal(got == X, stays)
    active = torch.arange(10).expand(4, 10) % 2 == 0
    got = genfast.discrete_transition(X, OUTPUT, 0.5, seed=4, active=active).x
    assert torch.equal(got, torch.where(active, expected, X))


def test_a_row_without_a_distribution_keeps_its_token():
    output = OUTPUT.clone()
    output[0, 0], output[0, 1, 3], output[0, 2, 4] = -torch.inf, torch.nan, torch.inf
    for options in (dict(rule="denoise"), dict(graph="uniform", rule="denoise"), dict(graph="uniform", rule="euler")):
        got = genfast.discrete_transition(X, output, 50.0, seed=1, **options).x
        assert torch.equal(got[0, :3], X[0, :3]) and (got[1:, :7] != X[1:, :7]).any()
    got = genfast.discrete_transition(X, output, 0.0, seed=1, **POSTERIOR).x
    assert torch.equal(got[0, :3], X[0, :3]) and (got[1:, :7] != 499).all()


def test_in_place_and_into():
    expected = genfast.discrete_transition(X, OUTPUT, 0.5, seed=2)
    state = X.clone()
    got = genfast.discrete_transition(state, OUTPUT, 0.5, seed=2, out=state)
    assert got.x is state and torch.equal(state, expected.x) and torch.equal(got.changed, expected.changed)
    out = torch.empty(10, 4, dtype=torch.int64).T
    assert genfast.discrete_transition(X, OUTPUT, 0.5, seed=2, out=out).x is out and torch.equal(out, expected.x)


def test_amounts_per_sequence():
    amounts = torch.tensor([0.0, 0.2, 0.5, 9.0])
    whole = genfast.discrete_transition(X, OUTPUT, amounts, seed=2)
    for i in range(4):
        one = genfast.discrete_transition(X[i : i + 1], OUTPUT[i : i + 1], amounts[i].item(), seed=2, offset=i)
        assert torch.equal(one.x[0], whole.x[i])
    assert whole.changed.tolist()[0] is False and whole.changed[3]
    lost = genfast.discrete_transition(X, OUTPUT, torch.tensor([math.nan, 0.2, 0.2, 0.2]), seed=2)
    assert not lost.changed[0]


def test_seeds_come_from_torch():
    torch.manual_seed(0)
    first, second = (genfast.discrete_transition(X, OUTPUT, 9.0).x for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(genfast.discrete_transition(X, OUTPUT, 9.0).x, first)


# --- the surface -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(amount=-0.1), "amount"),
        (dict(amount=math.inf), "amount"),
        (dict(amount=math.nan), "amount"),
        (dict(amount=1.1, **POSTERIOR), "amount"),
        (dict(amount=torch.ones(3)), "amount"),
        (dict(amount=torch.ones(4, dtype=torch.int64)), "amount"),
        (dict(amount="much"), "amount"),
        (dict(kind="score"), "kind"),
        (dict(graph="roulette"), "graph"),
        (dict(rule="posterior"), "rule"),
        (dict(kind="logits"), "rule"),
        (dict(graph="uniform", **POSTERIOR), "graph"),
        (dict(graph="uniform", mask_id=3), "mask_id"),
        (dict(mask_id=500), "mask_id"),
        (dict(mask_id=1.0), "mask_id"),
        (dict(temperature=0.5), "temperature"),
        (dict(top_p=0.5), "top_p"),
        (dict(temperature=-1.0, **POSTERIOR), "temperature"),
        (dict(temperature=0.0, noise=torch.rand(4, 10, 500), **POSTERIOR), "temperature 0"),
        (dict(top_p=0.0, **POSTERIOR), "top_p"),
        (dict(active=torch.ones(4, 10)), "active"),
        (dict(active=torch.ones(4, 9, dtype=torch.bool)), "active"),
        (dict(out=torch.ones(4, 10)), "out"),
        (dict(out=X[:1].expand(4, 10)), "out"),
        (dict(noise=torch.rand(4, 10, 499)), "noise"),
        (dict(noise=torch.rand(4, 10, 500), rule="denoise"), "noise"),
        (dict(noise=torch.rand(4, 10, 500).half()), "noise"),
        (dict(seed=1, generator=torch.Generator()), "exclude"),
        (dict(generator=3), "generator"),
        (dict(seed=2**64), "seed"),
        (dict(seed=torch.zeros(3, dtype=torch.int64)), "seed"),
        (dict(stream=2**32), "stream"),
        (dict(row_ids=torch.zeros(5, dtype=torch.int64)), "row_ids"),
    ],
)
def test_refusals(options, error):
    state = X.clone()
    arguments = {"amount": 0.5, "out": state, **options}
    with pytest.raises((TypeError, ValueError), match=error):
        genfast.discrete_transition(X, OUTPUT, **arguments)
    assert torch.equal(state, X)


def test_refused_tensors():
    with pytest.raises(TypeError, match="x must"):
        genfast.discrete_transition(X.int(), OUTPUT, 0.5)
    with pytest.raises(TypeError, match="output"):
        genfast.discrete_transition(X, OUTPUT.double(), 0.5)
    with pytest.raises(ValueError, match="output"):
        genfast.discrete_transition(X, OUTPUT[:, :9], 0.5)
    with pytest.raises(ValueError, match="x is out of range"):
        genfast.discrete_transition(X + 1, OUTPUT, 0.5, graph="uniform")


def test_memory_is_the_state():
    from benchmarks.timing import peak_bytes

    x, output = torch.full((2, 8), 50257), torch.randn(2, 8, 50258)
    for options in ({}, dict(graph="uniform"), dict(top_p=0.9, **POSTERIOR)):
        call = lambda o=options: genfast.discrete_transition(x, output, 0.5, seed=0, **o)  # noqa: E731
        assert peak_bytes(call, torch.device("cpu")) < 2**12


def test_compiles_without_a_break():
    def two_steps(x, output, amount):
        x = x.clone()
        first = genfast.discrete_transition(x, output + 1, amount, seed=1, out=x).changed
        second = genfast.discrete_transition(x, output, 0.3, seed=2, **POSTERIOR)
        return x, first, *second

    amount = torch.full((4,), 0.5)
    got = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(X, OUTPUT, amount)
    expected = two_steps(X, OUTPUT, amount)
    assert all(map(torch.equal, got, expected)) and expected[1].any()


def test_opcheck():
    arguments = (
        X, OUTPUT, "jump", None, 2.0, None, 2.0, 499, 1.0, 1.0, True, None, None, None, 3, 0, 0, None, X.clone(),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.genfast.discrete_transition, arguments)
