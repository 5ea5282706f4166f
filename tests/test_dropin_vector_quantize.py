"""``VectorQuantize``, ``ResidualVQ`` and ``GroupedResidualVQ`` of ``genfast.dropin.vector_quantize_pytorch`` beside the
peer's over several training steps: results, losses, gradients, buffers, draws, and what is left to the peer."""

# ruff: noqa: E402 (the check comes before what it guards)

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import genfast

peer = pytest.importorskip("vector_quantize_pytorch")
try:
    genfast.dropin.patching.PEERS["vector_quantize_pytorch"].check()
except ImportError as unsupported:
    pytest.skip(str(unsupported), allow_module_level=True)

import genfast.dropin.vector_quantize_pytorch as ours
from genfast.dropin.vector_quantize_pytorch import residual_vq as stack_module
from genfast.dropin.vector_quantize_pytorch import vector_quantize as module
from genfast.ops.vector_quantize import nearest_code

THEIRS = {name: cls.__mro__[1] for name, cls in vars(ours).items() if name in ours.__all__}
DIM = 12


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(name="VectorQuantize", **options):
    """(ours, theirs) with the same state: ours loads the peer's state dict."""
    options = {"dim": DIM, **({} if "codebook_size" in options else {"codebook_size": 24}), **options}
    torch.manual_seed(1)
    theirs = THEIRS[name](**options)
    mine = getattr(ours, name)(**options)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    return mine, theirs


@pytest.fixture
def fused(monkeypatch):
    """How often our own lookup ran."""
    calls = []

    def nearest(*args, **kwargs):
        calls.append(kwargs["metric"])
        return wanted(*args, **kwargs)

    wanted = module.nearest
    monkeypatch.setattr(module, "nearest", nearest)
    return calls


@pytest.fixture
def whole(monkeypatch):
    """How often a whole stack ran in one call."""
    calls, wanted = [], stack_module.residual_quantize

    def residual_quantize(*args, **kwargs):
        calls.append(len(args[1]))
        return wanted(*args, **kwargs)

    monkeypatch.setattr(stack_module, "residual_quantize", residual_quantize)
    return calls


def called(quantiser, x, seed=3, **options):
    """(what it returns, gradients of x and of the parameters)."""
    x = x.clone().requires_grad_()
    quantiser.zero_grad()
    torch.manual_seed(seed)
    out = quantiser(x, **options)
    weights = randn(*out[0].shape, seed=9)
    total = (out[0] * weights).sum() + (out[2] * torch.arange(1, out[2].numel() + 1).view_as(out[2])).sum()
    if total.requires_grad:
        total.backward()
    zero = torch.zeros(())
    return out, [x.grad, *(p.grad for p in quantiser.parameters())], zero


def same(got, expected, rtol=2e-4, atol=2e-5):
    """Alike: integers exactly, gradients that are absent as zeros."""
    if expected is None or got is None:
        for t in (got, expected):
            assert t is None or not t.any()
        return
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if expected.is_floating_point():
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    else:
        assert torch.equal(got, expected)


def compared(mine, theirs, inputs, **options):
    """Both over the same training steps, then in eval; every result, gradient and buffer alike."""
    for mode in (True, False):
        mine.train(mode), theirs.train(mode)
        for step, x in enumerate(inputs):
            # Not what was trained on: codes that were vectors then would leave over nothing but rounding.
            x = x if mode else 1.1 * x
            (got, got_grads, _), (expected, grads, _) = (called(q, x, 3 + step, **options) for q in (mine, theirs))
            assert len(got) == len(expected)
            for a, b in zip(got, expected):
                # All codes of a grouped stack are a tuple.
                for one, other in zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]:
                    same(one, other)
            for a, b in zip(got_grads, grads, strict=True):
                same(a, b)
            state = theirs.state_dict()
            assert list(mine.state_dict()) == list(state)
            for name, value in mine.state_dict().items():
                same(value, state[name])


