"""``sample_tokens`` on the CPU: every instruction set against the reference, the law of the draws, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import backends
from genfast.checks import token_sampling as checks
from genfast.reference import token_sampling as reference

PLACES = [*backends.machine_isas()]
RANDN = torch.randn(4, 6, 500, generator=torch.Generator().manual_seed(0)) * 3

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


@pytest.fixture(params=PLACES)
def isa(request):
    with backends.instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    error, allowed = checks.check(case, "cpu")
    assert error <= allowed


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-3, 0.2, 1.0, 7.0]),
    st.sampled_from([None, 0.1, 0.5, 0.95, 1.0]),
    st.sampled_from([None, 1, 3, 100]),
    st.booleans(),
    st.sampled_from([0.01, 1.0, 8.0]),
    st.sampled_from(["probability", "tempered", "margin", "entropy"]),
)
def test_any_size_and_filter(size, dtype, temperature, top_p, top_k, crossing, spread, confidence):
    options = dict(
        temperature=temperature, top_p=top_p, top_k=top_k, top_p_crossing=crossing, confidence=confidence, seed=size
    )
    case = checks.TokenCase((2, size), options, dtype=dtype, spread=spread)
    for isa in PLACES:
        with backends.instruction_set(isa):
            error, allowed = checks.check(case, "cpu")
        assert error <= allowed, isa


def long_rows(size: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=draw)
    peaked = normal.clone()
    peaked[size // 3] = 30.0  # a sample of the row does not see where nearly everything is
    pair = torch.full((size,), -torch.inf)
    pair[[5, size - 1]] = torch.tensor([1.0, 1.5])
    return {
        "normal": normal,
        "wide": 8 * normal,
        "peaked": peaked,
        "ties": (2 * normal).round(),
        "equal": torch.full((size,), -3.0),
        "pair": pair,
        "half": torch.where(normal > 0, normal, -torch.inf),
        "huge": 1e37 * normal,
        "sorted": normal.sort().values,
    }


@pytest.mark.parametrize("size, dtype", [(8193, torch.float32), (50257, torch.bfloat16), (100001, torch.float32)])
def test_filters_of_long_rows(size, dtype):
    """Rows that are not sorted to be cut: every kind that could mislead the search for the cut."""
    rows = long_rows(size)
    x = torch.stack(list(rows.values())).to(dtype)
    for options in (
        dict(top_p=0.95),
        dict(top_p=1e-6, temperature=5.0),
        dict(top_p=0.999999, top_p_crossing=False),
        dict(top_k=50),
        dict(top_k=size - 1),
        dict(top_k=3000, top_p=0.9),
    ):
        options = dict(temperature=1.0, seed=3, confidence="tempered") | options
        expected = checks.of_reference(x, options)
        for isa in PLACES:
            with backends.instruction_set(isa):
                got = genfast.sample_tokens(x, **options)
            differing = (got.tokens != expected.tokens).nonzero()[:, 0].tolist()
            assert [list(rows)[r] for r in differing] == [], (isa, options)
            torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-5, atol=0)


def test_peers_arithmetic():
    """LLaDA's confidence, Dream's filtered one, Hugging Face's nucleus, written out."""
    x = RANDN
    greedy = genfast.sample_tokens(x)
    p = x.softmax(-1)
    assert torch.equal(greedy.tokens, x.argmax(-1))
    torch.testing.assert_close(greedy.confidence, p.max(-1).values)
    tempered = x / 0.7
    order = tempered.sort(-1, descending=True)
    remove = order.values.softmax(-1).cumsum(-1) > 0.8
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    left = tempered.masked_fill(torch.zeros_like(remove).scatter(-1, order.indices, remove), -torch.inf)
    got = genfast.sample_tokens(x, temperature=0.7, top_p=0.8, seed=0, confidence="entropy")
    p = left.softmax(-1)
    torch.testing.assert_close(got.confidence, torch.special.xlogy(p, p).sum(-1), atol=1e-5, rtol=1e-5)
    assert (p.gather(-1, got.tokens[..., None]) > 0).all()
    noise = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = (x.double().exp() / (-noise.log()) ** 0.7).argmax(-1)
    assert torch.equal(genfast.sample_tokens(x, temperature=0.7, noise=noise).tokens, expected)
    assert torch.equal(
        genfast.sample_tokens(x, temperature=0.7, generator=torch.Generator().manual_seed(3)).tokens, expected
    )


def test_guidance_in_one_pass_is_guidance_beforehand(isa):
    x, other = RANDN, RANDN.flip(0)
    guided = genfast.sample_tokens(x, uncond=other, guidance=2.0, temperature=1.0, seed=1)
    before = genfast.sample_tokens(other + 2.0 * (x - other), temperature=1.0, seed=1)
    assert torch.equal(guided.tokens, before.tokens) and torch.equal(guided.confidence, before.confidence)


# --- the law of the draws --------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """Chi-square with 32767 degrees of freedom at 10^6 draws; a false alarm once in 10^6 seeds."""
    size, rounds, rows = 32768, 40, 25000
    x = (torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.5).to(torch.bfloat16)
    counts = torch.zeros(size, dtype=torch.int64)
    for k in range(rounds):
        many = x.expand(rows, 1, size)
        tokens = genfast.sample_tokens(many, temperature=0.8, seed=5, stream=k, confidence=None).tokens
        counts += torch.bincount(tokens.flatten(), minlength=size)
    expected = (x.double() / 0.8).softmax(-1) * rounds * rows
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = size - 1
    # Wilson and Hilferty: the cube root is close to normal.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4.9


