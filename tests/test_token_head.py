"""``lm_head_sample`` on the CPU: every instruction set against the reference, accuracy, the law of the draws, ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import backends
from genfast.checks import token_head as checks
from genfast.reference import token_head as reference

PLACES = [*backends.machine_isas()]
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(3, 5, 40, generator=GENERATOR)
WEIGHT = torch.randn(1300, 40, generator=GENERATOR) / 2
HOT = dict(temperature=0.8, seed=9)

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


@pytest.fixture(params=PLACES)
def isa(request):
    with backends.instruction_set(request.param):
        yield request.param


def equal(a, b) -> bool:
    return all((x is None and y is None) or torch.equal(x.flatten(), y.flatten()) for x, y in zip(a, b))


@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    error, allowed = checks.check(case, "cpu")
    assert error <= allowed


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 1100),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.2, 1.0, 7.0]),
    st.integers(0, 5000),
)
def test_any_size(rows, size, depth, dtype, temperature, first):
    """Shards begin anywhere."""
    case = checks.HeadCase((rows, depth), size, dict(temperature=temperature), dtype=dtype)
    hidden, weight, options = case.arguments()

    def run():
        return genfast.merge_head_partials(genfast.lm_head_partials(hidden, weight, first=first, **options))

    with genfast.backend("reference"):
        expected = run()
    for isa in PLACES:
        with backends.instruction_set(isa):
            got = run()
        assert torch.equal(got.tokens, expected.tokens), isa
        torch.testing.assert_close(got.confidence, expected.confidence, rtol=checks.ROUNDINGS, atol=checks.ROUNDINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(isa, dtype):
    """Against float64, at most twice the error of plain PyTorch in float32, and a rounding."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(100, 900, generator=generator).to(dtype)
    weight = (torch.randn(700, 900, generator=generator) / 20).to(dtype)
    exact = hidden.double() @ weight.double().T
    plain = hidden.float() @ weight.float().T
    got = genfast.lm_head_sample(hidden, weight, statistics=("logsumexp",))
    # A token other than the largest would have to be as large but for rounding.
    assert (exact.gather(-1, got.tokens[:, None])[:, 0] >= exact.amax(-1) - 1e-4).all()
    for ours, of in (
        (got.logsumexp, lambda x: x.logsumexp(-1)),
        (got.confidence, lambda x: x.softmax(-1).gather(-1, got.tokens[:, None])[:, 0]),
    ):
        allowed = 2 * (of(plain) - of(exact)).abs().max() + 1.2e-7 * of(exact).abs().max()
        assert (ours - of(exact)).abs().max() <= allowed


def test_the_cap():
    """c tanh(l / c) to 5 roundings, from subnormal logits to those that the cap swallows."""
    x = torch.cat([torch.linspace(-300, 300, 20001), torch.logspace(-45, 1, 2000), torch.tensor([0.0, -0.0, math.inf])])
    for cap in (1.0, 30.0, 50.0):
        got, exact = reference.capped(x, cap), cap * torch.tanh(x.double() / cap)
        assert ((got - exact).abs() <= 5 * 6e-8 * exact.abs() + 1e-43).all()
    assert reference.capped(torch.tensor([math.nan]), 1.0).isnan().all()


# --- the law of the draws --------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """Chi-square with 1499 degrees of freedom at 400000 draws over three tiles; a false alarm once in 10^6 seeds."""
    size, rounds, rows = 1500, 20, 20000
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1))
    hidden = torch.ones(1, rows, 1)
    counts = torch.zeros(size, dtype=torch.int64)
    for k in range(rounds):
        tokens = genfast.lm_head_sample(
            hidden, logits[:, None], temperature=0.8, seed=5, stream=k, confidence=None
        ).tokens
        counts += torch.bincount(tokens.flatten(), minlength=size)
    expected = (logits.double() / 0.8).softmax(-1) * rounds * rows
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = size - 1
    # Wilson and Hilferty: the cube root is close to normal.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4.9


