"""``forward_mask``: backends against the reference, the published forward processes, the law of what is drawn."""

import math

import pytest
import torch

import genfast
from genfast import backends
from genfast.checks import token_masking as checks

X0 = torch.randint(0, 50, (16, 96), generator=torch.Generator().manual_seed(0))
MASK = 50


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("isa", backends.machine_isas())
def test_every_instruction_set(isa):
    with backends.instruction_set(isa):
        assert [case.name for case in checks.cases() if checks.check(case, "cpu") != (0, 0)] == []


# --- the published code, from the same generator ---------------------------------------------------------------------


def test_the_forward_process_of_llada():
    draw = generator()
    p = (1 - 1e-3) * torch.rand(16, generator=draw) + 1e-3
    masked = torch.rand(X0.shape, generator=draw) < p[:, None]
    prompt = torch.arange(96) < torch.arange(16)[:, None]
    got = genfast.forward_mask(X0, mask_id=MASK, maskable=~prompt, generator=generator())
    assert torch.equal(got.mask, masked & ~prompt) and torch.equal(got.x, torch.where(masked & ~prompt, MASK, X0))
    assert torch.equal(got.weight, torch.where(got.mask, 1 / p[:, None], 0))
    assert torch.equal((1 - 1e-3) * got.t + 1e-3, p)


