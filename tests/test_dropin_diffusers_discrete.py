"""The schedulers of tokens against those of diffusers: loops from the same generator, and the law of seeded draws."""

import math
from unittest import mock

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("genfast.dropin.diffusers", exc_type=ImportError)

import genfast  # noqa: E402
import genfast.dropin.diffusers as ours  # noqa: E402
from genfast.dropin.diffusers.base import peer_class  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, LENGTH, MASK = 40, 24, 39
DISCRETE = ("BlockRefinement", "DiscreteDDIM", "EntropyBound", "Amused", "VQDiffusion")


def logits_of(x, step, dtype=torch.float32, size=SIZE):
    """A model: any function of the tokens and the step without ties."""
    draw = torch.Generator().manual_seed(step + 1)
    table = torch.randn(size, size, generator=draw) * 3
    return (table[x] + 0.1 * torch.randn(*x.shape, size, generator=draw)).to(dtype)


def loop(module, name, config, start, steps=6, dtype=torch.float32, schedule=True, generator=5, **options):
    """Every output of every step."""
    scheduler = getattr(module, f"{name}Scheduler")(**config)
    if schedule:
        scheduler.set_timesteps(steps)
    draw = None if generator is None else torch.Generator().manual_seed(generator)
    x, outputs = start, []
    for i in range(steps):
        t = i if name == "BlockRefinement" else scheduler.timesteps[i]
        logits = logits_of(x, i, dtype)
        result = scheduler.step(logits, t, x, generator=draw, return_dict=False, **options)
        assert result[-1].data_ptr() == logits.data_ptr() or name == "EntropyBound"
        outputs.append(result)
        x = result[0]
    return outputs


def same_loops(name, config, start, **options):
    theirs = loop(diffusers, name, config, start, **options)
    peer = getattr(diffusers, f"{name}Scheduler")
    with mock.patch.object(peer, "step", side_effect=AssertionError("fell to the peer")):
        mine = loop(ours, name, config, start, **options)
    for a, b in zip(mine, theirs):
        assert len(a) == len(b)
        for u, v in zip(a, b):
            assert u.dtype == v.dtype and u.shape == v.shape
            if v.is_floating_point():
                torch.testing.assert_close(u, v, rtol=2e-5, atol=1e-7)
            else:
                assert torch.equal(u, v)


MASKED = torch.full((3, LENGTH), MASK)
NOISE = torch.randint(0, SIZE, (3, LENGTH), generator=torch.Generator().manual_seed(1))
PROMPTED = torch.where(torch.arange(LENGTH) < 5, NOISE, MASKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [MASKED, PROMPTED], ids=["masked", "prompted"])
@pytest.mark.parametrize(
    "config, options",
    [
        ({}, {}),
        (dict(threshold=0.6), {}),
        (dict(editing_threshold=0.3), dict(prompt_mask=torch.arange(LENGTH) < 5, threshold=0.8)),
        ({}, dict(editing_threshold=0.5, sampling_method="greedy", temperature=0.7)),
        ({}, dict(threshold=0.2, temperature=0.0, sampling_method="multinomial")),
        ({}, dict(schedule=False, editing_threshold=0.1)),
    ],
)
def test_block_refinement(config, options, start, dtype):
    same_loops("BlockRefinement", config, start, mask_token_id=MASK, dtype=dtype, **options)


def test_block_refinement_commits_what_exceeds_the_threshold():
    """And what only reaches it counts for nothing: with four equal logits every probability is 1 / 4."""
    sample, logits = torch.full((2, 6), 3), torch.zeros(2, 6, 4)
    for module in (diffusers, ours):
        scheduler = module.BlockRefinementScheduler(block_length=6)
        scheduler.set_timesteps(6)
        for threshold, count in ((0.25, 1), (0.2499, 6)):
            step = scheduler.step(logits, 0, sample, mask_token_id=3, threshold=threshold, editing_threshold=0.25)
            assert step.transfer_index.sum(1).tolist() == [count, count]
            done = scheduler.step(logits, 0, sample - 2, mask_token_id=3, editing_threshold=threshold)
            assert done.editing_transfer_index.sum(1).tolist() == [6 * (count > 1)] * 2


@pytest.mark.parametrize("options", [{}, dict(threshold=0.5), dict(editing_threshold=0.2), dict(editing_threshold=0.0)])
def test_block_refinement_of_uniform_noise(options):
    same_loops("BlockRefinement", {}, NOISE, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 6])
def test_discrete_ddim(dtype, steps):
    same_loops("DiscreteDDIM", {}, NOISE, steps=steps, dtype=dtype)