CONFIGURATIONS = {
    "plain": {},
    "straight through": dict(rotation_trick=False),
    "cosine": dict(use_cosine_sim=True),
    "cosine straight through": dict(use_cosine_sim=True, rotation_trick=False),
    "decay and weight": dict(decay=0.5, eps=1e-3, commitment_weight=0.25),
    "no commitment": dict(commitment_weight=0.0),
    "projection": dict(codebook_dim=4),
    "projection and norm": dict(codebook_dim=4, layernorm_after_project_in=True),
    "heads": dict(heads=3, codebook_dim=4),
    "heads with projections": dict(heads=2, codebook_dim=4),
    "heads with codebooks": dict(heads=3, codebook_dim=4, separate_codebook_per_head=True),
    "heads with codebooks, cosine": dict(heads=3, codebook_dim=4, separate_codebook_per_head=True, use_cosine_sim=True),
    "heads, cosine": dict(heads=3, codebook_dim=4, use_cosine_sim=True),
    "dead codes": dict(threshold_ema_dead_code=2),
    "dead codes, cosine": dict(threshold_ema_dead_code=2, use_cosine_sim=True),
    "dead codes of heads": dict(threshold_ema_dead_code=2, heads=3, codebook_dim=4),
    "dead codes of codebooks": dict(
        threshold_ema_dead_code=2, heads=3, codebook_dim=4, separate_codebook_per_head=True
    ),
    "kmeans": dict(kmeans_init=True, kmeans_iters=4),
    "kmeans, cosine": dict(kmeans_init=True, kmeans_iters=4, use_cosine_sim=True),
    "kmeans of codebooks": dict(kmeans_init=True, heads=3, codebook_dim=4, separate_codebook_per_head=True),
    "learnable": dict(learnable_codebook=True, ema_update=False),
    "learnable and frozen": dict(learnable_codebook=True, ema_update=False, freeze_codebook=True),
    "learnable, dead codes": dict(learnable_codebook=True, ema_update=False, threshold_ema_dead_code=2),
    "learnable, not routed": dict(learnable_codebook=True, ema_update=False, route_gradients_to_input=False),
    "frozen": dict(freeze_codebook=True),
    "manual": dict(manual_ema_update=True),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_steps(name, fused):
    mine, theirs = pair(**CONFIGURATIONS[name])
    compared(mine, theirs, [randn(3, 20, DIM, seed=s) for s in range(3)])
    assert len(fused) == 6


@pytest.mark.parametrize("heads", [{}, dict(heads=2, codebook_dim=6), dict(heads=2, codebook_dim=5)])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(channel_last=False), (3, DIM, 20)),
        (dict(accept_image_fmap=True), (2, DIM, 4, 5)),
        (dict(accept_3d_fmap=True), (2, DIM, 2, 3, 4)),
        ({}, (40, DIM)),
    ],
)
def test_shapes(options, shape, heads, separate, fused):
    options = options | heads | dict(threshold_ema_dead_code=1, separate_codebook_per_head=separate)
    mine, theirs = pair(**options)
    compared(mine, theirs, [randn(*shape, seed=s) for s in range(2)])
    assert len(fused) == 4


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("options", [{}, dict(channel_last=False), dict(threshold_ema_dead_code=2, kmeans_init=True)])
def test_masks(options, zeros, fused):
    mine, theirs = pair(return_zeros_for_masked_padding=zeros, **options)
    mask = torch.arange(20) < torch.tensor([20, 7, 12])[:, None]
    shape = (3, 20, DIM) if options.get("channel_last", True) else (3, DIM, 20)
    compared(mine, theirs, [randn(*shape, seed=s) for s in range(2)], mask=mask)
    assert len(fused) == 4
    found = mine(randn(*shape), mask=mask)[1]
    assert bool((found[~mask] == -1).all()) and bool((found[mask] >= 0).all())


@pytest.mark.parametrize("options", [dict(heads=3, codebook_dim=4), dict(codebook_dim=4), dict(use_cosine_sim=True)])
def test_masks_in_eval(options, fused):
    mine, theirs = (q.eval() for q in pair(**options))
    x, mask = randn(3, 20, DIM), torch.arange(20) < torch.tensor([20, 7, 12])[:, None]
    for a, b in zip(mine(x, mask=mask), theirs(x, mask=mask)):
        same(a, b)
    assert fused


def test_lengths(fused):
    mine, theirs = pair()
    compared(mine, theirs, [randn(3, 20, DIM)], lens=torch.tensor([20, 7, 12]))
    assert len(fused) == 2


