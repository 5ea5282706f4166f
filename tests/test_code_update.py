"""``quantize``, ``ema_update_`` and ``kmeans``: backends against the reference, gradients, the peer, ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import genfast
from genfast import backends
from genfast.checks import code_update as checks

PLACES = backends.machine_isas()
# Without the kernel of nearest_code these run its reference, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:genfast runs vector_quantize")


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("isa", PLACES)
def test_every_instruction_set(isa):
    with backends.instruction_set(isa):
        failed = [case.name for case in checks.cases() if not (lambda e, a: e <= a)(*checks.check(case, "cpu"))]
    assert failed == []


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["last", "first", "strided"]),
    st.booleans(),
    st.sampled_from(["straight_through", "rotation", "none"]),
    st.sampled_from([0.0, 2.0]),
)
def test_any_shape(rows, codes, size, groups, dtype, layout, masked, gradient, threshold):
    # On a line a code may be the opposite of its vector, for which there is no one rotation: rounding decides.
    assume(size > 1 or gradient != "rotation")
    shape = (rows, codes, size, groups, dtype, layout)
    for case in (
        checks.QuantizeCase(*shape, masked=masked, gradient=gradient),
        checks.AverageCase(*shape, masked=masked, threshold=threshold),
    ):
        for isa in PLACES:
            with backends.instruction_set(isa):
                error, allowed = checks.check(case, "cpu")
                # Of a few numbers plain PyTorch may be exact by luck: a few roundings of numbers near 1 may pass.
                assert error <= allowed + 2e-6, isa


# --- quantize --------------------------------------------------------------------------------------------------------


def test_gradients_of_the_losses_by_differences():
    z = randn(2, 5, 6, dtype=torch.float64).requires_grad_()
    codebook = randn(2, 4, 3, seed=1, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[[0, 1], [3, 3], [-1, 2], [1, -1], [0, 0]]] * 2)

    def of(name, **options):
        return lambda z, e: getattr(genfast.quantize(z, e, indices=indices, **options), name)

    # A loss is stopped in one of its arguments, where differences would not be.
    assert torch.autograd.gradcheck(lambda z: of("commitment_loss")(z, codebook.detach()), z)
    assert torch.autograd.gradcheck(lambda e: of("codebook_loss")(z.detach(), e), codebook)
    assert torch.autograd.gradcheck(lambda e: of("z_q", gradient="none")(z.detach(), e), codebook)
    assert torch.autograd.gradcheck(
        lambda z: of("loss", codebook_weight=0.0, commitment_weight=0.7)(z, codebook.detach()), z
    )
    commitment, of_codes = (of(name)(z, codebook) for name in ("commitment_loss", "codebook_loss"))
    assert torch.autograd.grad(of_codes, z, allow_unused=True)[0].abs().max() == 0
    assert torch.autograd.grad(commitment, codebook, allow_unused=True)[0].abs().max() == 0
    assert commitment == of_codes


def test_the_rotation_turns_z_to_its_code():
    """The Jacobian is s R with s = |e| / |z|, R orthogonal, and s R z = e."""
    z, codebook = randn(1, 7).requires_grad_(), randn(3, 7, seed=2)
    found = genfast.quantize(z, codebook, gradient="rotation")
    jacobian = torch.stack([torch.autograd.grad(found.z_q[0, d], z, retain_graph=True)[0][0] for d in range(7)])
    e = codebook[found.indices[0]]
    assert torch.allclose(jacobian @ z[0], e, atol=1e-6)
    stretch = (e.norm() / z.norm()) ** 2
    assert torch.allclose(jacobian @ jacobian.T, stretch * torch.eye(7), atol=1e-6)


def test_layout_and_dtype_are_those_of_z():
    for z, dim in ((randn(2, 6, 4, 5), 1), (randn(2, 4, 5, 6), -1), (randn(6, 9).bfloat16(), 0), (randn(6).half(), 0)):
        found = genfast.quantize(z, randn(8, 6, seed=1), dim=dim)
        assert found.z_q.dtype == z.dtype and found.z_q.stride() == z.stride()
        lead = [n for d, n in enumerate(z.shape) if d != dim % z.dim()]
        assert list(found.indices.shape) == lead
        assert torch.equal(found.z_q.movedim(dim, -1), randn(8, 6, seed=1)[found.indices].to(z.dtype))
    found = genfast.quantize(randn(3, 5, 8), randn(2, 9, 4))
    assert found.indices.shape == (3, 5, 2) and found.usage.shape == (2, 9) and found.perplexity.shape == (2,)


def test_perplexity_and_usage():
    indices = torch.tensor([0, 0, 1, 1, 3, 3, -1])
    found = genfast.quantize(randn(7, 4), randn(5, 4), indices=indices)
    assert found.usage.tolist() == [2, 2, 0, 2, 0]
    assert math.isclose(found.perplexity, 3, rel_tol=1e-6)
    assert genfast.quantize(randn(7, 4), randn(5, 4), return_usage=False)[-2:] == (None, None)


def test_vectors_without_a_code():
    z, codebook, mask = randn(4, 6, 5).requires_grad_(), randn(9, 5), randn(4, 6, seed=3) > 0
    for without_code, expected in (("input", z), ("zeros", torch.zeros(()))):
        found = genfast.quantize(z, codebook, mask=mask, without_code=without_code)
        assert torch.equal(found.indices == -1, ~mask) and found.usage.sum() == mask.sum()
        rows = codebook[found.indices.clamp_min(0)]
        assert torch.equal(found.z_q, torch.where(mask[..., None], rows, expected))
        assert torch.allclose(found.loss, 1.25 * (z - rows)[mask].square().mean())
        (grad,) = torch.autograd.grad(found.z_q.sum(), z)
        assert torch.equal(grad, torch.where(mask[..., None], 1.0, float(without_code == "input")).expand_as(z))
    nothing = genfast.quantize(z, codebook, mask=torch.zeros_like(mask))
    assert nothing.loss == 0 and nothing.perplexity == 1


def test_vectors_that_are_not_finite():
    z = randn(4, 5)
    z[2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        genfast.quantize(z, randn(9, 5))
    assert genfast.quantize(z, randn(9, 5), nonfinite="index").indices[2] == -1
    mask = torch.tensor([True, True, False, True])
    assert genfast.quantize(z, randn(9, 5), mask=mask).loss.isfinite()


def test_a_moving_average_between_forward_and_backward():
    z, codebook = randn(50, 4).requires_grad_(), randn(9, 4, seed=1)
    expected = torch.autograd.grad(genfast.quantize(z, codebook).loss, z)[0]
    found = genfast.quantize(z, codebook)
    before = codebook._version
    genfast.ema_update_(codebook, torch.ones(9), codebook.clone(), z, found.indices)
    assert codebook._version > before
    assert torch.equal(torch.autograd.grad(found.loss, z)[0], expected)


def test_registration():
    z, codebook = randn(1, 9, 2, 4).requires_grad_(), randn(2, 7, 4).requires_grad_()
    indices = torch.randint(-1, 7, (1, 9, 2))
    torch.library.opcheck(torch.ops.genfast.quantize, (z, codebook, indices, "rotation", False, True))
    state = (randn(2, 7, 4), torch.ones(2, 7), randn(2, 7, 4))
    options = (0.8, 1e-5, False, 0.0, 0.0, None, 0, 0, 0)
    torch.library.opcheck(torch.ops.genfast.ema_update_, (*state, z.detach(), indices, *options))
    torch.library.opcheck(torch.ops.genfast.code_sums, (z.detach(), indices, 7, True, True, None, 3, 0, 0, 1, 0))


def test_compiled():
    def step(z, codebook, size, average):
        found = genfast.quantize(z, codebook, gradient="rotation")
        genfast.ema_update_(codebook, size, average, z, found.indices, threshold=0.5, seed=3)
        return found.z_q.square().sum() + found.loss

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z, state = randn(30, 4).requires_grad_(), (randn(9, 4, seed=1), torch.ones(9), randn(9, 4, seed=2))
        loss = run(z, *state)
        loss.backward()
        results.append([loss.detach(), z.grad, *state])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("call, match", [
    (lambda z, e: genfast.quantize(z, e, gradient="none at all"), "gradient"),
    (lambda z, e: genfast.quantize(z, e, mask=torch.ones(3)), "mask"),
    (lambda z, e: genfast.quantize(z, e, mask=torch.ones(3, dtype=torch.bool)), "mask"),
    (lambda z, e: genfast.quantize(z, e, indices=torch.full((7,), 9)), "indices"),
    (lambda z, e: genfast.quantize(z, e, without_code="nothing"), "without_code"),
    (lambda z, e: genfast.quantize(z, e, commitment_weight=math.nan), "commitment_weight"),
    (lambda z, e: genfast.ema_update_(e, torch.ones(8), e.clone(), z, torch.zeros(7).long()), "cluster_size"),
    (lambda z, e: genfast.ema_update_(e.T.contiguous().T, torch.ones(9), e, z, torch.zeros(7).long()), "codebook"),
    (lambda z, e: genfast.ema_update_(e, torch.ones(9), e.clone(), z, torch.zeros(7).long(), threshold=1.0), "seed"),
    (lambda z, e: genfast.ema_update_(e, torch.ones(9), e.clone(), z, torch.zeros(7).long(), decay=2.0), "decay"),
    (lambda z, e: genfast.kmeans(z, 0, seed=1), "K"),
    (lambda z, e: genfast.kmeans(z[:0], 2, seed=1), "z"),
    (lambda z, e: genfast.kmeans(z, 2, seed=1, metric="dot"), "metric"),
])  # fmt: skip
def test_refusals(call, match):
    codebook = randn(9, 4)
    with pytest.raises((ValueError, TypeError), match=match):
        call(randn(7, 4), codebook)
    assert torch.equal(codebook, randn(9, 4))


# --- moving averages -------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    z, codebook = randn(3000, 40).requires_grad_(), randn(300, 40, seed=1).requires_grad_()
    indices = torch.randint(-1, 300, (3000,), generator=torch.Generator().manual_seed(2)).clamp_max(250)
    results = []
    for count in (1, 2, 5):
        threads(count)
        found = genfast.quantize(z, codebook, indices=indices, gradient="rotation")
        grads = torch.autograd.grad(found.z_q.square().sum() + found.loss, (z, codebook))
        state = [codebook.detach().clone(), torch.ones(300), codebook.detach().clone()]
        genfast.ema_update_(*state, z, indices, metric="cosine", threshold=1.5, seed=3)
        results.append([found.loss.detach(), found.perplexity, *grads, *state])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_dead_codes_get_vectors_of_the_batch():
    for isa in (None, *PLACES):
        with backends.instruction_set(isa) if isa else backends.backend("reference"):
            z, size = randn(12, 5), torch.tensor([9.0, 0.1, 9.0, 0.2, 0.1] * 4)
            indices = torch.zeros(12, dtype=torch.int64)
            indices[8:] = -1
            states = []
            for seed in (1, 1, 2):
                state = [randn(20, 5, seed=1), size.clone(), randn(20, 5, seed=2)]
                genfast.ema_update_(*state, z, indices, threshold=1.0, reset_cluster_size=3.0, seed=seed)
                states.append(state)
            assert all(map(torch.equal, states[0], states[1])) and not torch.equal(states[0][0], states[2][0])
            codebook, sizes, average = states[0]
            plain = [randn(20, 5, seed=1), size.clone(), randn(20, 5, seed=2)]
            genfast.ema_update_(*plain, z, indices)
            revived = (codebook != plain[0]).any(1)
            dead = plain[1] < 1.0
            # Twelve are dead; eight vectors have a code, and each is given once.
            assert dead.sum() == 12 and (dead | ~revived).all() and 1 < revived.sum() <= 8
            taken = (codebook[revived][:, None] == z[:8]).all(2)
            assert (taken.sum(1) == 1).all() and taken.sum(0).max() == 1
            assert (sizes[revived] == 3).all() and torch.equal(average[revived], 3 * codebook[revived])
            assert torch.equal(sizes[~revived], plain[1][~revived])


def test_every_vector_is_as_likely_to_revive():
    counts = torch.zeros(10)
    for seed in range(1000):
        state = [torch.zeros(4, 2), torch.tensor([9.0, 9.0, 0.0, 9.0]), torch.zeros(4, 2)]
        z = torch.arange(1.0, 21.0).view(10, 2)
        genfast.ema_update_(*state, z, torch.zeros(10, dtype=torch.int64), threshold=1.0, seed=seed)
        counts[int(state[0][2, 0] - 1) // 2] += 1
    # Chi-square with 9 degrees of freedom: above 42 once in 3 * 10^5 seeds.
    assert ((counts - 100) ** 2 / 100).sum() < 42 and counts.sum() == 1000


def test_a_code_without_any_weight_keeps_its_row():
    codebook = randn(3, 4)
    genfast.ema_update_(codebook, torch.zeros(3), torch.zeros(3, 4), randn(0, 4), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(codebook, randn(3, 4))


# --- vector_quantize_pytorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("options", [{}, dict(rotation_trick=False), dict(return_zeros_for_masked_padding=False)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_of_the_peer(cosine, options, masked):
    peer = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(16, 40, use_cosine_sim=cosine, **options)
    book = peer._codebook
    book.embed.copy_(F.normalize(randn(1, 40, 16, seed=3), dim=-1) if cosine else randn(1, 40, 16, seed=3))
    book.embed_avg.copy_(book.embed)
    state = [t[0].clone() for t in (book.embed, book.cluster_size, book.embed_avg)]
    x, y = (randn(2, 50, 16).requires_grad_() for _ in range(2))
    mask = randn(2, 50, seed=4) > 0 if masked else None
    q, i, loss = peer(x, mask=mask)
    weights = randn(2, 50, 16, seed=5)
    ((q * weights).sum() + loss.sum()).backward()

    z = F.normalize(y, dim=-1, eps=1e-6) if cosine else y
    found = genfast.quantize(
        z, state[0], metric="dot" if cosine else "l2", mask=mask, commitment_weight=1.0,
        gradient="rotation" if options.get("rotation_trick", True) else "straight_through",
        without_code="zeros" if options.get("return_zeros_for_masked_padding", True) else "input",
    )  # fmt: skip
    assert torch.equal(found.indices, i)
    genfast.ema_update_(*state, z, found.indices, metric="cosine" if cosine else "l2")
    for got, expected in zip(state, (book.embed, book.cluster_size, book.embed_avg)):
        assert torch.allclose(got, expected[0], atol=1e-6)
    if masked and cosine:
        return  # the peer then takes the loss and what is masked from the vectors before it divides them
    ((found.z_q * weights).sum() + found.commitment_loss).backward()
    assert torch.allclose(found.z_q, q, atol=1e-6) and torch.allclose(found.commitment_loss, loss, atol=1e-6)
    assert torch.allclose(x.grad, y.grad, atol=2e-6)


# --- k-means ---------------------------------------------------------------------------------------------------------


def inertia(z, centres):
    return torch.cdist(z.double(), centres.double()).min(1).values.square().sum().item()


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_kmeans_finds_what_is_there(init):
    centres = 20 * randn(12, 6)
    z = centres.repeat_interleave(30, 0) + randn(360, 6, seed=1)
    found, sizes = genfast.kmeans(z, 12, seed=4, init=init, iterations=6)
    means = z.view(12, 30, 6).mean(1)
    if init == "random":  # which may stop where two centres share a cluster
        assert sizes.sum() == 360 and inertia(z, found) < inertia(z, z[:12])
        return
    order = torch.cdist(means, found).argmin(1)
    assert sorted(order.tolist()) == list(range(12)) and (sizes == 30).all()
    assert torch.allclose(found[order], means, atol=1e-5)


def test_kmeans_is_as_good_as_the_peers():
    peer = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    z = randn(800, 5)
    torch.manual_seed(0)
    theirs = peer.kmeans(z[None], 24, 8)[0][0]
    for init in ("kmeans++", "random"):
        assert inertia(z, genfast.kmeans(z, 24, iterations=8, seed=0, init=init)[0]) < 1.03 * inertia(z, theirs)


def test_kmeans_of_every_kind(threads):
    z = randn(3, 6, 200)
    results = []
    for count in (1, 3):
        threads(count)
        centres, sizes = genfast.kmeans(z, 7, seed=2, dim=1, groups=2, metric="cosine", iterations=3)
        results.append((centres, sizes))
    assert all(map(torch.equal, *results)) and centres.shape == (2, 7, 3) and (sizes.sum(1) == 600).all()
    assert torch.allclose(centres.norm(dim=-1), torch.ones(()))
    mask = torch.zeros(40, dtype=torch.bool)
    mask[:5] = True
    z = randn(40, 2).index_fill(0, torch.arange(5, 40), torch.nan)
    for init in ("kmeans++", "random"):
        centres, sizes = genfast.kmeans(z, 8, seed=2, mask=mask, init=init)  # more than there are
        assert centres.isfinite().all() and sizes.sum() == 5 and inertia(z[:5], centres) < 1e-10
        drawn, none = genfast.kmeans(z[:5], 4, seed=1, iterations=0, init=init)
        taken = (drawn[:, None] == z[:5]).all(2)
        assert (taken.sum(1) == 1).all() and taken.sum(0).max() == 1 and not none.any()
    with pytest.raises(ValueError, match="NaN"):
        genfast.kmeans(z, 2, seed=1)


def test_kmeans_draws_by_squared_distance():
    """Of three points on a line, the second centre: 1 or 4 shares, from either end."""
    z = torch.tensor([[0.0], [1.0], [3.0]])
    second = torch.zeros(3, 3)
    for seed in range(1500):
        first, other = genfast.kmeans(z, 2, seed=seed, iterations=0)[0].flatten().long().tolist()
        second[{0: 0, 1: 1, 3: 2}[first], {0: 0, 1: 1, 3: 2}[other]] += 1
    expected = torch.tensor([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]]) * 500
    possible = expected > 0
    # Chi-square with 5 degrees of freedom, and three at most for the rows: above 40 once in 10^6 seeds.
    assert ((second - expected)[possible] ** 2 / expected[possible]).sum() < 40 and not second[~possible].any()


# --- ranks -----------------------------------------------------------------------------------------------------------


def _joined():
    indices = torch.randint(0, 25, (60,), generator=torch.Generator().manual_seed(6))
    return randn(60, 8), indices, [randn(30, 8, seed=1), 3 * randn(30, seed=2).abs(), randn(30, 8, seed=3)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    calls, reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, *args, **options: (calls.append(t.numel()), reduce(t, *args, **options))[1]
    z, indices, state = _joined()
    mine = slice(30 * rank, 30 * rank + 30)
    genfast.ema_update_(*state, z[mine], indices[mine], threshold=2.0, seed=9, offset=4, group=dist.group.WORLD)
    assert calls == [2 * 30 * 9]
    clusters = [
        genfast.kmeans(z[mine], 6, seed=3, init=init, iterations=4, group=dist.group.WORLD)
        for init in ("kmeans++", "random")
    ]
    torch.save((state, clusters), f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_are_one_with_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (first, clusters), (second, same) = (torch.load(tmp_path / f"rank{r}") for r in range(2))
    assert all(map(torch.equal, first, second))
    z, indices, state = _joined()
    before = state[0].clone()
    genfast.ema_update_(*state, z, indices, threshold=2.0, seed=9, offset=4)
    for got, expected in zip(first, state):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)
    revived = (first[0][:, None] == z).all(2)
    assert revived[:, :30].any() and revived[:, 30:].any() and not torch.equal(before, first[0])
    for (centres, sizes), (others, counts) in zip(clusters, same):
        assert torch.equal(centres, others) and torch.equal(sizes, counts) and sizes.sum() == 60
        assert inertia(z, centres) < 1.2 * inertia(z, genfast.kmeans(z, 6, seed=3, iterations=4)[0])