def test_the_tail_is_drawn():
    """32768 tokens, each e^-16 of the largest, have 73.7 of 20000 draws. Poisson: outside [36, 122] once in 10^6."""
    bias = torch.full((32769,), -16.0)
    bias[777] = 0
    hidden, weight = torch.zeros(1, 5000, 1), torch.zeros(32769, 1)
    hits = 0
    for k in range(4):
        found = genfast.lm_head_sample(
            hidden, weight, bias=bias, temperature=1.0, seed=2, stream=k, confidence=None
        )  # fmt: skip
        hits += int((found.tokens != 777).sum())
    assert 36 <= hits <= 122


def test_draws_do_not_depend_on_company_threads_or_ranks(isa):
    """To the bit, figures too, though these logits are rounded."""
    call = lambda h=HIDDEN, **more: genfast.lm_head_sample(h, WEIGHT, stream=4, **HOT, **more)  # noqa: E731
    whole = call(statistics=("logsumexp",))
    parts = [call(HIDDEN[i : i + 1], offset=i, statistics=("logsumexp",)) for i in range(3)]
    assert equal(whole, [torch.cat([p[k] for p in parts]) if whole[k] is not None else None for k in range(5)])
    rows = torch.tensor([7, 0, 14])
    some = call(rows=rows)
    assert torch.equal(some.tokens, whole.tokens.flatten()[rows])
    assert torch.equal(some.confidence, whole.confidence.flatten()[rows])
    ids = torch.tensor([2**32 + 2, 0, 2 * 2**32 + 4])
    assert torch.equal(call(HIDDEN.flatten(0, 1), rows=rows, row_ids=ids).tokens, some.tokens)
    many = HIDDEN.repeat(30, 1, 1)
    repeated = call(many, row_ids=torch.arange(15).remainder(5).add(torch.arange(15) // 5 * 2**32).repeat(30))
    assert torch.equal(repeated.confidence, whole.confidence.repeat(30, 1))
    cuts = ((0, 512), (512, 1024), (1024, 1300))
    ranks = [genfast.lm_head_partials(HIDDEN, WEIGHT[a:b], first=a, stream=4, **HOT) for a, b in cuts]
    merged = genfast.merge_head_partials(ranks)
    assert torch.equal(merged.tokens, whole.tokens.flatten())
    assert torch.equal(merged.confidence, whole.confidence.flatten())
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(genfast.lm_head_sample(many[:, :, :8], WEIGHT[:, :8], **HOT))
        assert equal(found[0], found[1]) and equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(whole.tokens, genfast.lm_head_sample(HIDDEN, WEIGHT, stream=5, **HOT).tokens)


def test_a_tile_cut_in_two_has_the_same_law():
    """Two tokens, one on each rank, 10000 draws at p = 0.3: beyond five standard errors once in 10^6 seeds."""
    weight = torch.tensor([[math.log(0.3)], [math.log(0.7)]])
    hidden = torch.ones(10000, 1)
    ranks = [genfast.lm_head_partials(hidden, weight[k : k + 1], first=k, temperature=1.0, seed=1) for k in range(2)]
    share = genfast.merge_head_partials(ranks).tokens.double().mean().item()
    assert abs(share - 0.7) < 5 * math.sqrt(0.21 / 10000)


def test_as_with_logits():
    """The largest, confidence and log-sum-exp of ``sample_tokens`` on the same logits."""
    hidden, weight, _ = checks.HeadCase((2, 4, 24), 777).arguments()
    ours = genfast.lm_head_sample(hidden, weight, statistics=("logsumexp",), suppress=[3])
    theirs = genfast.sample_tokens(hidden @ weight.T, statistics=("logsumexp",), suppress=[3])
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.confidence, theirs.confidence)
    torch.testing.assert_close(ours.logsumexp, theirs.logsumexp)


def test_seeds():
    torch.manual_seed(0)
    first, second = (genfast.lm_head_sample(HIDDEN, WEIGHT, temperature=1.0).tokens for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, genfast.lm_head_sample(HIDDEN, WEIGHT, temperature=1.0).tokens)
    same = genfast.lm_head_sample(
        HIDDEN[:1].expand(3, -1, -1), WEIGHT, temperature=1.0, seed=torch.tensor([3, 3, 4])
    ).tokens
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


# --- the surface -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=torch.ones(3)), "temperature"),
        (dict(bias=torch.zeros(1299)), "bias"),
        (dict(bias=torch.zeros(1300).half()), "bias"),
        (dict(bias=0.5), "bias"),
        (dict(suppress=[1300]), "suppress"),
        (dict(suppress_confidence=[-1]), "suppress_confidence"),
        (dict(mask_id=1300), "suppress"),
        (dict(softcap=0.0), "softcap"),
        (dict(softcap=math.inf), "softcap"),
        (dict(rows=torch.tensor([15])), "rows"),
        (dict(rows=[1]), "rows"),
        (dict(confidence="margin"), "confidence"),
        (dict(statistics=("entropy",)), "statistics"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "seed"),
        (dict(seed=1.0), "seed"),
        (dict(stream=2**32), "stream"),
        (dict(row_ids=torch.zeros(5, dtype=torch.int64)), "row_ids"),
    ],
)
def test_refusals(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        genfast.lm_head_sample(HIDDEN, WEIGHT, **options)


@pytest.mark.parametrize(
    "hidden, weight, error",
    [
        (HIDDEN.double(), WEIGHT, "hidden"),
        (HIDDEN, WEIGHT.double(), "weight"),
        (HIDDEN.half(), WEIGHT, "weight"),
        (HIDDEN[..., :39], WEIGHT, "hidden"),
        (HIDDEN, WEIGHT[:0], "weight"),
        (HIDDEN, WEIGHT[0], "weight"),
        (torch.tensor(1.0), WEIGHT, "hidden"),
        (HIDDEN, None, "weight"),
    ],
)
def test_refused_matrices(hidden, weight, error):
    with pytest.raises((ValueError, TypeError), match=error):
        genfast.lm_head_sample(hidden, weight)


def test_refused_partials():
    with pytest.raises(ValueError, match="seed"):
        genfast.lm_head_partials(HIDDEN, WEIGHT, temperature=1.0)
    for first in (-1, 2**31, 1.0, True):
        with pytest.raises(ValueError, match=r"first|vocabulary"):
            genfast.lm_head_partials(HIDDEN, WEIGHT, first=first)
    parts = genfast.lm_head_partials(HIDDEN, WEIGHT, **HOT)
    for other in (
        genfast.lm_head_partials(HIDDEN[:2], WEIGHT, **HOT),
        genfast.lm_head_partials(HIDDEN, WEIGHT),
        parts._replace(index=parts.index[:, :1]),
        parts._replace(mass=parts.mass.float()),
    ):
        with pytest.raises(ValueError, match=r"parts\[1\]"):
            genfast.merge_head_partials([parts, other])
    for wrong in ([], [1], None):
        with pytest.raises(TypeError, match="parts must be"):
            genfast.merge_head_partials(wrong)


def test_memory_is_a_fraction_of_the_logits():
    """256 rows, V = 126464 (LLaDA-8B): below 5% of the logits in bfloat16, the threads' buffers included."""
    from benchmarks.timing import peak_bytes

    hidden, weight = torch.randn(256, 64).bfloat16(), torch.randn(126464, 64).bfloat16()
    logits = 256 * 126464 * 2
    for options in ({}, dict(temperature=1.0, seed=0), dict(temperature=0.5, seed=0, suppress_confidence=[5])):
        used = peak_bytes(lambda o=options: genfast.lm_head_sample(hidden, weight, **o), torch.device("cpu"))
        assert 0 < used < 0.05 * logits


def test_compiles_without_a_break():
    def step(h):
        return genfast.lm_head_sample(2 * h, WEIGHT, suppress_confidence=[1], statistics=("logsumexp",), **HOT)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(HIDDEN)
    assert equal(got, step(HIDDEN)) and got.margin is None


def test_opcheck():
    scales = torch.ones(15)
    arguments = (HIDDEN, WEIGHT, None, 700, scales, scales, None, None, 0.0, None, True, True, None, 3, 0, 0, None)
    torch.library.opcheck(torch.ops.genfast.lm_head_partials, arguments)
    torch.library.opcheck(torch.ops.genfast.merge_head_partials, tuple(genfast.lm_head_partials(HIDDEN, WEIGHT, **HOT)))