@pytest.mark.parametrize(
    "name, config, options",
    [
        ("BlockRefinement", {}, dict(mask_token_id=MASK, temperature=0.7, top_k=5, top_p=0.9)),
        ("DiscreteDDIM", {}, dict(temperature=0.7)),
        ("EntropyBound", {}, dict(entropy_bound=0.5)),
        ("Amused", dict(mask_token_id=MASK), {}),
    ],
)
@pytest.mark.parametrize("generator", [3, None])
def test_draws_from_a_generator_are_the_peers(name, config, options, generator):
    start = MASKED if "mask_token_id" in {**config, **options} else NOISE
    results = []
    for module in (diffusers, ours):
        torch.manual_seed(0)
        scheduler = getattr(module, f"{name}Scheduler")(**config)
        scheduler.set_timesteps(6)
        x, draw = start, None if generator is None else torch.Generator().manual_seed(generator)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(logits_of(x, i), i if name == "BlockRefinement" else t, x, generator=draw, **options)
            x = x.prev_sample
        results.append(x)
    assert torch.equal(*results)


# --- draws in the kernels --------------------------------------------------------------------------------------------


def deviate(counts, expected):
    """Chi-square as a normal deviate (Wilson and Hilferty); above 4.9 once in 10^6 seeds."""
    keep = expected > 5
    counts, expected = counts[keep].double(), expected[keep].double()
    freedom = len(counts) - 1
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    return ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def many(row, count=20000):
    return row.expand(1, count, -1)


def test_seeded_block_refinement_draws_from_the_filtered_distribution():
    row = torch.randn(SIZE, generator=torch.Generator().manual_seed(2)) * 2
    for options in (dict(temperature=0.7), dict(temperature=1.5, top_k=8), dict(temperature=1.0, top_p=0.7)):
        peer = diffusers.BlockRefinementScheduler
        temperature, top_k, top_p = (options.get(k) for k in ("temperature", "top_k", "top_p"))
        filtered = peer._top_p_filtering(peer._top_k_filtering(row[None] / temperature, top_k), top_p)
        p = filtered.softmax(-1)[0]
        scheduler = ours.BlockRefinementScheduler()
        scheduler.set_timesteps(4)
        found = scheduler.step(many(row), 1, torch.full((1, 20000), MASK), mask_token_id=MASK, seed=3, **options)
        counts = torch.bincount(found.sampled_tokens[0], minlength=SIZE)
        assert (counts[p == 0] == 0).all() and deviate(counts, p * 20000) < 4.9
        torch.testing.assert_close(found.sampled_probs[0], p[found.sampled_tokens[0]], rtol=1e-5, atol=1e-7)


def test_seeded_discrete_ddim_follows_the_posterior():
    """Of x_s, over the predicted token: the sum of its routes."""
    row = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    p, current, step, steps = row.softmax(-1), 7, 2, 8
    a_t, a_s = step / steps, (step + 1) / steps
    forward = torch.full((SIZE, SIZE), (1 - a_t / a_s) / SIZE) + a_t / a_s * torch.eye(SIZE)  # [s, t]
    clean = torch.full((SIZE, SIZE), (1 - a_s) / SIZE) + a_s * torch.eye(SIZE)  # [0, s]
    joint = clean * forward[:, current]
    law = p @ (joint / joint.sum(-1, keepdim=True))
    scheduler = ours.DiscreteDDIMScheduler()
    scheduler.set_timesteps(steps)
    sample = torch.full((1, 20000), current)
    x = scheduler.step(many(row), step, sample, temperature=1.0, seed=4).prev_sample
    assert deviate(torch.bincount(x[0], minlength=SIZE), law * 20000) < 4.9
    greedy = scheduler.step(many(row), step, sample, seed=4)
    assert (greedy.sampled_tokens == row.argmax()).all() and greedy.prev_sample.unique().numel() > 2