def test_breakdown_and_calls_that_freeze(fused):
    mine, theirs = pair()
    x = randn(3, 20, DIM)
    got, expected = (q(x, return_loss_breakdown=True, freeze_codebook=True) for q in (mine, theirs))
    assert type(got[3]).__name__ == type(expected[3]).__name__ == "LossBreakdown"
    for a, b in zip((*got[:3], *got[3]), (*expected[:3], *expected[3])):
        same(a, b)
    assert torch.equal(mine.codebook, theirs.codebook) and fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, fused):
    mine, theirs = pair(codebook_size=16)
    for mode in (True, False):
        mine.train(mode), theirs.train(mode)
        (got, grads, _), (expected, wanted, _) = (called(q, randn(2, 30, DIM).to(dtype)) for q in (mine, theirs))
        assert torch.equal(got[1], expected[1]) and got[0].dtype == dtype and got[2].dtype == expected[2].dtype
        for a, b in [*zip(got, expected), *zip(grads, wanted)]:
            same(a, b, rtol=5e-2, atol=5e-2)
        same(mine.codebook, theirs.codebook)
    assert len(fused) == 2


@pytest.mark.parametrize(
    "options, arguments",
    [
        (dict(stochastic_sample_codes=True), {}),
        (dict(stochastic_sample_codes=True, straight_through=True, rotation_trick=False), {}),
        (dict(affine_param=True), {}),
        (dict(directional_reparam=True, threshold_ema_dead_code=1), {}),
        (dict(codebook_diversity_loss_weight=0.1), {}),
        (dict(orthogonal_reg_weight=0.1), {}),
        (dict(commitment_use_cross_entropy_loss=True), {}),
        (dict(learnable_codebook=True, ema_update=False, sync_update_v=0.1), {}),
        (dict(use_cosine_sim=True), dict(mask=torch.arange(20) < torch.tensor([[20], [7], [12]]))),
        ({}, dict(ema_update_weight=torch.rand(1, 24))),
        ({}, dict(ema_update=False)),
    ],
)
def test_what_is_left_to_the_peer(options, arguments, fused):
    mine, theirs = pair(**options)
    compared_once = [called(q, randn(3, 20, DIM), **arguments) for q in (mine, theirs)]
    for a, b in [*zip(compared_once[0][0], compared_once[1][0]), *zip(compared_once[0][1], compared_once[1][1])]:
        same(a, b, 0, 0)
    assert not fused


def test_topk_and_cross_entropy_are_left_to_the_peer(fused):
    mine, theirs = (q.eval() for q in pair())
    x = randn(3, 20, DIM)
    for arguments in (dict(topk=3), dict(indices=torch.randint(0, 24, (3, 20)))):
        for a, b in zip(mine(x, **arguments), theirs(x, **arguments)):
            same(a, b, 0, 0)
    assert not fused


def test_accumulated_updates(fused):
    mine, theirs = pair()
    for q in (mine, theirs):
        q(randn(3, 20, DIM), accum_ema_update=True)
        q(randn(3, 20, DIM, seed=1))
    assert not fused
    assert torch.equal(mine.codebook, theirs.codebook)


def test_where_the_peer_disagrees_the_gap_is_below_its_rounding():
    """It compares sqrt(max(|z|^2 + |e|^2 - 2 z e, 1e-8)) in float32: what it takes for nearest is nearly so."""
    mine, theirs = (q.eval() for q in pair(dim=8, codebook_size=64))
    z = randn(2000, 8, scale=3.0) + 200
    codes = z[:32].repeat(2, 1)
    codes[32:] += randn(32, 8, seed=1, scale=1e-5)  # twins nearer than 1e-4
    for q in (mine, theirs):
        q._codebook.embed.copy_(codes)
    got, expected = mine(z)[1], theirs(z)[1]
    assert torch.equal(got, nearest_code(z, codes))
    squares = (z[:, None].double() - codes.double()).square().sum(2)
    ours_d, theirs_d = (squares.gather(1, i[:, None])[:, 0] for i in (got, expected))
    differ = got != expected
    assert differ.any()
    rounding = 4 * 8 * 2.0**-24 * (z.double().square().sum(1) + codes.double().square().sum(1).max())
    assert bool((theirs_d >= ours_d).all()) and bool((theirs_d - ours_d <= rounding.clamp_min(1e-8)).all())


