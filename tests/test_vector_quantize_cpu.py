"""The CPU kernel of ``nearest_code``: bounds under attack, survivors without end, threads, parts, every layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast import NearestCode, backend, backends, nearest_code
from genfast.reference import vector_quantize as reference

PLACES = backends.machine_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_exact(z, codebook, **options):
    """On every instruction set, with 1 and 3 threads."""
    options = {"nonfinite": "index", "return_distances": True, **options}
    with backend("reference"):
        expected, exact = nearest_code(z, codebook, **options)
    threads = torch.get_num_threads()
    for isa in PLACES:
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                with backends.instruction_set(isa):
                    index, distance = nearest_code(z, codebook, **options)
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(index, expected), (isa, count)
            assert torch.equal(distance.isnan(), exact.isnan())
            torch.testing.assert_close(distance, exact, rtol=2e-7, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 40),
    st.integers(1, 700) | st.sampled_from([64, 128, 1000, 2049]),
    st.integers(1, 70) | st.sampled_from([128, 255, 256, 600]),
    st.sampled_from(["l2", "cosine", "dot"]),
    st.sampled_from([None, None, 1, 2, 7, 16]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(["last", "first", "rows apart"]),
    st.integers(1, 3),
    st.sampled_from([0.0, 3.0, 1e4]),
    st.integers(0, 99),
)
def test_any_shape(rows, codes, size, metric, k, dtype, codes_dtype, layout, groups, offset, seed):
    codebook = (randn(groups, codes, size, seed=seed) + offset).to(codes_dtype)
    z = (randn(rows, groups * size, seed=seed + 1) + offset).to(dtype)
    if layout == "first":
        z = z.T.contiguous().view(1, groups * size, rows)
    elif layout == "rows apart":
        z = torch.stack([z, z], 1).flatten(1)[:, : groups * size] if rows else z
    k = k and min(k, codes)
    check_exact(z, codebook, metric=metric, k=k, dim=1 if layout == "first" else -1)


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("codes, size", [(70000, 1), (70000, 3), (9000, 17), (5000, 130)])
def test_many_codes(isa, codes, size):
    codebook = randn(codes, size, seed=1)
    z = randn(30, size)
    scores = reference.scores(z, codebook, "l2")
    least = (scores == scores.min(1, keepdim=True).values).int().argmax(1)
    with backends.instruction_set(isa):
        for rows in (1, 9, 30):
            assert torch.equal(nearest_code(z[:rows], codebook), least[:rows])


def test_many_rows():
    check_exact(randn(2000, 9), randn(200, 9, seed=1))


@pytest.mark.parametrize(
    "size, codes, dtype", [(1, 1024, 0), (3, 1100, 1), (4, 5000, 0), (8, 1025, 2), (8, 4400, 1), (13, 1100, 0)]
)
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_short_codes(size, codes, dtype, spread):
    """Enough rows that a tree of the codes is made; rows near codes, of no use, and far too long among them."""
    codebook = randn(codes, size, seed=1) * spread
    codebook[codes // 2 :: 7] = codebook[3]
    z = codebook[torch.arange(4100) % codes] + 0.05 * spread * randn(4100, size)
    z[5], z[77, 0], z[78, -1], z[79, 0] = 0, float("nan"), float("inf"), 1e17
    z, codebook = (x.clamp(-6e4, 6e4).to(DTYPES[dtype]) if dtype == 2 else x.to(DTYPES[dtype]) for x in (z, codebook))
    check_exact(z, codebook)
    check_exact(z.T.contiguous().view(1, size, 4100), codebook, dim=1)


@pytest.mark.parametrize("bad", [float("nan"), 1e20, 1e14])
def test_short_codes_out_of_range(bad):
    codebook, z = randn(1100, 5, seed=1), 30 * randn(4100, 5)
    codebook[700, 2] = bad
    check_exact(z, codebook)


def test_short_codes_at_one_distance():
    directions = torch.nn.functional.normalize(randn(1100, 4), dim=1)
    centres = 100 * randn(3, 4, seed=1)
    z = centres[torch.arange(4100) % 3]
    check_exact(z, torch.cat([c + directions for c in centres]))
    check_exact(z, centres[torch.arange(1100) % 3])


@pytest.mark.parametrize("size", [2, 8, 64, 300])
@pytest.mark.parametrize("rows", [3, 40])
def test_codes_at_one_distance(size, rows):
    """All codes lie on a sphere round each row: only their rounding tells them apart."""
    directions = torch.nn.functional.normalize(randn(800, size), dim=1)
    z = randn(1, size, seed=1)
    check_exact(z.expand(rows, size), z + directions)
    check_exact(z.expand(rows, size), z + directions, k=5)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_neighbouring_floats(metric):
    """Codes that differ in the last bit of one number; the nearest one comes late."""
    size, count = 48, 900
    codebook = randn(1, size).expand(count, size).clone()
    for j in range(count):
        d = j * 7 % size
        codebook[j, d] = torch.nextafter(codebook[j, d], torch.tensor(1e9 if j % 3 else -1e9))
    z = torch.cat([codebook[::100], codebook[:20] + 1e-6, 1e3 * randn(15, size, seed=2)])
    check_exact(z, codebook, metric=metric)
    check_exact(z, codebook, metric=metric, k=16)


def test_two_codes_that_float32_confuses():
    """The runner-up of float32's expanded form is the nearest in float64."""
    z = 1e3 * randn(64, 32)
    far = z[:1] + 0.01 * randn(64, 32, seed=1)
    codebook = torch.cat([far, torch.nextafter(far, torch.tensor(0.0))])
    check_exact(z, codebook)
    screened = (codebook.square().sum(1) / 2 - z @ codebook.T).argmin(1)
    assert not torch.equal(screened, nearest_code(z, codebook))  # so the attack is one