def test_seeded_entropy_bound_accepts_what_the_peer_accepts():
    logits = torch.randn(2, 64, SIZE, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.5, 9, 64)[:, None]
    sample = torch.zeros(2, 64, dtype=torch.int64)
    for bound in (0.0, 0.1, 3.0, 1000.0):
        results = []
        for module, options in ((diffusers, {}), (ours, {"seed": 5})):
            scheduler = module.EntropyBoundScheduler(entropy_bound=bound)
            scheduler.set_timesteps(6)
            results.append(scheduler.step(logits, scheduler.timesteps[2], sample, **options))
        theirs, mine = results
        assert torch.equal(mine.accepted_index, theirs.accepted_index)
        assert torch.equal(mine.pred_logits, theirs.pred_logits)
        accepted = mine.accepted_index
        assert torch.equal(mine.prev_sample[accepted], mine.sampled_tokens[accepted])
    row = torch.randn(SIZE, generator=torch.Generator().manual_seed(5))
    scheduler = ours.EntropyBoundScheduler(t_min=0.9, t_max=0.9, entropy_bound=-1.0)
    found = scheduler.step(many(row), 3, torch.zeros(1, 20000, dtype=torch.int64), seed=6)
    assert deviate(torch.bincount(found.sampled_tokens[0], minlength=SIZE), (row / 0.9).softmax(-1) * 20000) < 4.9
    assert not found.accepted_index.any()
    assert deviate(torch.bincount(found.prev_sample[0], minlength=SIZE), torch.full((SIZE,), 500.0)) < 4.9


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("image", [False, True])
def test_seeded_amused_leaves_as_many_masks_as_the_peer(schedule, image):
    shape = (3, 4, 6) if image else (3, 24)
    start = torch.full(shape, MASK)
    start.view(3, 24)[1, :10] = 3
    for steps, ratio in ((1, 1.0), (7, 1.0), (12, 0.6)):
        masks = {}
        for module, options in ((diffusers, {"generator": torch.Generator().manual_seed(1)}), (ours, {"seed": 5})):
            scheduler = module.AmusedScheduler(MASK, masking_schedule=schedule)
            scheduler.set_timesteps(steps, temperature=(2, 0))
            x, masks[module] = start, []
            for i, t in enumerate(scheduler.timesteps):
                logits = logits_of(x, i)[..., :MASK]
                logits = logits.permute(0, 3, 1, 2) if image else logits
                step = scheduler.step(logits, t, x, starting_mask_ratio=ratio, **options)
                assert (step.pred_original_sample != MASK).all() and step.prev_sample.shape == x.shape
                known = x != MASK
                assert torch.equal(step.prev_sample[known], x[known])
                x = step.prev_sample
                masks[module].append((x == MASK).flatten(1).sum(1).tolist())
        assert masks[ours] == masks[diffusers] and (x != MASK).all()


def test_seeded_amused_keeps_positions_by_confidence_and_noise():
    """Two positions, one of which stays: of log p + T x Gumbel the larger, p_1^(1/T) / (p_1^(1/T) + p_2^(1/T))."""
    logits = torch.full((20000, 2, 3), -torch.inf)
    logits[:, 0, 0], logits[:, 1, 0] = 0.0, math.log(0.3)
    logits[:, 1, 1] = math.log(0.7)
    scheduler = ours.AmusedScheduler(3)
    scheduler.set_timesteps(3, temperature=(1.5, 1.5))
    step = scheduler.step(logits, 2, torch.full((20000, 2), 3), seed=7)
    x, token = step.prev_sample, step.pred_original_sample[:, 1]
    assert ((x == 3).sum(1) == 1).all()
    for value, p in ((0, 0.3), (1, 0.7)):
        rows = token == value
        expected = 1 / (1 + p ** (1 / 1.5))
        n = rows.sum().item()
        kept = (x[rows, 0] != 3).float().mean().item()
        assert abs(n / 20000 - p) < 4.9 * math.sqrt(0.21 / 20000)
        assert abs(kept - expected) < 4.9 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("t", [0, 1, 5, 9])
@pytest.mark.parametrize("current", [4, SIZE - 1], ids=["class", "mask"])
def test_seeded_vq_diffusion_follows_the_posterior(t, current):
    scheduler = ours.VQDiffusionScheduler(SIZE, num_train_timesteps=10, alpha_cum_end=0.05, gamma_cum_end=0.8)
    scheduler.set_timesteps(10)
    draw = torch.Generator().manual_seed(t)
    log_p = (torch.randn(SIZE - 1, generator=draw) * 1.5).log_softmax(0)
    x = torch.full((1, 20000), current)
    got = scheduler.step(log_p[None, :, None].expand(1, -1, 20000), t, x, seed=8).prev_sample
    law = log_p.exp() if t == 0 else scheduler.q_posterior(log_p[None, :, None], x[:, :1], t)[0, :, 0].exp()
    counts = torch.bincount(got[0], minlength=SIZE)[: len(law)]
    assert counts.sum() == 20000 and deviate(counts, law / law.sum() * 20000) < 4.9


