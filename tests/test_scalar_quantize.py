"""``fsq_quantize``, ``lfq_quantize`` and ``bsq_quantize`` on the CPU: every instruction set against the oracle, exact
levels and bits, losses written out, gradients, determinism, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import backends
from genfast.checks import scalar_quantize as checks

PLACES = backends.machine_isas()
F64 = torch.float64

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    with backends.instruction_set(isa):
        error, allowed = checks.check(case, "cpu")
    assert error <= allowed


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("count", (3, 4, 8, 5, 100))
def test_levels_change_at_the_steps_of_the_exact_formula(isa, symmetric, count):
    from genfast.reference.scalar_quantize import shape_of, steps

    found = torch.tensor(steps(count, symmetric, False))
    z = torch.cat([found, torch.nextafter(found, torch.tensor(-torch.inf))])[:, None]
    shift, height, offset = shape_of(count, symmetric, False)
    bounded = torch.tanh(z.double() + shift) * height - offset
    exact = bounded.floor() if symmetric else bounded.round() + count // 2
    with backends.instruction_set(isa):
        _, indices = genfast.fsq_quantize(z, [count], symmetric=symmetric)
    k = torch.arange(1, count)
    assert torch.equal(indices, torch.cat([k, k - 1]))
    # In float64 the two sides of a step are a few roundings apart.
    assert ((exact[:, 0] == indices) | ((bounded[:, 0] - bounded[:, 0].round()).abs() % 0.5 < 1e-6)).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_large_indices_of_half_precision_are_whole(dtype):
    z = randn(500, 62).to(dtype)
    _, indices = genfast.lfq_quantize(z)
    expected = [int("".join("1" if x > 0 else "0" for x in row), 2) for row in z.tolist()]
    assert indices.tolist() == expected and max(expected) > 2**61
    assert torch.equal(genfast.binary_codes(indices, 62) > 0, z > 0)
    levels = [8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    codes, indices = genfast.fsq_quantize(z[:, :10], levels)
    assert torch.equal(genfast.fsq_codes(indices, levels, dtype=dtype), codes) and indices.max() > 2**29


@pytest.mark.parametrize("symmetric", (False, True))
def test_every_index_has_its_code(symmetric):
    levels = [3, 4, 5]
    codes = genfast.fsq_codes(torch.arange(60), levels, symmetric=symmetric)
    assert codes.unique(dim=0).shape == (60, 3) and codes.abs().max() == 1
    z = codes
    if not symmetric:  # what the clamp's bound takes to the codes
        half = torch.tensor([1, 2, 2])
        z = codes * half / ((torch.tensor(levels) - 1) * 1.001 / 2)
    found, indices = genfast.fsq_quantize(z, levels, symmetric=symmetric, clamp=True)
    assert torch.equal(indices, torch.arange(60)) and torch.equal(found, codes)
    assert genfast.fsq_codes(torch.tensor([-1, 60]), levels).isnan().all()
    bits = genfast.binary_codes(torch.arange(16), 4, scale=0.5)
    assert torch.equal(genfast.lfq_quantize(bits, scale=0.5)[1], torch.arange(16))
    assert genfast.binary_codes(torch.tensor([-1, 16]), 4).isnan().all()


@pytest.mark.parametrize("isa", PLACES)
def test_rows_that_are_not_numbers(isa):
    z = randn(70, 4)
    z[3, 2], z[5, 0], z[6, 1] = torch.nan, torch.inf, -torch.inf
    with backends.instruction_set(isa):
        for codes, indices in (genfast.fsq_quantize(z, [3, 4, 5, 40]), genfast.lfq_quantize(z)):
            assert indices[3] == -1 and (indices >= 0).sum() == 69
            assert codes[3, 2].isnan() and codes.isnan().sum() == 1
            assert codes[5, 0] == 1 and codes[6, 1] == -1
        codes, indices = genfast.bsq_quantize(torch.zeros(2, 4))
        assert not indices.any() and (codes == -0.5).all()
        mask = torch.arange(70) != 3
        losses = genfast.lfq_quantize(z, mask=mask, return_losses=True)[2]
        assert losses.batch_entropy.isfinite() and losses.per_sample_entropy.isfinite()
        assert genfast.lfq_quantize(z, return_losses=True)[2].per_sample_entropy.isnan()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 200), st.integers(1, 8), st.integers(1, 3), st.sampled_from([1.0, 5.0]), st.booleans(),
    st.sampled_from([0.0, 1e-5, 0.3]), st.booleans(),
)  # fmt: skip
def test_losses_are_those_of_the_softmax_over_all_codes(rows, bits, groups, sharpness, sphere, least, masked):
    z = randn(rows, groups * bits, seed=rows + bits)
    mask = randn(rows, seed=1) > -1 if masked else None
    quantize = genfast.bsq_quantize if sphere else genfast.lfq_quantize
    _, _, losses = quantize(
        z, groups=groups, return_losses=True, inv_temperature=sharpness, least_probability=least, mask=mask,
        diversity_gamma=0.6,
    )  # fmt: skip
    u = (z if mask is None else z[mask]).double().unflatten(-1, (groups, bits))
    u = torch.nn.functional.normalize(u, dim=-1) if sphere else u
    size = 1 / math.sqrt(bits) if sphere else 1.0
    codes = genfast.binary_codes(torch.arange(2**bits), bits, dtype=F64) * size
    p = (2 * sharpness * u @ codes.T).softmax(-1)
    mean = p.mean(0)

    def entropy(p):
        return -(p * p.clamp_min(max(least, 1e-300)).log()).sum(-1).mean()

    squares = (u - torch.where(u > 0, size, -size)).square().mean()
    expected = entropy(p), entropy(mean), entropy(p) - 0.6 * entropy(mean), squares
    for got, wanted in zip(losses, expected):
        torch.testing.assert_close(got.double(), wanted, rtol=3e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(losses.mean_probability[:, 0].double(), mean, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_entropy_of_blocks_is_the_sum_of_theirs():
    z = randn(90, 12)
    whole = genfast.lfq_quantize(z, return_losses=True, inv_temperature=1.0, entropy_bits=4)[2]
    parts = [genfast.lfq_quantize(z[:, k : k + 4], return_losses=True, inv_temperature=1.0)[2] for k in (0, 4, 8)]
    torch.testing.assert_close(whole.batch_entropy, sum(p.batch_entropy for p in parts))
    torch.testing.assert_close(whole.per_sample_entropy, sum(p.per_sample_entropy for p in parts))


@pytest.mark.parametrize("quantize", (genfast.lfq_quantize, genfast.bsq_quantize))
@pytest.mark.parametrize("least", (0.0, 1e-2))
def test_gradients_of_the_reference(quantize, least):
    z = randn(5, 2, 6, dtype=F64, seed=3)
    z = (z + 0.2 * z.sign()).requires_grad_()  # away from the steps

    def losses(z):
        return quantize(
            z, groups=2, return_losses=True, inv_temperature=0.8, least_probability=least,
            mask=torch.arange(10).view(5, 2) % 3 > 0,
        )[2]  # fmt: skip

    assert torch.autograd.gradcheck(losses, z)


def test_gradients_pass_straight_through():
    z, weights = randn(40, 5).requires_grad_(), randn(40, 5, seed=1)
    codes, _ = genfast.lfq_quantize(z)
    assert torch.equal(torch.autograd.grad((codes * weights).sum(), z)[0], weights)
    codes, _ = genfast.bsq_quantize(z, scale=2.0)
    smooth = 2 * torch.nn.functional.normalize(z, dim=-1)
    expected = torch.autograd.grad((smooth * weights).sum(), z)[0]
    torch.testing.assert_close(torch.autograd.grad((codes * weights).sum(), z)[0], expected)
    codes, _ = genfast.fsq_quantize(z, [3] * 5)
    expected = weights * 1.001 * (1 - z.detach().tanh().square())
    torch.testing.assert_close(torch.autograd.grad((codes * weights).sum(), z)[0], expected)


def test_results_do_not_depend_on_threads():
    z, before = randn(30000, 12), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = z.clone().requires_grad_()
            codes, indices, losses = genfast.lfq_quantize(leaf, return_losses=True, least_probability=1e-5)
            codes2, indices2 = genfast.fsq_quantize(leaf, [8, 5, 5] * 4)
            loss = losses.entropy_loss + losses.commitment + (codes * codes2).sum()
            found.append([codes, indices, *losses, codes2, indices2, *torch.autograd.grad(loss, leaf)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_no_tensor_of_rows_by_codes():
    from benchmarks.timing import peak_bytes

    z = randn(2048, 16).requires_grad_()

    def step():
        loss = genfast.lfq_quantize(z, return_losses=True, least_probability=1e-5)[2].entropy_loss
        return torch.autograd.grad(loss, z)

    assert peak_bytes(step, torch.device("cpu")) < 2048 * 2**16 * 4 / 100


def test_channel_first_is_read_in_place():
    z = randn(2, 6, 9, 7)
    codes, indices = genfast.fsq_quantize(z, [8, 8, 8, 5, 5, 5], dim=1)
    last, expected = genfast.fsq_quantize(z.permute(0, 2, 3, 1).contiguous(), [8, 8, 8, 5, 5, 5])
    assert indices.shape == (2, 9, 7) and torch.equal(indices, expected)
    assert torch.equal(codes.permute(0, 2, 3, 1), last) and codes.is_contiguous()
    codes, indices = genfast.lfq_quantize(z, dim=1, groups=2)
    assert codes.shape == z.shape and indices.shape == (2, 9, 7, 2)


def test_compiles_without_a_break():
    def step(z):
        codes, indices, losses = genfast.bsq_quantize(2 * z, return_losses=True, least_probability=1e-5)
        return codes.sin().sum() + losses.entropy_loss + genfast.fsq_quantize(z, [4, 5, 6])[0].sum(), indices

    z = randn(20, 3).requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(z), compiled(z)
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    assert torch.equal(*(torch.autograd.grad(y[0], z)[0] for y in (expected, got)))


def test_opcheck():
    z, mask = randn(2, 5, 2, 6).requires_grad_(), randn(2, 5) > 0
    ops = torch.ops.genfast
    torch.library.opcheck(ops.fsq_quantize, (z, None, [3, 4, 5, 3, 4, 5], False, False))
    torch.library.opcheck(ops.fsq_backward, (z.detach(), z.detach(), None, [3, 4, 5, 3, 4, 5], False, False))
    for block in (None, 3):
        torch.library.opcheck(ops.binary_quantize, (z, mask, 1.0, 0.4, 2.0, block, 1e-5 if block else 0.0))
    torch.library.opcheck(
        ops.binary_backward, (z.detach(), None, None, None, z.detach(), None, None, 1.0, 2.0, None, 0.0)
    )


Z = randn(4, 6)


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: genfast.fsq_quantize(Z, [3, 3]), "groups of 2"),
        (lambda: genfast.fsq_quantize(Z, [3, 2, 3, 3, 3, 3]), "levels"),
        (lambda: genfast.fsq_quantize(Z, []), "levels"),
        (lambda: genfast.fsq_quantize(Z, [3] * 6, noise=torch.zeros(4)), "noise"),
        (lambda: genfast.fsq_quantize(Z, [3] * 6, noise=[0.0]), "noise"),
        (lambda: genfast.fsq_quantize(Z.long(), [3] * 6), "z must be"),
        (lambda: genfast.fsq_quantize(torch.tensor(1.0), [3]), "single"),
        (lambda: genfast.fsq_codes(Z, [3]), "indices"),
        (lambda: genfast.binary_codes(torch.tensor([1]), 63), "bits"),
        (lambda: genfast.binary_codes(torch.tensor([1]), 3, dtype=torch.int64), "dtype"),
        (lambda: genfast.lfq_quantize(Z, dim=2), "dim"),
        (lambda: genfast.lfq_quantize(Z, groups=4), "groups"),
        (lambda: genfast.lfq_quantize(Z, groups=0), "groups"),
        (lambda: genfast.lfq_quantize(Z, scale=0.0), "scale"),
        (lambda: genfast.lfq_quantize(Z, inv_temperature=-1.0), "inv_temperature"),
        (lambda: genfast.lfq_quantize(Z, least_probability=1.0), "least_probability"),
        (lambda: genfast.lfq_quantize(Z, entropy_bits=4), "entropy_bits"),
        (lambda: genfast.lfq_quantize(Z, diversity_gamma=math.nan), "diversity_gamma"),
        (lambda: genfast.lfq_quantize(Z, mask=torch.ones(4)), "mask"),
        (lambda: genfast.lfq_quantize(Z, mask=torch.ones(5, dtype=torch.bool)), "mask"),
        (lambda: genfast.lfq_quantize(randn(2, 30), return_losses=True), "entropy_bits"),
        (lambda: genfast.lfq_quantize(randn(2, 63)), "62"),
    ],
)
def test_refusals(call, error):
    with pytest.raises((TypeError, ValueError), match=error):
        call()
