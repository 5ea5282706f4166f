"""``multiscale_residual_quantize`` and what VAR makes of its indices: against the published algorithm written out in
eager PyTorch, against the float64 specification, gradients, arguments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from genfast import (
    backend,
    backends,
    multiscale_codes,
    multiscale_inputs,
    multiscale_residual_quantize,
    multiscale_step,
)
from genfast.checks.multiscale_quantize import MultiscaleCase
from genfast.dropin.var import Phi
from genfast.reference import multiscale_quantize as reference

VAR = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SMALL = (1, 2, 3, 5)
PLACES = ("reference", *backends.machine_isas())


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on(place):
    return backend("reference") if place == "reference" else backends.instruction_set(place)


def convolutions(count, size, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.ModuleList([Phi(size, 0.5) for _ in range(count)]).to(dtype)


def published(z, codebook, scales, phis, cosine, beta):
    """(z_q, loss, indices, sums): distances as a matrix, the loop over scales of VAR's ``VectorQuantizer2.forward``."""
    (b, c, *size), last = z.shape, len(scales) - 1
    left, total, loss, indices, sums = z.detach().clone(), torch.zeros_like(z), 0.0, [], []
    for s, side in enumerate(scales):
        small = left if s == last else F.interpolate(left, size=(side, side), mode="area")
        rows = small.permute(0, 2, 3, 1).reshape(-1, c)
        if cosine:
            index = (F.normalize(rows, dim=-1) @ F.normalize(codebook.data.T, dim=0)).argmax(1)
        else:
            squares = rows.square().sum(1, keepdim=True) + codebook.data.square().sum(1)
            index = (squares - 2 * rows @ codebook.data.T).argmin(1)
        index = index.view(b, side, side)
        codes = F.embedding(index, codebook).permute(0, 3, 1, 2)
        if s != last:
            codes = F.interpolate(codes, size=size, mode="bicubic")
        added = phis[s](codes)
        total, left = total + added, left - added.detach()
        loss = loss + beta * F.mse_loss(total.detach(), z) + F.mse_loss(total, z.detach())
        indices.append(index)
        sums.append(total.detach())
    return (total - z).detach() + z, loss / len(scales), indices, sums


@pytest.mark.parametrize("scales", [SMALL, VAR])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_as_published(scales, metric):
    """In float64, where both are the nearest: maps, losses and gradients of z, codes and convolutions."""
    dtype = torch.float64
    z, codebook = randn(2, 8, scales[-1], scales[-1], dtype=dtype), randn(40, 8, seed=1, dtype=dtype)
    results = []
    for ours in (True, False):
        x, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()
        phis = convolutions(len(scales), 8, dtype)
        if ours:
            out = multiscale_residual_quantize(x, codes, scales, phi=phis, metric=metric, return_partial=True)
            found = out.z_q, out.loss, out.indices, out.partial
        else:
            found = published(x, codes, scales, phis, metric == "cosine", 0.25)
        ((found[0] * randn(*z.shape, seed=2, dtype=dtype)).sum() + 3 * found[1]).backward()
        results.append((*found[:2], *found[3], x.grad, codes.grad, *(p.grad for p in phis.parameters()), found[2]))
    (*got, indices), (*expected, wanted) = results
    assert all(torch.equal(a, b) for a, b in zip(indices, wanted))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(not backends.machine_isas(), reason="needs a native module")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 60), st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from(["l2", "cosine", "dot"]),
    st.sampled_from(backends.machine_isas() or ("base",)),
)  # fmt: skip
def test_any_shape(batch, codes, size, scales, dtype, metric, isa):
    """Every index is float64's, of what is left; the scales may be in any order and beyond z's own size."""
    with backends.instruction_set(isa):
        error, allowed = MultiscaleCase(batch, codes, size, tuple(scales), dtype, metric).check("cpu")
    assert error <= allowed


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_is_the_specification(metric):
    z, codebook, pairs = randn(2, 6, 5, 5), randn(30, 6, seed=1), [(s, s) for s in SMALL]
    phis = [nn.Identity()] * len(SMALL)
    indices, partial = reference.multiscale_residual_quantize(z, codebook, pairs, phi=phis, metric=metric)
    out = multiscale_residual_quantize(z, codebook, SMALL, metric=metric, return_partial=True)
    assert all(torch.equal(a, b) for a, b in zip(out.indices, indices))
    torch.testing.assert_close(torch.stack(out.partial).double(), partial, rtol=1e-5, atol=2e-6)
    loss = (partial - z.double()).square().mean()
    torch.testing.assert_close(out.codebook_loss.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss.double(), 1.25 * loss, rtol=1e-5, atol=0)
    assert torch.equal(out.z_q, out.partial[-1])