def test_vectors_that_are_not_finite_get_code_0():
    mine, theirs = (q.eval() for q in pair())
    x = randn(1, 4, DIM)
    x[0, 1, 3], x[0, 2, 0] = torch.nan, torch.inf
    assert torch.equal(mine(x)[1], theirs(x)[1])


def test_kmeans_runs_once_and_a_loaded_state_is_believed():
    mine, _ = pair(kmeans_init=True)
    fresh = copy.deepcopy(mine.state_dict())
    x = randn(3, 20, DIM)
    mine.eval()(x)
    after = mine.codebook.clone()
    assert after.any() and bool(mine._codebook.initted)
    mine(randn(3, 20, DIM, seed=1))
    assert torch.equal(mine.codebook, after)
    mine.load_state_dict(fresh)
    mine(x)
    assert mine.codebook.any()


def test_state_dicts_both_ways_and_copies():
    mine, theirs = pair(threshold_ema_dead_code=2)
    x = randn(3, 20, DIM)
    mine(x)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert torch.equal(theirs.eval()(x)[1], mine.eval()(x)[1])
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(twin) is ours.VectorQuantize and torch.equal(twin(x)[1], mine(x)[1])


# --- residual and grouped --------------------------------------------------------------------------------------------

STACKS = {
    "plain": {},
    "sizes": dict(num_quantizers=None, codebook_size=(24, 16, 8)),
    "cosine": dict(use_cosine_sim=True),
    "projection": dict(codebook_dim=4),
    "gradients between layers": dict(quant_grad_frac=0.5),
    "dropout": dict(quantize_dropout=True, quantize_dropout_cutoff_index=1),
    "dropout in steps": dict(quantize_dropout=True, quantize_dropout_multiple_of=2, num_quantizers=4),
    # Not the rotation trick: what a cluster of one vector leaves over is rounding, and it divides by its length.
    "kmeans and dead codes": dict(kmeans_init=True, threshold_ema_dead_code=4, codebook_size=5, rotation_trick=False),
    "shared": dict(shared_codebook=True),
    "shared, dead codes": dict(shared_codebook=True, threshold_ema_dead_code=1, rotation_trick=False),
    "learnable": dict(learnable_codebook=True, ema_update=False),
}


@pytest.mark.parametrize("name", STACKS)
def test_residual_steps(name, fused):
    mine, theirs = pair("ResidualVQ", **{"num_quantizers": 3, **STACKS[name]})
    compared(mine, theirs, [randn(3, 20, DIM, seed=s) for s in range(3)], return_all_codes=True)
    assert fused


def test_residual_mask(fused):
    mine, theirs = pair("ResidualVQ", num_quantizers=3)
    mask = torch.arange(20) < torch.tensor([20, 7, 12])[:, None]
    compared(mine, theirs, [randn(3, 20, DIM)], mask=mask)
    assert len(fused) == 6


@pytest.mark.parametrize("shared", [False, True])
def test_residual_images(shared, fused):
    """The peer takes only those as wide and high as they have channels."""
    options = dict(num_quantizers=2, accept_image_fmap=True, shared_codebook=shared)
    mine, theirs = pair("ResidualVQ", **options)
    compared(mine, theirs, [randn(2, DIM, DIM, DIM)])
    mine, theirs = pair("ResidualVQ", **options | dict(accept_image_fmap=False))
    x = randn(2, DIM, 3, 4)
    image = ours.ResidualVQ(dim=DIM, codebook_size=24, **options)
    image.load_state_dict(theirs.state_dict())
    found = image.eval()(x)
    expected = theirs.eval()(x.flatten(2).mT)
    assert torch.equal(found[1].flatten(1, 2), expected[1])
    same(found[0].flatten(2).mT, expected[0])


@pytest.mark.parametrize("name", ["plain", "sizes", "projection", "dropout", "shared"])
def test_a_stack_in_one_call(name, whole, fused):
    mine, theirs = pair("ResidualVQ", **{"num_quantizers": 3, **STACKS[name]})
    mine.eval(), theirs.eval()
    x = randn(3, 20, DIM)
    got, expected = mine(x, return_all_codes=True), theirs(x, return_all_codes=True)
    assert len(whole) == 1 and not fused
    mine.layers[0].register_forward_hook(lambda *_: None)
    by_layers = mine(x)
    assert len(whole) == 1 and len(fused) == len(mine.layers)
    for a, b, c in zip(got, expected, by_layers):
        same(a, b)
        same(a, c, rtol=0, atol=1e-6)
    same(got[3], expected[3])


