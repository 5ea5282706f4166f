"""``FSQ`` and ``LFQ`` of ``genfast.dropin.vector_quantize_pytorch`` beside the peer's: results, losses, gradients,
state, random draws, and what is left to the peer."""

# ruff: noqa: E402 (the check comes before what it guards)

import copy
import subprocess
import sys

import pytest
import torch

import genfast
from genfast.checks import compare

peer = pytest.importorskip("vector_quantize_pytorch")
try:
    genfast.dropin.patching.PEERS["vector_quantize_pytorch"].check()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from genfast.dropin.vector_quantize_pytorch import FSQ, LFQ
from genfast.ops import scalar_quantize as ops


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(ours, theirs, seed, *args, **kwargs):
    """Both classes with the same parameters and buffers: ours loads the peer's state dict."""
    torch.manual_seed(seed)
    expected = theirs(*args, **kwargs)
    got = ours(*args, **kwargs)
    got.load_state_dict(copy.deepcopy(expected.state_dict()), strict=True)
    return got, expected


def run(module, x, weights=None, **options):
    """Everything the module returns, and the gradients of its input and parameters."""
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    found = module(x, **options)
    flat = [t for part in found for t in (part if isinstance(part, tuple) else (part,))]
    loss = sum((t.float() * (k + 1)).sum() for k, t in enumerate(flat) if t is not None and t.requires_grad)
    wanted = [x, *module.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True) if isinstance(loss, torch.Tensor) else ()
    return flat, [g for g in grads if g is not None]


def assert_same(got, expected, exact=None):
    """Values and gradients agree; given ``exact``, the peer's in float64, gradients are as near to it as the peer's."""
    (values, grads), (wanted, wanted_grads) = got, expected
    assert len(values) == len(wanted) and len(grads) == len(wanted_grads)
    for a, b in zip(values, wanted):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        if not a.is_floating_point():
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    for k, (a, b) in enumerate(zip(grads, wanted_grads)):
        if exact is None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * max(1.0, b.abs().max().item()))
        else:
            error, allowed = compare(a, exact[1][k], b)
            assert error <= allowed


@pytest.fixture
def fused(monkeypatch):
    """The calls that reached the ops."""
    calls = []
    for name, real in [(n, getattr(ops, n)) for n in ("_fsq", "_fsq_op", "_binary", "_binary_op")]:

        def counted(*args, real=real):
            calls.append(1)
            return real(*args)

        monkeypatch.setattr(ops, name, counted)
    return calls


