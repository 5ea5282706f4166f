"""``residual_quantize``: every backend against the reference, the peer's module, arguments, torch.library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast import backend, backends, nearest_code, residual_quantize
from genfast.checks import residual_quantize as checks

PLACES = ("reference", *backends.machine_isas())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(place):
    return backend("reference") if place == "reference" else backends.instruction_set(place)


@pytest.mark.parametrize("isa", backends.machine_isas())
@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    with backends.instruction_set(isa):
        error, allowed = checks.check(case, "cpu")
    assert error <= allowed


@pytest.mark.skipif(not backends.machine_isas(), reason="needs a native module")
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(0, 90), st.integers(1, 5), st.integers(1, 200), st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from(["l2", "cosine", "dot"]),
    st.integers(1, 3), st.booleans(), st.sampled_from(backends.machine_isas() or ("base",)),
)  # fmt: skip
def test_any_shape(rows, stages, codes, size, dtype, metric, groups, first, isa):
    with backends.instruction_set(isa):
        error, allowed = checks.check(
            checks.ResidualCase(rows, stages, codes, size, dtype, metric, groups, first), "cpu"
        )  # fmt: skip
    assert error <= allowed


@pytest.mark.parametrize("place", PLACES)
def test_stages_are_nearest_codes(place):
    """Written out with ``nearest_code``, whose indices have tests of their own."""
    z, codebooks = randn(300, 16), randn(3, 50, 16, seed=1)
    with on(place):
        indices, z_q, errors = residual_quantize(z, codebooks, return_errors=True)
    residual, total = z, torch.zeros_like(z)
    for q in range(3):
        index = nearest_code(residual, codebooks[q])
        assert torch.equal(indices[:, q], index)
        residual, total = residual - codebooks[q, index], total + codebooks[q, index]
        torch.testing.assert_close(errors[:, q], residual.square().sum(1))
    assert torch.equal(z_q, total)


def test_threads_do_not_matter():
    z, codebooks = randn(700, 33), randn(4, 200, 33, seed=1)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(residual_quantize(z, codebooks, return_errors=True))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_is_the_peers():
    """vector-quantize-pytorch computes distances in float32, so its first stage is compared where the gap is wide."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    module = peer.ResidualVQ(dim=16, num_quantizers=4, codebook_size=64).eval()
    for layer in module.layers:
        layer._codebook.embed.copy_(torch.randn_like(layer._codebook.embed))
        layer._codebook.initted.fill_(True)
    z = randn(2, 40, 16)
    with torch.no_grad():
        quantized, chosen, _ = module(z)
    indices, z_q = residual_quantize(z, module.codebooks.detach())
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(z_q, quantized, rtol=1e-6, atol=1e-6)


def test_shapes():
    z = randn(2, 12, 5, 3)
    indices, z_q = residual_quantize(z, randn(4, 7, 12), dim=1)
    assert indices.shape == (2, 5, 3, 4) and z_q.shape == z.shape and z_q.is_contiguous()
    indices, z_q, errors = residual_quantize(z, randn(3, 2, 7, 4), dim=1, return_errors=True)
    assert indices.shape == errors.shape == (2, 5, 3, 3, 2) and z_q.shape == z.shape
    assert residual_quantize(randn(12), randn(2, 3, 12))[0].shape == (2,)


def test_float64_runs_the_reference():
    z, codebooks = randn(9, 5).double(), randn(2, 7, 5)
    _, z_q, errors = residual_quantize(z, codebooks, return_errors=True)
    assert z_q.dtype == errors.dtype == torch.float64
    torch.testing.assert_close(errors[:, -1], (z - z_q).square().sum(1))


@pytest.mark.parametrize("place", PLACES)
def test_stages_of_their_own(place):
    """A sequence of codebooks of several sizes, dtypes and layouts, read where they lie."""
    z = randn(50, 8)
    books = [randn(20, 8, seed=1), randn(8, 7, seed=2).T, randn(40, 8, seed=3).bfloat16()]
    with on(place):
        indices, z_q = residual_quantize(z, books)
    residual = z
    for q, book in enumerate(books):
        index = nearest_code(residual, book)
        assert torch.equal(indices[:, q], index)
        residual = residual - book[index].float()
    torch.testing.assert_close(z_q, z - residual)
    grouped = residual_quantize(z, [randn(2, 9, 4), randn(2, 5, 4)])[0]
    assert grouped.shape == (50, 2, 2) and int(grouped[..., 1].max()) < 5


def test_refusals():
    z, codebooks = randn(4, 6), randn(2, 5, 6)
    for name, call in {
        r"codebooks is \[5, 6\]": lambda: residual_quantize(z, codebooks[0]),
        r"expected 7 in dimension 1": lambda: residual_quantize(z, randn(2, 5, 7)),
        "dim must be": lambda: residual_quantize(z, codebooks, dim=2),
        "no stages": lambda: residual_quantize(z, []),
        r"codebooks\[1\] is \[5, 4\]": lambda: residual_quantize(z, [codebooks[0], randn(5, 4)]),
        "metric must be": lambda: residual_quantize(z, codebooks, metric="l1"),
        "precision must be": lambda: residual_quantize(z, codebooks, precision="high"),
        "nonfinite must be": lambda: residual_quantize(z, codebooks, nonfinite="skip"),
        "NaN or infinity": lambda: residual_quantize(z * torch.nan, codebooks),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(TypeError, match="codebooks must be"):
        residual_quantize(z, codebooks.long())


def test_torch_library():
    z, codebooks = randn(4, 5, 1, 6), randn(1, 2, 7, 6)
    for wanted in (True, False):
        stages = list(codebooks.unbind(1))
        torch.library.opcheck(torch.ops.genfast.residual_quantize.default, (z, stages, "l2", True, wanted))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(z, codebooks):
        return residual_quantize(z, codebooks)

    found, expected = compiled(z[:, :, 0], codebooks[0]), residual_quantize(z[:, :, 0], codebooks[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