@pytest.mark.parametrize("blocks, eps_max", [(1, 1.0), (6, 0.8)])
def test_the_forward_process_of_mdlm_and_of_block_diffusion(blocks, eps_max):
    """Stratified times; MDLM's noise keeps an eps of the tokens, and both weigh with 1 / t."""
    draw = generator()
    uniform = torch.rand(16, blocks, generator=draw)
    parts = torch.arange(16 * blocks) / (16 * blocks)
    uniform = (uniform / (16 * blocks) + parts.view(16, blocks)) % 1
    t = (eps_max - 1e-3) * uniform + 1e-3
    eps = 1e-3 if blocks == 1 else 0.0
    p = ((1 - eps) * t).repeat_interleave(96 // blocks, dim=1)
    masked = torch.rand(X0.shape, generator=draw) < p
    got = genfast.forward_mask(
        X0,
        mask_id=MASK,
        schedule="loglinear",
        eps=eps,
        t_range=(1e-3, eps_max),
        block_size=None if blocks == 1 else 16,
        antithetic=True,
        generator=generator(),
    )
    assert torch.equal(got.t.view(16, blocks), t) and torch.equal(got.mask, masked)
    assert torch.equal(got.weight, torch.where(masked, 1 / t.repeat_interleave(96 // blocks, dim=1), 0))


def test_the_uniform_graph_of_sedd():
    draw = generator()
    t = (1 - 1e-3) * torch.rand(16, generator=draw) + 1e-3
    moved = torch.rand(X0.shape, generator=draw) < ((1 - 1e-3) * t)[:, None]
    tokens = torch.randint(0, 50, X0.shape, generator=draw)
    got = genfast.forward_mask(X0, vocab_size=50, schedule="loglinear", generator=generator())
    assert torch.equal(got.t, t)
    assert torch.equal(got.mask, moved) and torch.equal(got.x, torch.where(moved, tokens, X0))
    assert got.weight is None


# --- the law of what is drawn ----------------------------------------------------------------------------------------


def chi_square(counts, expected):
    """As a normal deviate (Wilson and Hilferty); above 4.9 once in 10^6 seeds."""
    freedom = counts.numel() - 1
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    return ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def test_positions_are_noised_independently_with_their_probability():
    """Neighbours in the layout of the random words (1, 16 and 64 apart) share nothing."""
    x0 = torch.zeros(4000, 160, dtype=torch.int64)
    mask = genfast.forward_mask(x0, mask_id=1, t=0.3, eps=0.0, seed=1).mask
    assert abs(chi_square(mask.sum(0), torch.full((160,), 4000 * 0.3)) - 0) < 4.9
    for apart in (1, 16, 64):
        both = (mask[:, apart:] & mask[:, :-apart]).double().mean().item()
        n = 4000 * (160 - apart)
        assert abs(both - 0.09) < 4.9 * math.sqrt(3 * 0.09 * 0.91 / n)  # the pairs of a position overlap


def test_times_are_uniform_in_their_range():
    t = genfast.forward_mask(X0[:, :1].expand(16, 4000), mask_id=MASK, block_size=1, t_range=(0.3, 0.8), seed=2).t
    assert t.shape == (16, 4000) and t.min() >= 0.3 and t.max() <= 0.8
    counts = torch.histc(t, 50, 0.3, 0.8)
    assert chi_square(counts, torch.full((50,), t.numel() / 50)) < 4.9


def test_antithetic_times_have_a_stratum_each():
    got = genfast.forward_mask(X0, mask_id=MASK, antithetic=True, block_size=12, seed=3)
    assert ((got.t.flatten() * 128).floor() == torch.arange(128)).all()
    # The variance of their mean is that of one uniform number over n^3, and 1 / n of it without strata.
    means = {
        kind: torch.stack(
            [genfast.forward_mask(X0, mask_id=MASK, antithetic=kind, seed=s).t.mean() for s in range(400)]
        )
        for kind in (True, False)
    }
    assert means[False].var() == pytest.approx(1 / 12 / 16, rel=0.4)
    assert means[True].var() == pytest.approx(1 / 12 / 16**3, rel=0.4)
    for m in means.values():
        assert abs(m.mean() - 0.5) < 4.9 * m.std() / 20


def test_the_weighted_mask_counts_every_position_once_in_the_mean():
    for options in (dict(), dict(schedule="loglinear", eps=0.0), dict(block_size=8, t_range=(0.2, 0.9))):
        got = genfast.forward_mask(X0.repeat(300, 1), mask_id=MASK, seed=4, **options)
        row = got.weight.mean(1)
        assert abs(row.mean() - 1) < 4.9 * row.std() / math.sqrt(len(row))


def test_uniform_tokens_are_uniform():
    got = genfast.forward_mask(torch.full((200, 1000), 7), vocab_size=300, t=1.0, seed=5)
    assert got.mask.all()
    counts = torch.bincount(got.x.flatten(), minlength=300)
    assert counts.numel() == 300 and chi_square(counts, torch.full((300,), 200_000 / 300)) < 4.9


def test_a_count_is_exact_and_every_subset_as_likely():
    x0 = torch.zeros(20_000, 7, dtype=torch.int64)
    maskable = torch.tensor([True, True, False, True, True, True, False])
    got = genfast.forward_mask(x0, mask_id=1, maskable=maskable, count=2, seed=6)
    assert (got.mask.sum(1) == 2).all() and not got.mask[:, ~maskable].any()
    assert torch.equal(got.t, torch.full((20_000,), 0.4)) and (got.weight[got.mask] == 2.5).all()
    subsets = torch.bincount((got.mask.long() << torch.arange(7)).sum(1), minlength=128)
    subsets = subsets[subsets > 0]
    assert subsets.numel() == 10 and chi_square(subsets, torch.full((10,), 2000.0)) < 4.9


def test_a_count_beyond_what_is_maskable():
    maskable = torch.zeros(3, 200, dtype=torch.bool)
    maskable[1, 50:60] = True
    got = genfast.forward_mask(X0[:3, :50].repeat(1, 4), mask_id=MASK, maskable=maskable, count=11, seed=0)
    assert torch.equal(got.mask, maskable) and got.t.tolist() == [0, 1, 0]
    counts = torch.tensor([-1, 0, 150])
    got = genfast.forward_mask(X0[:3, :50].repeat(1, 4), mask_id=MASK, count=counts, seed=0)
    assert got.mask.sum(1).tolist() == [0, 0, 150]


def test_a_larger_time_noises_the_same_positions_and_more():
    low, high = (genfast.forward_mask(X0, mask_id=MASK, t=t, seed=7).mask for t in (0.3, 0.6))
    assert (high | ~low).all() and high.sum() > low.sum()
    some = genfast.forward_mask(X0, mask_id=MASK, count=20, seed=7).mask
    assert (some & low).sum() == torch.minimum(some.sum(1), low.sum(1)).sum()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(antithetic=True, block_size=5, global_batch=16),
        dict(vocab_size=9, mask_id=None),
        dict(count=9),
    ],
)
def test_any_split_of_the_batch_and_any_threads_draw_the_same(options):
    options = dict(mask_id=MASK, seed=8, stream=2) | options
    x0 = X0.repeat(1, 40)
    whole = genfast.forward_mask(x0, **options)
    parts = [genfast.forward_mask(x0[b : b + 4], offset=b, **options) for b in range(0, 16, 4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = genfast.forward_mask(x0, **options)
    torch.set_num_threads(threads)
    for k in range(4):
        if whole[k] is not None:
            assert torch.equal(whole[k], torch.cat([part[k] for part in parts])) and torch.equal(whole[k], alone[k])
    other = genfast.forward_mask(x0, **(options | dict(stream=3)))
    assert not torch.equal(whole.mask, other.mask)


def test_given_times_are_kept():
    first = genfast.forward_mask(X0, mask_id=MASK, block_size=10, schedule="loglinear", seed=9)
    again = genfast.forward_mask(X0, mask_id=MASK, block_size=10, schedule="loglinear", seed=9, t=first.t)
    assert all(map(torch.equal, first, again))
    nothing = genfast.forward_mask(X0, mask_id=MASK, t=torch.full((16,), torch.nan), seed=9)
    assert not nothing.mask.any() and torch.equal(nothing.x, X0) and (nothing.weight == 0).all()
    assert genfast.forward_mask(X0, mask_id=MASK, t=1.0, seed=9).mask.all()


def test_without_a_seed_one_is_taken_from_torch():
    torch.manual_seed(0)
    first, second = genfast.forward_mask(X0, mask_id=MASK), genfast.forward_mask(X0, mask_id=MASK)
    torch.manual_seed(0)
    assert torch.equal(first.mask, genfast.forward_mask(X0, mask_id=MASK).mask)
    assert not torch.equal(first.mask, second.mask)


# --- refusals, torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(mask_id=None), "mask_id"),
        (dict(vocab_size=5), "vocab_size"),
        (dict(mask_id=2**63), "mask_id"),
        (dict(mask_id=1.0), "mask_id"),
        (dict(mask_id=None, vocab_size=0), "vocab_size"),
        (dict(schedule="cosine"), "schedule"),
        (dict(eps=1.0), "eps"),
        (dict(t_range=(0.5, 0.3)), "t_range"),
        (dict(t=1.5), "t must"),
        (dict(t=torch.ones(16, dtype=torch.int64)), "t must"),
        (dict(t=torch.ones(3)), "t is"),
        (dict(t=0.5, antithetic=True), "antithetic"),
        (dict(t=0.5, t_range=(0, 1)), "t_range"),
        (dict(global_batch=20), "global_batch"),
        (dict(antithetic=True, global_batch=0), "global_batch"),
        (dict(antithetic=True, seed=torch.zeros(16, dtype=torch.int64)), "antithetic"),
        (dict(block_size=0), "block_size"),
        (dict(count=3, t=0.5, block_size=4), "t, block_size"),
        (dict(count=3, schedule="loglinear"), "schedule"),
        (dict(count=1.5), "count"),
        (dict(count=torch.ones(3, dtype=torch.int64)), "count"),
        (dict(maskable=torch.ones(16, 95, dtype=torch.bool)), "maskable"),
        (dict(maskable=torch.ones(16, 96)), "maskable"),
        (dict(seed=1, generator=torch.Generator()), "exclude"),
        (dict(generator=3), "generator"),
        (dict(seed=torch.zeros(5, dtype=torch.int64)), "seed"),
        (dict(offset=-1), "offset"),
    ],
)
def test_refusals(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        genfast.forward_mask(X0, **(dict(mask_id=MASK) | options))


def test_refused_tokens():
    for x0 in (X0.float(), X0[0], [[1]]):
        with pytest.raises(TypeError, match="x0"):
            genfast.forward_mask(x0, mask_id=MASK)


def test_compiles_without_a_break():
    def batch(x0, t):
        return (
            *genfast.forward_mask(x0, mask_id=MASK, t=t, seed=1),
            *genfast.forward_mask(x0, mask_id=MASK, block_size=32, antithetic=True, seed=1),
            *genfast.forward_mask(x0, mask_id=MASK, count=4, seed=1),
        )

    t = torch.rand(16, generator=generator())
    got = torch.compile(batch, fullgraph=True, backend="aot_eager")(X0, t)
    assert all(map(torch.equal, got, batch(X0, t)))


def test_opcheck():
    from genfast.ops.token_masking import _forward_op

    numbers = (0.0, 1.0, 0.999, 0.001, False)
    args = (X0, MASK, 0, None, True, *numbers, 16, 6, 96, None, None, None, None, None, None, 3, 0, 0)
    torch.library.opcheck(_forward_op, args, test_utils=("test_schema", "test_faketensor"))