@pytest.mark.parametrize("n, m", [(1, 4), (2, 7), (5, 5), (6, 4), (7, 16), (16, 1), (13, 8)])
def test_interpolations_of_the_specification(n, m):
    for matrix, mode in ((reference.averaging, "area"), (reference.bicubic, "bicubic")):
        t = randn(1, 2, n, 3, dtype=torch.float64)
        torch.testing.assert_close(reference.resized(t, (m, 3), matrix), F.interpolate(t, size=(m, 3), mode=mode))


def test_functions_of_the_scales():
    """Those that numpy finds for VAR, to the last tie; as many as scales are one each."""
    for count in range(1, 9):
        ends = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(ends, 1 - ends, count)
        for scales in range(2, 20):
            found = [reference.place_of(s / (scales - 1), count) for s in range(scales)]
            assert found == [int(np.argmin(np.abs(ticks - s / (scales - 1)))) for s in range(scales)]
            assert scales != count or found == list(range(count))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_round_trip(place, count):
    """Codes of the indices are what was returned; the inputs and steps of a transformer are made of the same sums."""
    z, codebook = randn(2, 8, 8, 8), randn(50, 8, seed=1)
    scales = (1, 2, (4, 3), 6, 8)
    sizes = [(1, 1), (2, 2), (4, 3), (6, 6), (8, 8)]
    phi = convolutions(count, 8) if count > 1 else convolutions(1, 8)[0] if count else None
    with on(place), torch.no_grad():
        out = multiscale_residual_quantize(z, codebook, scales, phi=phi, return_partial=True)
        maps = multiscale_codes(out.indices, codebook, scales, phi=phi, return_partial=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, out.partial))
        flat = [index.flatten(1) for index in out.indices]
        assert torch.equal(multiscale_codes(flat, codebook, scales, phi=phi), out.z_q)
        assert torch.equal(multiscale_codes(flat[:2], codebook, scales, phi=phi), out.partial[1])
        given = multiscale_inputs(flat[:-1], codebook, scales, phi=phi)
        assert torch.equal(given, multiscale_inputs(flat, codebook, scales, phi=phi))
        f_hat, first = None, 0
        for s in range(len(scales)):
            codes = codebook[out.indices[s]].movedim(-1, 1)
            f_hat, following = multiscale_step(f_hat, codes, s, scales, phi=phi)
            assert torch.equal(f_hat, out.partial[s])
            if s + 1 < len(scales):
                h, w = sizes[s + 1]
                wanted = F.interpolate(f_hat, size=(h, w), mode="area")
                assert torch.equal(following, wanted)
                assert torch.equal(given[:, first : first + h * w], wanted.flatten(2).mT)
                first += h * w
        assert following is f_hat and first == given.shape[1]


def test_one_scale_is_quantize():
    z, codebook = randn(2, 4, 3, 5), randn(20, 4, seed=1)
    out = multiscale_residual_quantize(z, codebook, [(3, 5)], return_usage=False)
    assert torch.equal(out.z_q, codebook[out.indices[0]].movedim(-1, 1)) and out.usage is None and out.partial is None
    assert multiscale_inputs(out.indices, codebook, [(3, 5)]).shape == (2, 0, 4)