def test_vq_diffusion_from_a_generator_is_the_peers():
    log_p = logits_of(NOISE, 0, size=SIZE)[..., : SIZE - 1].log_softmax(-1).transpose(1, 2)
    results = []
    for module in (diffusers, ours):
        scheduler = module.VQDiffusionScheduler(SIZE)
        scheduler.set_timesteps(10)
        draw = torch.Generator().manual_seed(9)
        results.append(scheduler.step(log_p, scheduler.timesteps[3], NOISE, generator=draw).prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", DISCRETE)
def test_a_seed_repeats_itself_and_steps_differ(name):
    config = {"Amused": dict(mask_token_id=MASK), "VQDiffusion": dict(num_vec_classes=SIZE)}.get(name, {})
    start = MASKED if name in ("Amused", "BlockRefinement") else NOISE
    options = dict(temperature=1.0) if name in ("BlockRefinement", "DiscreteDDIM") else {}
    if name == "BlockRefinement":
        options["mask_token_id"] = MASK
    logits = logits_of(start, 0)
    logits = logits[..., :MASK].transpose(1, 2) if name == "VQDiffusion" else logits

    def step(seed, place, accelerated=False):
        scheduler = getattr(diffusers if accelerated else ours, f"{name}Scheduler")(**config)
        scheduler.set_timesteps(10)
        if accelerated:
            scheduler = genfast.accelerate(scheduler, seed=seed)
            return scheduler.step(logits, scheduler.timesteps[place], start, **options).prev_sample
        return scheduler.step(logits, scheduler.timesteps[place], start, seed=seed, **options).prev_sample

    state = torch.get_rng_state()
    first = step(1, 3)
    assert torch.equal(first, step(1, 3)) and torch.equal(first, step(1, 3, accelerated=True))
    assert not torch.equal(first, step(2, 3)) and not torch.equal(first, step(1, 4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["BlockRefinement", "DiscreteDDIM", "EntropyBound"])
def test_blocks_of_one_pipeline_draw_other_numbers_and_its_next_run_the_same(name):
    options = dict(temperature=1.0) if name != "EntropyBound" else {}
    scheduler = genfast.accelerate(getattr(diffusers, f"{name}Scheduler")(), seed=1)

    def run():
        scheduler.set_timesteps(4)
        blocks = []
        for _ in range(3):
            for t in range(3):  # a block may end before its last step
                tokens = scheduler.step(logits_of(NOISE, t), t, NOISE, **options).sampled_tokens
            blocks.append(tokens)
        return torch.stack(blocks)

    first = run()
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert torch.equal(first, run())
    own = [scheduler.step(logits_of(NOISE, 1), 1, NOISE, seed=1, **options).sampled_tokens for _ in range(2)]
    assert torch.equal(*own)  # a seed of the call is the caller's to change


# --- what is left to the peer ----------------------------------------------------------------------------------------


def test_gradients_and_float64_are_the_peers():
    logits = logits_of(NOISE, 0).requires_grad_()
    scheduler = ours.DiscreteDDIMScheduler()
    found = scheduler.step(logits, 3, NOISE)
    assert found.sampled_probs.requires_grad
    with pytest.raises(ValueError, match="in-kernel noise"):
        scheduler.step(logits, 3, NOISE, seed=1)
    with pytest.raises(ValueError, match="in-kernel noise"):
        scheduler.step(logits.double().detach(), 3, NOISE, seed=1)
    with pytest.raises(ValueError, match="exclude"):
        scheduler.step(logits.detach(), 3, NOISE, seed=1, generator=torch.Generator())


def test_a_nucleus_of_the_k_largest_has_no_fused_form():
    scheduler = ours.BlockRefinementScheduler()
    scheduler.set_timesteps(4)
    options = dict(mask_token_id=MASK, temperature=1.0, top_k=5, top_p=0.9)
    with pytest.raises(ValueError, match="in-kernel noise"):
        scheduler.step(logits_of(MASKED, 0), 0, MASKED, seed=1, **options)


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(temperature=1.0, top_p=-0.5)])
def test_the_peers_errors(options):
    for module in (diffusers, ours):
        scheduler = module.BlockRefinementScheduler()
        with pytest.raises(ValueError, match="must be"):
            scheduler.step(logits_of(MASKED, 0), 0, MASKED, mask_token_id=MASK, **options)


def test_they_are_swapped_and_saved_as_the_peers():
    swapped = {cls.__name__ for _, cls in ours.replacements()}
    assert {f"{name}Scheduler" for name in DISCRETE} <= swapped
    assert all(peer_class(getattr(ours, f"{n}Scheduler")) is getattr(diffusers, f"{n}Scheduler") for n in DISCRETE)