def test_a_stack_in_one_call_of_images_and_groups(whole, fused):
    image = ours.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=24, accept_image_fmap=True).eval()
    x = randn(2, DIM, 3, 4)
    codes, indices, losses = image(x)
    assert codes.shape == x.shape and indices.shape == (2, 3, 4, 2) and losses.shape == (2,) and len(whole) == 1
    same(image.get_output_from_indices(indices).movedim(-1, 1), codes)
    mine, theirs = (q.eval() for q in pair("GroupedResidualVQ", num_quantizers=2, groups=3))
    for a, b in zip(mine(randn(3, 20, DIM)), theirs(randn(3, 20, DIM))):
        same(a, b)
    assert len(whole) == 4 and not fused


def test_a_stack_that_does_more_runs_by_layers(whole, fused):
    x = randn(2, 10, DIM)
    stack = dict(dim=DIM, num_quantizers=2, codebook_size=24)
    ours.ResidualVQ(**stack).train()(x)
    ours.ResidualVQ(**stack, use_cosine_sim=True).eval()(x)
    ours.ResidualVQ(**stack).eval()(x, mask=torch.ones(2, 10, dtype=torch.bool))
    ours.ResidualVQ(**stack).eval()(x.bfloat16())
    ours.ResidualVQ(**stack, kmeans_init=True).eval()(randn(2, 30, DIM))
    ours.ResidualVQ(**stack, learnable_codebook=True, ema_update=False).eval()(x)
    assert not whole and len(fused) == 12
    mine, theirs = (q.eval() for q in pair("ResidualVQ", num_quantizers=2))
    x[0, 1, 3] = torch.nan
    assert torch.equal(mine(x)[1], theirs(x)[1]) and len(fused) == 14
    with torch.no_grad():
        ours.ResidualVQ(**stack, learnable_codebook=True, ema_update=False).eval()(randn(2, 10, DIM))
    assert len(fused) == 14


@pytest.mark.parametrize("options", [dict(beam_size=2), dict(implicit_neural_codebook=True), dict(diveq=True)])
def test_residual_by_the_peers_loop(options):
    mine, theirs = pair("ResidualVQ", num_quantizers=2, **options)
    mine.eval(), theirs.eval()
    (got, *_), (expected, *_) = (called(q, randn(3, 20, DIM)) for q in (mine, theirs))
    for a, b in zip(got, expected):
        same(a, b)


@pytest.mark.parametrize(
    "options",
    [dict(groups=2), dict(groups=3, quantize_dropout=True), dict(groups=2, use_cosine_sim=True, kmeans_init=True)],
)
def test_grouped_residual_steps(options, fused):
    mine, theirs = pair("GroupedResidualVQ", num_quantizers=2, **options)
    compared(mine, theirs, [randn(3, 20, DIM, seed=s) for s in range(2)], return_all_codes=True)
    assert fused


# --- patching --------------------------------------------------------------------------------------------------------


def test_patch_and_unpatch():
    with genfast.patch("vector_quantize_pytorch") as done:
        assert set(done.names) == set(ours.__all__)
        for name in ours.__all__:
            assert getattr(peer, name) is getattr(ours, name)
        stack = peer.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=8)
        assert type(stack.layers[0]) is ours.VectorQuantize
        assert peer.residual_vq.VectorQuantize is ours.VectorQuantize
    for name in ours.__all__:
        assert getattr(peer, name) is THEIRS[name]
    assert peer.residual_vq.VectorQuantize is THEIRS["VectorQuantize"]


def test_a_model_that_exists_is_adopted(whole):
    theirs = torch.nn.Sequential(peer.GroupedResidualVQ(dim=DIM, groups=2, num_quantizers=2, codebook_size=8)).eval()
    x = randn(3, 20, DIM)
    expected = theirs(x)
    adopted = ours.adopt(theirs)
    assert adopted is theirs and type(theirs[0]) is ours.GroupedResidualVQ
    for a, b in zip(adopted(x), expected):
        same(a, b)
    assert len(whole) == 2


def test_the_peer_is_imported_only_when_asked_for():
    code = "import genfast, sys; sys.exit(any(m.startswith('vector_quantize_pytorch') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
