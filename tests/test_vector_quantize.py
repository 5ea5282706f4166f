"""``nearest_code`` on the CPU: every instruction set against the reference and against brute force; the surface."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import backends
from genfast.checks import vector_quantize as checks
from genfast.checks.vector_quantize import BF16, F16, F32, CodeCase
from genfast.reference.vector_quantize import METRICS

PLACES = backends.machine_isas()

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


@pytest.fixture(params=PLACES)
def isa(request):
    with backends.instruction_set(request.param):
        yield request.param


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brute_force(z, codebook, metric="l2", k=1):
    """int64 [N, k] in numpy, a dimension at a time: the order in which the definition sums."""
    z, codes = z.double().numpy(), codebook.double().numpy()
    score = np.zeros((len(z), len(codes)))
    squares = np.zeros(len(codes))
    for d in range(z.shape[1]):
        if metric == "l2":
            difference = np.subtract.outer(z[:, d], codes[:, d])
            score += difference * difference
        else:
            score -= np.multiply.outer(z[:, d], codes[:, d])
            squares += codes[:, d] * codes[:, d]
    if metric == "cosine":
        score /= np.maximum(np.sqrt(squares), 1e-12)
    return torch.from_numpy(np.argsort(score, axis=1, kind="stable")[:, :k].copy())


def exactly(z, codebook, metric):
    """The nearest code of each row in rational arithmetic, which rounds nothing."""
    found = []
    for row in z.double().tolist():
        score = []
        for code in codebook.double().tolist():
            pairs = [(Fraction(a), Fraction(b)) for a, b in zip(row, code)]
            if metric == "l2":
                score.append(sum((a - b) ** 2 for a, b in pairs))
            else:
                score.append(-sum(a * b for a, b in pairs))
        found.append(score.index(min(score)))
    return torch.tensor(found)


@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    error, allowed = checks.check(case, "cpu")
    assert error <= allowed


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", (1, 3, 8, 32, 50, 130))
def test_against_brute_force(isa, size, metric):
    z, codebook = randn(61, size), randn(777, size, seed=1)
    got = genfast.nearest_code(z, codebook, metric=metric, k=5)
    assert torch.equal(got, brute_force(z, codebook, metric, 5))
    assert torch.equal(genfast.nearest_code(z, codebook, metric=metric), got[:, 0])


# --- near ties -------------------------------------------------------------------------------------------------------


def neighbours(x, steps):
    """float32 so many roundings away."""
    return torch.from_numpy((x.numpy().view(np.int32) + np.int32(steps)).view(np.float32))


@pytest.mark.parametrize("metric", ("l2", "dot"))
def test_near_ties_in_rational_arithmetic(isa, metric):
    """Whole numbers small enough that float64 makes no error, too large for float32: scores differ by 1 in 2^30."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randint(2**14, 2**15, (12, 6), generator=generator).float()
    codebook = z[torch.arange(80) % 12] + torch.randint(-1, 2, (80, 6), generator=generator)
    codebook = torch.cat([codebook, codebook.flip(1), codebook[::3]])
    got = genfast.nearest_code(z, codebook, metric=metric)
    assert torch.equal(got, exactly(z, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", (4, 16, 40, 96))
def test_codes_a_rounding_apart(isa, size, metric):
    z = randn(9, size)
    codebook = torch.cat([neighbours(z[torch.arange(150) % 9], 1 + s % 3) for s in range(4)])
    # One coordinate a rounding off, another in each code.
    at = torch.arange(600) % size
    codebook[torch.arange(600), at] = neighbours(codebook[torch.arange(600), at], 1)
    assert torch.equal(genfast.nearest_code(z, codebook, metric=metric, k=4), brute_force(z, codebook, metric, 4))


@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_are_permutations_of_each_other(isa, metric):
    """Equal in exact arithmetic for a constant vector; float64 decides by its rounding, in the order of summation."""
    generator = torch.Generator().manual_seed(5)
    one = torch.randn(24, generator=generator)
    codebook = torch.stack([one[torch.randperm(24, generator=generator)] for _ in range(500)])
    z = torch.cat([torch.full((3, 24), 0.1) * torch.tensor([[1.0], [-3.0], [1e4]]), codebook[7:9]])
    assert torch.equal(genfast.nearest_code(z, codebook, metric=metric, k=3), brute_force(z, codebook, metric, 3))


@pytest.mark.parametrize("metric", METRICS)
def test_midpoints(isa, metric):
    """Vectors half way between two codes, to a rounding of float32."""
    codebook = randn(300, 16, seed=3)
    z = (codebook[:100] + codebook[100:200]) / 2
    assert torch.equal(genfast.nearest_code(z, codebook, metric=metric), brute_force(z, codebook, metric)[:, 0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", (1e-45, 1e-42, 1e-38, 1e-30, 1e-19, 1e19, 1e30, 1e37))
def test_huge_and_tiny_numbers(isa, scale, metric):
    for size in (3, 40):
        z, codebook = randn(7, size), randn(200, size, seed=1)
        for a, b in ((scale, scale), (1.0, scale), (scale, 1.0), (scale, min(1 / scale, 1e37))):
            got = genfast.nearest_code(z * a, codebook * b, metric=metric)
            assert torch.equal(got, brute_force(z * a, codebook * b, metric)[:, 0]), (size, a, b)


def test_numbers_of_every_size_together(isa):
    """Codes from 1e-40 to 1e38 in one codebook, and a row between them."""
    scale = torch.logspace(-40, 37, 300)[:, None]
    codebook, z = randn(300, 12) * scale, randn(40, 12, seed=1) * scale[:: 300 // 40][:40]
    for metric in METRICS:
        assert torch.equal(genfast.nearest_code(z, codebook, metric=metric), brute_force(z, codebook, metric)[:, 0])


def test_a_common_offset(isa):
    z, codebook = randn(30, 24) + 1e4, randn(500, 24, seed=1) + 1e4
    assert torch.equal(genfast.nearest_code(z, codebook, k=2), brute_force(z, codebook, k=2))


# --- any shape -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 150),
    st.integers(1, 700),
    st.integers(1, 140),
    st.sampled_from(METRICS),
    st.sampled_from(checks.KINDS),
    st.sampled_from((F32, BF16, F16)),
    st.sampled_from((None, F32, BF16, F16)),
    st.integers(1, 3),
    st.sampled_from((None, 1, 2, 7, 16)),
    st.booleans(),
)
def test_any_shape(rows, codes, size, metric, kind, dtype, codes_dtype, groups, k, channel_first):
    k = None if k is None else min(k, codes)
    case = CodeCase(rows, codes, size, kind, metric, dtype, codes_dtype, groups, k, channel_first)
    with genfast.backend("reference"):
        expected, exact = case.run("cpu")
    for isa in PLACES:
        with backends.instruction_set(isa):
            index, distance = case.run("cpu")
        assert torch.equal(index, expected), isa
        torch.testing.assert_close(distance, exact, rtol=2e-7, atol=1e-30, equal_nan=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.permutations(range(4)), st.integers(0, 3), st.lists(st.integers(1, 3), min_size=4, max_size=4), st.data())
def test_any_strides(order, dim, steps, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=4, max_size=4))
    whole = randn(*(shape[d] * steps[d] for d in order))
    z = whole.permute([order.index(d) for d in range(4)])[tuple(slice(None, None, s) for s in steps)]
    codebook = randn(3, 2 * z.shape[dim] + 1, 40, seed=1)[1, ::2].T[:, : z.shape[dim]]
    codebook = codebook if codebook.shape[1] == z.shape[dim] else randn(40, z.shape[dim], seed=1)
    expected = brute_force(z.movedim(dim, -1).reshape(-1, z.shape[dim]), codebook)[:, 0]
    for isa in PLACES:
        with backends.instruction_set(isa):
            assert torch.equal(genfast.nearest_code(z, codebook, dim=dim).flatten(), expected), isa


def test_odd_sizes(isa):
    assert genfast.nearest_code(randn(2, 0, 5), randn(3, 5)).shape == (2, 0)
    assert genfast.nearest_code(randn(5), randn(3, 5)).shape == ()
    assert genfast.nearest_code(randn(5), randn(1, 5)).item() == 0
    assert genfast.nearest_code(randn(4, 5), randn(1, 5), k=1).tolist() == [[0]] * 4
    assert genfast.nearest_code(randn(2, 6, 3, 4), randn(2, 9, 3), dim=1, k=5).shape == (2, 3, 4, 2, 5)


def test_many_codes(isa):
    """K = 262144; the nearest one at the very end, twice."""
    codebook = randn(2**18, 4)
    codebook[-1] = codebook[-2] = 9.0
    z = torch.cat([randn(3, 4, seed=1), torch.full((1, 4), 8.5)])
    got = genfast.nearest_code(z, codebook, k=3)
    assert torch.equal(got, brute_force(z, codebook, k=3)) and got[3, :2].tolist() == [2**18 - 2, 2**18 - 1]


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_a_vector_that_is_a_code(isa, dtype):
    codebook = randn(400, 20).to(dtype)
    codebook[300:] = codebook[:100]
    index, distance = genfast.nearest_code(codebook, codebook, return_distances=True)
    assert torch.equal(index, torch.arange(400) % 300) and not distance.any()


def test_float64_is_exact_too():
    """It runs the reference."""
    z, codebook = randn(20, 5).double() + 1e7, randn(90, 5, seed=1).double() + 1e7
    index, distance = genfast.nearest_code(z, codebook, return_distances=True)
    assert distance.dtype == torch.float64 and torch.equal(index, brute_force(z, codebook)[:, 0])
    assert torch.equal(genfast.nearest_code(z.float(), codebook), brute_force(z.float(), codebook)[:, 0])


@pytest.mark.parametrize("metric", METRICS)
def test_fast_is_float32(isa, metric):
    """The code it finds is the nearest but for a rounding of float32."""
    z, codebook = randn(200, 48), randn(900, 48, seed=1)
    options = dict(metric=metric, return_distances=True)
    _, exact = genfast.nearest_code(z, codebook, **options)
    index, distance = genfast.nearest_code(z, codebook, precision="fast", **options)
    torch.testing.assert_close(distance, exact, rtol=2e-6, atol=2e-5)
    chosen = codebook[index].double()
    found = {
        "l2": lambda: (z - chosen).square().sum(1),
        "dot": lambda: (z * chosen).sum(1),
        "cosine": lambda: torch.cosine_similarity(z.double(), chosen),
    }[metric]()
    torch.testing.assert_close(found, exact.double(), rtol=2e-6, atol=2e-5)


# --- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", (torch.nan, torch.inf, -torch.inf))
def test_vectors_that_are_not_finite(isa, wrong):
    z, codebook = randn(50, 8), randn(70, 8, seed=1)
    expected = genfast.nearest_code(z, codebook)
    z[13, 5] = z[49, 0] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        genfast.nearest_code(z, codebook)
    index, distance = genfast.nearest_code(z, codebook, nonfinite="index", return_distances=True)
    expected[[13, 49]] = -1
    assert torch.equal(index, expected) and torch.equal(distance.isnan(), expected < 0)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_are_not_finite_are_never_chosen(isa, metric):
    z, codebook = randn(20, 8), randn(90, 8, seed=1)
    codebook[torch.arange(90) % 5 < 3] *= torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(18)[:, None]
    left = (torch.arange(90) % 5 >= 3).nonzero()[:, 0]
    expected = left[brute_force(z, codebook[left], metric, 4)]
    assert torch.equal(genfast.nearest_code(z, codebook, metric=metric, k=4), expected)
    few = codebook[:5]
    index, distance = genfast.nearest_code(z, few, metric=metric, k=4, nonfinite="index", return_distances=True)
    assert bool((index[:, 2:] == -1).all() and (index[:, :2] >= 3).all() and distance[:, 2:].isinf().all())
    with pytest.raises(ValueError, match="fewer than k finite codes"):
        genfast.nearest_code(z, few, metric=metric, k=4)


# --- threads and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(700, 1000, 8), (9, 5000, 64), (300, 600, 130)])
def test_results_do_not_depend_on_threads(isa, shape):
    case = CodeCase(*shape, "duplicates", k=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("size", (8, 128))
def test_memory_is_a_fraction_of_the_matrix(isa, size):
    """Below 2% of rows by codes in float32, the threads' buffers included."""
    from benchmarks.timing import peak_bytes

    rows, codes = 2048, 16384
    z, codebook = randn(rows, size), randn(codes, size, seed=1)
    used = peak_bytes(lambda: genfast.nearest_code(z, codebook), torch.device("cpu"))
    assert rows * 8 <= used < 0.02 * rows * codes * 4


def test_channel_first_vectors_are_not_copied(isa):
    from benchmarks.timing import peak_bytes

    z, codebook = randn(4, 64, 96, 96), randn(16, 64, seed=1)
    used = peak_bytes(lambda: genfast.nearest_code(z, codebook, dim=1), torch.device("cpu"))
    assert used - 4 * 96 * 96 * 8 < 0.25 * z.nbytes


# --- peers -----------------------------------------------------------------------------------------------------------


def gaps(z, codebook, ours, theirs):
    """By how much our codes are nearer, squared distances in float64, where a peer finds others."""
    z, other = z.double(), (ours != theirs).nonzero()[:, 0]
    near, far = ((z[other] - codebook[index[other]].double()).square().sum(1) for index in (ours, theirs))
    return far - near, other


def test_where_faiss_finds_another_code_it_has_rounded():
    faiss = pytest.importorskip("faiss")
    z, codebook = randn(400, 8), randn(2000, 8, seed=1)
    codebook[1000:] = neighbours(codebook[:1000], 1)
    index = faiss.IndexFlatL2(8)
    index.add(codebook.numpy())
    theirs = torch.from_numpy(index.search(z.numpy(), 1)[1][:, 0])
    ours = genfast.nearest_code(z, codebook)
    gap, other = gaps(z, codebook, ours, theirs)
    assert len(other) > 0, "these codes are too easy to tell apart"
    # It adds |z|^2, |e|^2 and -2 z e in float32: each has D roundings.
    size = z[other].square().sum(1) + codebook[theirs[other]].square().sum(1)
    assert bool((gap >= 0).all() and (gap <= 4 * 8 * 2.0**-24 * size).all())


def test_where_vector_quantize_pytorch_finds_another_code_it_has_rounded():
    peer = pytest.importorskip("vector_quantize_pytorch")
    z, codebook = randn(1, 400, 8), randn(2000, 8, seed=1)
    codebook[1000:] = neighbours(codebook[:1000], 1)
    # It takes a square root of what is at least 1e-8: codes nearer than 1e-4 are all the same to it.
    z[0, :50] = codebook[:50] + 3e-5 * randn(50, 8, seed=2)
    codebook[500:550] = codebook[:50] + 2e-5 * randn(50, 8, seed=3)
    layer = peer.VectorQuantize(dim=8, codebook_size=2000).eval()
    layer._codebook.embed.data.copy_(codebook[None])
    with torch.no_grad():
        theirs = layer(z)[1][0]
    ours = genfast.nearest_code(z[0], codebook)
    gap, other = gaps(z[0], codebook, ours, theirs)
    assert len(other) > 0, "these codes are too easy to tell apart"
    size = z[0, other].square().sum(1) + codebook[theirs[other]].square().sum(1)
    assert bool((gap >= 0).all() and (gap <= 1e-8 + 4 * 8 * 2.0**-24 * size).all())


# --- the surface -----------------------------------------------------------------------------------------------------


def test_compiles_without_a_break():
    z, codebook = randn(2, 6, 3, 5), randn(2, 40, 3, seed=1)

    def step(z):
        index, distance = genfast.nearest_code(2 * z, codebook, dim=1, k=3, return_distances=True)
        return index + 1, distance.sqrt()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(z), step(z)))
    one = torch.compile(lambda z: genfast.nearest_code(z, codebook[0]), fullgraph=True, backend="aot_eager")
    assert torch.equal(one(randn(7, 3)), genfast.nearest_code(randn(7, 3), codebook[0]))


def test_opcheck():
    z, codebook = randn(2, 6, 2, 5), randn(2, 40, 5, seed=1)
    for metric, exact, k, wanted in (("l2", True, 1, False), ("cosine", False, 4, True), ("dot", True, 16, True)):
        torch.library.opcheck(torch.ops.genfast.nearest_code, (z, codebook, metric, exact, k, wanted))
    torch.library.opcheck(torch.ops.genfast.nearest_code, (z.bfloat16(), codebook, "l2", True, 2, True))


def test_no_gradient_passes():
    z, codebook = randn(4, 5).requires_grad_(), randn(9, 5).requires_grad_()
    index, distance = genfast.nearest_code(z, codebook, return_distances=True)
    assert not index.requires_grad and not distance.requires_grad


Z, CODES = randn(6, 8), randn(10, 8, seed=1)


@pytest.mark.parametrize(
    "arguments, options, error",
    [
        (([1.0], CODES), {}, "z must be a tensor"),
        ((Z.long(), CODES), {}, "z must be dense"),
        ((Z.to_sparse(), CODES), {}, "z must be dense"),
        ((torch.tensor(1.0), CODES), {}, "z is a single number"),
        ((Z, None), {}, "codebook must be a tensor"),
        ((Z, CODES.int()), {}, "codebook must be dense"),
        ((Z, CODES[0]), {}, r"codebook is \[8\]"),
        ((Z, CODES[None, None]), {}, "codebook is"),
        ((Z, CODES[:0]), {}, "none of them 0"),
        ((Z[:, :0], CODES[:, :0]), {}, "none of them 0"),
        ((Z, CODES.to("meta")), {}, "codebook is on meta"),
        ((Z, CODES[:, :7]), {}, "expected 7 in dimension 1"),
        ((Z, CODES[None].expand(2, 10, 8)), {}, "expected 2 groups of 8"),
        ((Z, CODES), dict(dim=2), "dim must be"),
        ((Z, CODES), dict(dim=-3), "dim must be"),
        ((Z, CODES), dict(dim=True), "dim must be"),
        ((Z, CODES), dict(dim=1.0), "dim must be"),
        ((Z, CODES), dict(metric="L2"), "metric must be one of l2, cosine, dot"),
        ((Z, CODES), dict(precision="float32"), "precision must be"),
        ((Z, CODES), dict(nonfinite=True), "nonfinite must be"),
        ((Z, CODES), dict(k=0), "k must be a whole number from 1 to 10"),
        ((Z, CODES), dict(k=11), "k must be"),
        ((Z, CODES), dict(k=True), "k must be"),
        ((Z, CODES), dict(k=2.0), "k must be"),
        ((Z, randn(40, 8)), dict(k=17), "from 1 to 16"),
    ],
)
def test_refusals(arguments, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        genfast.nearest_code(*arguments, **options)


def test_arguments_are_left_as_they_are(isa):
    z, codebook = randn(40, 8), randn(90, 8, seed=1)
    z[3, 3], codebook[5, 5] = torch.nan, torch.inf
    before = z.clone(), codebook.clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        genfast.nearest_code(z, codebook)
    genfast.nearest_code(z, codebook, nonfinite="index", k=5, return_distances=True)
    assert torch.equal(z.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(codebook.nan_to_num(), before[1].nan_to_num())