FSQ_CASES = [
    ((2, 30, 3), dict(levels=[8, 6, 5])),
    ((2, 30, 3), dict(levels=(8, 6, 5), preserve_symmetry=True, keep_num_codebooks_dim=True)),
    ((2, 30, 4), dict(levels=[2, 2, 3, 4], preserve_symmetry=True, noise_dropout=0.5)),
    ((2, 30, 3), dict(levels=[8, 6, 5], bound_hard_clamp=True)),
    ((2, 30, 16), dict(levels=[8, 6, 5], dim=16, num_codebooks=2)),
    ((2, 16, 5, 6), dict(levels=[8, 6, 5], dim=16, projection_has_bias=False)),
    ((2, 6, 5, 6), dict(levels=[8, 6, 5], num_codebooks=2, preserve_symmetry=True, noise_dropout=0.3)),
    ((2, 3, 4, 5, 2), dict(levels=[7, 7, 7], orthogonal_rotation=True)),
    ((2, 3, 50), dict(levels=[7, 5, 5], channel_first=True, return_indices=False)),
]


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("shape, options", FSQ_CASES)
def test_fsq(shape, options, training, fused):
    ours, theirs = pair(FSQ, peer.FSQ, 1, **options)
    x = randn(*shape)
    got, expected = run(ours.train(training), x), run(theirs.train(training), x)
    assert_same(got, expected)
    assert fused
    if expected[0][1] is not None:
        assert torch.equal(ours.indices_to_codes(got[0][1]), theirs.indices_to_codes(expected[0][1]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_fsq_in_half_precision(dtype, fused):
    ours, theirs = pair(FSQ, peer.FSQ, 1, levels=[8, 8, 8, 5, 5, 5])
    x = randn(2, 300, 6, dtype=dtype)
    (codes, indices), _ = run(ours, x)
    (expected, wanted), _ = run(theirs, x)
    assert fused and torch.equal(codes, expected) and torch.equal(indices, wanted) and indices.max() > 256


LFQ_CASES = [
    ((2, 30, 8), dict(codebook_size=256)),
    ((2, 30, 8), dict(dim=8, spherical=True, commitment_loss_weight=0.3)),
    ((2, 30, 16), dict(dim=16, codebook_size=64, num_codebooks=2, diversity_gamma=0.4, commitment_loss_weight=1.0)),
    ((2, 16, 5, 6), dict(dim=16, codebook_size=32, entropy_loss_weight=0.5, soft_clamp_input_value=3.0)),
    ((2, 6, 5, 6), dict(dim=6, keep_num_codebooks_dim=True, codebook_scale=0.5)),
    ((2, 30, 16), dict(dim=16, codebook_size=64, cosine_sim_project_in=True)),
    ((2, 8, 50), dict(dim=8, channel_first=True, experimental_softplus_entropy_loss=True)),
    ((2, 4, 3, 5, 2), dict(dim=4, orthogonal_rotation=True, spherical=True, codebook_scale=2.0)),
]


@pytest.mark.parametrize("inv_temperature", (100.0, 0.6))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("shape, options", LFQ_CASES)
def test_lfq(shape, options, training, inv_temperature, fused):
    ours, theirs = pair(LFQ, peer.LFQ, 2, **options)
    x = randn(*shape)
    call = dict(inv_temperature=inv_temperature, return_loss_breakdown=True)
    got, expected = (run(m.train(training), x, **call) for m in (ours, theirs))
    wide = copy.deepcopy(theirs).double()
    wide.force_quantization_f32 = False
    assert_same(got, expected, run(wide, x.double(), **call))
    assert fused
    indices = expected[0][1]
    assert torch.equal(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))


def test_lfq_counts_the_rows_of_a_mask(fused):
    ours, theirs = pair(LFQ, peer.LFQ, 2, dim=8, commitment_loss_weight=0.5)
    x, mask = randn(3, 20, 8), randn(3, 20, seed=1) > 0
    call = dict(mask=mask, inv_temperature=1.0, return_loss_breakdown=True)
    assert_same(run(ours, x, **call), run(theirs, x, **call))
    assert fused


def test_named_results():
    found = LFQ(dim=4)(randn(1, 5, 4))
    assert type(found).__name__ == "Return" and found.entropy_aux_loss.dim() == 0 and found.indices.shape == (1, 5)


@pytest.mark.parametrize(
    "module, x",
    [
        (lambda c: c(dim=4, straight_through_activation=torch.nn.Tanh()), randn(2, 5, 4)),
        (lambda c: c(dim=4, frac_per_sample_entropy=0.5), randn(2, 5, 4)),
        (lambda c: c(dim=4, force_quantization_f32=False), randn(2, 5, 4).double()),
    ],
)
def test_lfq_leaves_the_rest_to_the_peer(module, x, fused):
    ours, theirs = (module(c) for c in (LFQ, peer.LFQ))
    if x.dtype == torch.float64:
        ours, theirs = ours.double(), theirs.double()
    assert_same(run(ours, x, return_loss_breakdown=True), run(theirs, x, return_loss_breakdown=True))
    assert not fused


def test_fsq_leaves_the_rest_to_the_peer(fused):
    for options, dtype in ((dict(), torch.float64), (dict(force_quantization_f32=False), torch.bfloat16)):
        ours, theirs = (c(levels=[5, 5, 5], **options) for c in (FSQ, peer.FSQ))
        x = randn(2, 9, 3).to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x)))
    with pytest.raises(AssertionError):
        FSQ(levels=[5, 5, 5])(randn(2, 9, 4))
    assert not fused


def test_patch():
    theirs = peer.FSQ, peer.LFQ
    with genfast.patch("vector-quantize-pytorch") as patched:
        assert {"FSQ", "LFQ"} <= set(patched.names)
        from vector_quantize_pytorch import residual_fsq, residual_lfq

        assert (peer.FSQ, peer.LFQ) == (FSQ, LFQ) and residual_fsq.FSQ is FSQ and residual_lfq.LFQ is LFQ
        torch.manual_seed(0)
        ours = peer.ResidualFSQ(dim=8, levels=[5, 5, 3], num_quantizers=3)
        assert type(ours.layers[0]) is FSQ
    assert theirs == (peer.FSQ, peer.LFQ)
    torch.manual_seed(0)
    expected = peer.ResidualFSQ(dim=8, levels=[5, 5, 3], num_quantizers=3)
    x = randn(2, 40, 8)
    for a, b in zip(ours.eval()(x), expected.eval()(x)):
        torch.testing.assert_close(a, b)


def test_importing_genfast_imports_no_peer():
    code = "import sys, genfast; assert not [m for m in sys.modules if m.startswith('vector_quantize_pytorch')]"
    subprocess.run([sys.executable, "-c", code], check=True)