def test_the_sum_keeps_its_bits_beside_a_large_input():
    z = (1e6 + randn(1, 3, 2, 2)).requires_grad_()
    codebook = randn(5, 3)
    out = multiscale_residual_quantize(z, codebook, [1, 2])
    assert torch.equal(out.z_q, multiscale_codes(out.indices, codebook, [1, 2]))
    out.z_q.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_dtypes_autocast_and_layouts():
    z, codebook, phi = randn(2, 8, 5, 5), randn(30, 8, seed=1), convolutions(2, 8)
    with torch.no_grad():
        expected = multiscale_residual_quantize(z, codebook, SMALL, phi=phi)
        with torch.autocast("cpu", torch.bfloat16):
            found = multiscale_residual_quantize(z, codebook, SMALL, phi=phi)
            maps = multiscale_codes(found.indices, codebook, SMALL, phi=phi)
        assert torch.equal(found.z_q, expected.z_q) and torch.equal(maps, expected.z_q)
        last = z.contiguous(memory_format=torch.channels_last)
        found = multiscale_residual_quantize(last, codebook, SMALL, phi=phi)
        assert all(torch.equal(a, b) for a, b in zip(found.indices, expected.indices))
        half = multiscale_residual_quantize(z.bfloat16(), codebook, SMALL, phi=phi)
        wide = multiscale_residual_quantize(z.bfloat16().float(), codebook, SMALL, phi=phi)
        assert half.z_q.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
        assert torch.equal(half.z_q, wide.z_q.bfloat16())


def test_an_image_that_is_not_finite():
    z, codebook = randn(2, 4, 5, 5), randn(20, 4, seed=1)
    z[0, 1, 2, 3] = torch.nan
    out = multiscale_residual_quantize(z, codebook, SMALL, nonfinite="index")
    alone = multiscale_residual_quantize(z[1:], codebook, SMALL)
    assert all((index[0] == -1).all() and torch.equal(index[1:], a) for index, a in zip(out.indices, alone.indices))
    assert out.z_q[0].isnan().all() and torch.equal(out.z_q[1:], alone.z_q)
    with pytest.raises(ValueError, match="NaN or infinity"):
        multiscale_residual_quantize(z, codebook, SMALL)


def test_refusals():
    z, codebook = randn(2, 4, 5, 5), randn(20, 4, seed=1)
    index = torch.zeros(2, 1, dtype=torch.int64)
    for name, call in {
        r"z is \[4, 5, 5\]": lambda: multiscale_residual_quantize(z[0], codebook, SMALL),
        "scales must end": lambda: multiscale_residual_quantize(z, codebook, (1, 4)),
        "scales must be": lambda: multiscale_residual_quantize(z, codebook, ()),
        "got .0": lambda: multiscale_residual_quantize(z, codebook, (0, 5)),
        r"codebook is \[20, 3\]": lambda: multiscale_residual_quantize(z, codebook[:, :3], SMALL),
        "metric must be": lambda: multiscale_residual_quantize(z, codebook, SMALL, metric="l1"),
        "out of range: 20": lambda: multiscale_codes([index + 20], codebook, SMALL),
        "out of range: -1": lambda: multiscale_codes([index - 1], codebook, SMALL),
        r"indices\[1\] is": lambda: multiscale_codes([index, index], codebook, SMALL),
        "indices has 0": lambda: multiscale_codes([], codebook, SMALL),
        "at least 3": lambda: multiscale_inputs([index], codebook, SMALL),
        "scale must be": lambda: multiscale_step(None, z, 4, SMALL),
        "codes is": lambda: multiscale_step(None, z, 0, SMALL),
        "f_hat is": lambda: multiscale_step(z[:1], z, 3, SMALL),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
    for name, call in {
        "phi must be": lambda: multiscale_residual_quantize(z, codebook, SMALL, phi=[3]),
        "z must be": lambda: multiscale_residual_quantize(z.long(), codebook, SMALL),
        "int64": lambda: multiscale_codes([index.int()], codebook, SMALL),
    }.items():
        with pytest.raises(TypeError, match=name):
            call()


def test_compiled_whole():
    z, codebook, phi = randn(2, 4, 5, 5), randn(20, 4, seed=1), convolutions(2, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(z, codebook):
        out = multiscale_residual_quantize(z, codebook, SMALL, phi=phi)
        return (*out.indices, out.z_q, out.loss, multiscale_inputs(out.indices, codebook, SMALL, phi=phi))

    # What PyTorch makes of bicubic interpolation there is rounded otherwise.
    with torch.no_grad():
        found = compiled(z, codebook)
        out = multiscale_residual_quantize(z, codebook, SMALL, phi=phi)
        expected = (*out.indices, out.z_q, out.loss, multiscale_inputs(out.indices, codebook, SMALL, phi=phi))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