@pytest.mark.parametrize("count", [1, 200, 6000])
def test_equal_codes(count):
    codebook = randn(3, 24)[torch.arange(count) * 7 % 3]
    check_exact(randn(30, 24, seed=1), codebook)
    check_exact(randn(30, 24, seed=1), codebook, k=min(count, 16))
    check_exact(randn(30, 24, seed=1), torch.zeros(count, 24), metric="cosine")


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-18, 1e12, 1e19, 1e30, 1e38])
def test_scales(metric, scale):
    codebook = randn(300, 20, seed=1)
    z = randn(33, 20)
    check_exact(z * scale, codebook * scale, metric=metric)
    check_exact(z, codebook * scale, metric=metric, k=3)
    check_exact(z * scale, codebook, metric=metric)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_sizes_mixed(metric):
    """Rows and codes of every magnitude at once, some of them beyond float32's squares, and some not finite."""
    powers = 10.0 ** torch.linspace(-30, 30, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    codebook = randn(300, 33, seed=1) * powers[:, None]
    z = randn(60, 33) * powers[:60, None]
    codebook[5] = torch.nan
    codebook[9, 3] = torch.inf
    z[7, 1] = torch.nan
    z[20, 0] = -torch.inf
    check_exact(z, codebook, metric=metric)
    check_exact(z, codebook, metric=metric, k=4)


def test_clusters_have_many_survivors():
    centres = 10 * randn(6, 40)
    codebook = centres[torch.arange(5000) % 6] + 1e-3 * randn(5000, 40, seed=1)
    check_exact(centres[torch.arange(40) % 6] + 1e-2 * randn(40, 40, seed=2), codebook)


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_fast_is_near(isa, metric):
    z, codebook = randn(200, 48), randn(900, 48, seed=1)
    with backends.instruction_set(isa):
        found = nearest_code(z, codebook, metric=metric, precision="fast", return_distances=True)[1]
        best = nearest_code(z, codebook, metric=metric, return_distances=True)[1]
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)


# --- NearestCode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric, name", [("l2", "IndexFlatL2"), ("dot", "IndexFlatIP")])
def test_index_is_faisss(metric, name):
    faiss = pytest.importorskip("faiss")
    codes, x = randn(500, 24).numpy(), randn(37, 24, seed=1).numpy()
    theirs, ours = getattr(faiss, name)(24), NearestCode(24, metric=metric)
    for index in (theirs, ours):
        index.add(codes[:300])
        index.search(x, 3)
        index.add(codes[300:])
    assert ours.ntotal == theirs.ntotal and ours.d == theirs.d
    assert np.array_equal(ours.reconstruct(7), theirs.reconstruct(7))
    for k in (1, 10):
        distances, indices = ours.search(x, k)
        expected, chosen = theirs.search(x, k)
        assert indices.dtype == chosen.dtype and distances.dtype == expected.dtype
        assert np.array_equal(indices, chosen)
        np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-4)
    for index in (theirs, ours):
        index.reset()
        index.add(codes[:2])
    assert np.array_equal(ours.search(x, 4)[1], theirs.search(x, 4)[1])


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_index_is_the_op(isa, metric, rows):
    codebook, z = randn(700, 20), randn(rows, 20, seed=1)
    index = NearestCode(codebook, metric=metric)
    with backends.instruction_set(isa):
        for _ in range(2):
            distances, indices = index.search(z, 3)
            chosen, expected = nearest_code(z, codebook, metric=metric, k=3, return_distances=True)
            assert torch.equal(indices, chosen) and torch.equal(distances, expected)


def test_index_refuses():
    with pytest.raises(ValueError, match="metric"):
        NearestCode(4, metric="l1")
    with pytest.raises(ValueError, match=r"x is \[2, 5\]; expected \[n, 4\]"):
        NearestCode(randn(3, 4)).search(randn(2, 5), 1)
    with pytest.raises(ValueError, match="from 1 to 16"):
        NearestCode(randn(3, 4)).search(randn(2, 4), 17)
    with pytest.raises(ValueError, match="key"):
        NearestCode(randn(3, 4)).reconstruct(3)
    with pytest.raises(TypeError, match="codebook"):
        NearestCode([[1.0]])


@pytest.mark.parametrize("isa", backends.machine_isas())
@pytest.mark.parametrize("kind", ["a few long", "half long", "signed zeros"])
def test_codes_of_two_kinds(isa, kind):
    """Long codes among very short ones, and a codebook whose codes are all the same number of either sign."""
    generator = torch.Generator().manual_seed(4)
    codebook = torch.randn(600, 20, generator=generator)
    short = torch.arange(600) % (97 if kind == "a few long" else 2) > 0
    codebook[short] *= 1e-5
    if kind == "signed zeros":
        codebook = torch.zeros(600, 20).copysign(codebook)
    z = torch.randn(60, 20, generator=generator)
    with backend("reference"):
        expected = nearest_code(z, codebook)
    with backends.instruction_set(isa):
        assert torch.equal(nearest_code(z, codebook), expected)