def test_the_tail_is_drawn():
    """262144 tokens, each e^-20.5 of the largest, have 32.8 of 100000 draws; float32 Gumbel noise draws none of them.
    Poisson: outside [11, 64] once in 10^5 seeds."""
    x = torch.full((1, 1, 262145), -20.5)
    x[..., 777] = 0
    hits = 0
    for k in range(20):
        tokens = genfast.sample_tokens(x.expand(50, 100, -1), temperature=1.0, seed=2, stream=k, confidence=None).tokens
        assert tokens.numel() == 5000
        hits += int((tokens != 777).sum())
    assert 11 <= hits <= 64


def test_draws_do_not_depend_on_company_or_threads(isa):
    whole = genfast.sample_tokens(RANDN, temperature=1.0, seed=9, stream=4)
    parts = [genfast.sample_tokens(RANDN[i : i + 1], temperature=1.0, seed=9, stream=4, offset=i) for i in range(4)]
    assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
    assert torch.equal(whole.confidence, torch.cat([p.confidence for p in parts]))
    rows = torch.tensor([7, 0, 23])
    some = genfast.sample_tokens(RANDN, temperature=1.0, seed=9, stream=4, rows=rows)
    assert torch.equal(some.tokens, whole.tokens.flatten()[rows])
    shorter = genfast.sample_tokens(RANDN[:, :3], temperature=1.0, seed=9, stream=4)
    assert torch.equal(shorter.tokens, whole.tokens[:, :3])
    before = torch.get_num_threads()
    try:
        big = torch.randn(8, 3, 40000)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(genfast.sample_tokens(big, temperature=1.0, seed=9))
        assert all(torch.equal(a, b) for a, b in zip(*(f[:2] for f in found)))
    finally:
        torch.set_num_threads(before)
    other = genfast.sample_tokens(RANDN, temperature=1.0, seed=9, stream=5)
    assert not torch.equal(whole.tokens, other.tokens)


def test_seeds():
    torch.manual_seed(0)
    first, second = (genfast.sample_tokens(RANDN, temperature=1.0).tokens for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, genfast.sample_tokens(RANDN, temperature=1.0).tokens)
    state = torch.get_rng_state()
    genfast.sample_tokens(RANDN), genfast.sample_tokens(RANDN, temperature=1.0, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    seeds = torch.tensor([3, 3, 4, 5])
    same = genfast.sample_tokens(RANDN[:1].expand(4, -1, -1), temperature=1.0, seed=seeds).tokens
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_whole_number_products():
    for value in (0, 1, 2**31, 2**63, 2**64 - 1, 0x123456789ABCDEF0):
        for total in (1, 2**32 + 5, 2**62 - 1):
            got = reference.high_product(value >> 32, value & 0xFFFFFFFF, torch.tensor([total]))
            assert got.item() == value * total >> 64


# --- the surface -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=torch.ones(3)), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=1.5), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(guidance=2.0), "uncond and guidance"),
        (dict(uncond=RANDN), "uncond and guidance"),
        (dict(uncond=RANDN[:1], guidance=1.0), "uncond"),
        (dict(uncond=RANDN, guidance=math.inf), "guidance"),
        (dict(suppress=[500]), "suppress"),
        (dict(suppress_confidence=[-1]), "suppress_confidence"),
        (dict(mask_id=500), "suppress"),
        (dict(rows=torch.tensor([24])), "rows"),
        (dict(rows=[1]), "rows"),
        (dict(confidence="sure"), "confidence"),
        (dict(statistics=("mean",)), "statistics"),
        (dict(seed=1, noise=torch.rand(4, 6, 500)), "exclude"),
        (dict(noise=torch.rand(4, 6, 1), temperature=1.0), "noise"),
        (dict(seed=torch.zeros(3, dtype=torch.int64)), "seed"),
        (dict(seed=1.0), "seed"),
        (dict(seed=2**64), "seed"),
        (dict(stream=2**32), "stream"),
        (dict(row_ids=torch.zeros(5, dtype=torch.int64)), "row_ids"),
        (dict(generator=3, temperature=1.0), "generator"),
    ],
)
def test_refusals(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        genfast.sample_tokens(RANDN, **options)


@pytest.mark.parametrize("logits", [RANDN.double(), RANDN.long(), [1.0], RANDN[..., :0], torch.tensor(1.0)])
def test_refused_logits(logits):
    with pytest.raises((ValueError, TypeError), match="logits"):
        genfast.sample_tokens(logits)


def test_memory_is_the_outputs():
    from benchmarks.timing import peak_bytes

    x = torch.randn(1, 16, 126464).to(torch.bfloat16)
    for options in ({}, dict(temperature=1.0, seed=0), dict(temperature=1.0, seed=0, top_p=0.9)):
        assert peak_bytes(lambda o=options: genfast.sample_tokens(x, **o), torch.device("cpu")) < 2**20


def test_compiles_without_a_break():
    def step(x):
        return genfast.sample_tokens(2 * x, temperature=1.0, seed=3, statistics=("entropy",))

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(RANDN)
    expected = step(RANDN)
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.entropy, expected.entropy)
    assert got.margin is None


def test_opcheck():
    arguments = (
        RANDN, None, None, 1.0, 5, 0.9, True, 1.0, None, None, None, False, "probability", ["margin"], None, None, 3,
        0, 0, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.genfast.sample_tokens, arguments)
