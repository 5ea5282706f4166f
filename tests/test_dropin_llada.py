"""The drop-in of LLaDA against the published loop written out in PyTorch."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_peer import EOS, EOT, MASK, Toy, V, counts, gumbel, llada

from genfast import generate_llada
from genfast.dropin.llada import (
    add_gumbel_noise,
    forward_process,
    generate,
    get_log_likelihood,
    get_num_transfer_tokens,
)

IDS = dict(mask_id=MASK, eos_id=EOS, eot_id=EOT)
BLOCKS = dict(steps=12, gen_length=24, block_length=8)
CORRECTED = dict(forbid=True, count_all=True, both_last=True)
"""What the default does otherwise than the published code."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that on a busy machine threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(batch=3, length=6, seed=1):
    return torch.randint(0, V - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def likes_masks(seed):
    """A model whose likeliest token is often the mask, or an end."""
    model = Toy(seed)
    model.head[:, MASK] *= 2
    model.head[:, EOS] *= 1.5
    model.head[:, EOT] *= 1.5
    return model


def both(model, prompt, *arguments, seed=0, peer=None, **options):
    """(ours, published), each after the same ``torch.manual_seed``."""
    torch.manual_seed(seed)
    ours = generate(model, prompt, *arguments, **options, **IDS)
    after = torch.rand(1)
    options.pop("compat", None)
    torch.manual_seed(seed)
    published = llada(model, prompt, *arguments, **options, **(peer or {}))
    assert torch.equal(after, torch.rand(1)), "not as many draws as published"
    return ours, published


def test_the_signature_is_the_published_one():
    published = [
        ("model", inspect.Parameter.empty), ("prompt", inspect.Parameter.empty), ("attention_mask", None),
        ("steps", 128), ("gen_length", 128), ("block_length", 128), ("temperature", 0.0), ("cfg_scale", 0.0),
        ("remasking", "low_confidence"), ("mask_id", 126336), ("logits_eos_inf", False),
        ("confidence_eos_eot_inf", False),
    ]  # fmt: skip
    found = inspect.signature(generate).parameters.values()
    assert [(p.name, p.default) for p in found if p.kind is not p.KEYWORD_ONLY] == published
    found = inspect.signature(get_log_likelihood).parameters.values()
    assert [p.name for p in found][:7] == ["model", "prompt", "answer", "mc_num", "batch_size", "cfg_scale", "mask_id"]
    assert [p.default for p in found][3:7] == [128, 16, 0.0, 126336]


runs = dict(
    batch=st.integers(1, 3),
    blocks=st.sampled_from([(8, 16, 16), (16, 16, 4), (3, 24, 24), (4, 12, 3), (24, 12, 3)]),
    temperature=st.sampled_from([0.0, 0.7]),
    cfg_scale=st.sampled_from([0.0, 1.5]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    logits_eos_inf=st.booleans(),
    confidence_eos_eot_inf=st.booleans(),
    padded=st.booleans(),
    holes=st.booleans(),
    seed=st.integers(0, 99),
)


def drawn(batch, blocks, padded, holes, seed, **options):
    prompt = prompts(batch, 6, seed)
    if holes:
        prompt[0, 3] = MASK
    mask = None
    if padded:
        mask = torch.ones_like(prompt)
        mask[-1, :2] = 0
    options |= dict(zip(("steps", "gen_length", "block_length"), blocks))
    return prompt, mask, options


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**runs)
def test_tokens_are_the_published_ones(seed, **run):
    prompt, mask, options = drawn(seed=seed, **run)
    ours, published = both(likes_masks(seed), prompt, mask, seed=seed, peer=CORRECTED, **options)
    assert torch.equal(ours, published) and MASK not in ours


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**runs)
def test_compat_has_the_published_oddities(seed, **run):
    prompt, mask, options = drawn(seed=seed, **run)
    ours, published = both(likes_masks(seed), prompt, mask, seed=seed, compat=True, **options)
    assert torch.equal(ours, published)


def test_the_oddities_show():
    """Each of those that compat reproduces changes some text of these models; otherwise nothing tested them."""
    models, prompt = [likes_masks(seed) for seed in range(6)], prompts()
    masks = [MASK in generate(m, prompt, compat=True, **BLOCKS, **IDS) for m in models]
    assert any(masks) and not any(MASK in generate(m, prompt, **BLOCKS, **IDS) for m in models)
    hot = dict(temperature=0.7, confidence_eos_eot_inf=True, **BLOCKS)
    quiet = [Toy(seed, mask_logit=-1e4) for seed in range(6)]
    for model in quiet:
        model.head[:, EOS] *= 2
    pairs = [both(m, prompt, compat=True, **hot)[0].equal(both(m, prompt, peer=CORRECTED, **hot)[0]) for m in quiet]
    assert not all(pairs)
    # With neither at work the default and compat are the same.
    assert all(
        generate(m, prompt, compat=True, **BLOCKS, **IDS).equal(generate(m, prompt, **BLOCKS, **IDS)) for m in quiet
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_half_precision(dtype, cfg_scale, temperature):
    """In the logits' dtype with compat, else in float32. Logits are few steps of the dtype apart, confidences tie."""
    options = dict(cfg_scale=cfg_scale, temperature=temperature, **BLOCKS)
    for seed in range(3):
        model = Toy(seed, mask_logit=-1e4, dtype=dtype)
        ours, published = both(model, prompts(), compat=True, **options)
        assert torch.equal(ours, published)
        ours, published = both(model, prompts(), peer=dict(CORRECTED, widen=True), **options)
        assert torch.equal(ours, published)


def test_a_generator_in_place_of_torchs_own():
    model, prompt = likes_masks(3), prompts()
    for remasking in ("low_confidence", "random"):
        options = dict(temperature=0.9, remasking=remasking, **BLOCKS)
        before = torch.get_rng_state()
        ours = generate(model, prompt, generator=torch.Generator().manual_seed(7), **options, **IDS)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(
            ours, llada(model, prompt, generator=torch.Generator().manual_seed(7), **options, **CORRECTED)
        )


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_in_kernel_draws(remasking):
    model, prompt = Toy(3, mask_logit=-1e4), prompts()
    options = dict(temperature=0.9, remasking=remasking, **BLOCKS)
    before = torch.get_rng_state()
    found = generate(model, prompt, seed=7, **options, **IDS)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found, generate_llada(model, prompt, mask_id=MASK, seed=7, **options).tokens)
    seeds = torch.tensor([3, 4, 5])
    rows = generate(model, prompt, seed=seeds, **options, **IDS)
    assert torch.equal(rows[1:2], generate(model, prompt[1:2], seed=seeds[1:2], **options, **IDS))
    # Padding a row more does not change it.
    wider = torch.cat([torch.zeros(3, 2, dtype=torch.int64), prompt], 1)
    mask = (torch.arange(8) >= 2).long().expand(3, -1)
    assert torch.equal(generate(model, wider, mask, seed=7, **options, **IDS)[:, 2:], found)


def test_a_model_without_a_logit_for_the_mask():
    model = Toy(2, size=V)
    narrow = lambda ids, **kw: model(ids, **kw).logits[..., :MASK]  # noqa: E731
    for options in ({}, dict(seed=1, temperature=1.0), dict(seed=1, remasking="random")):
        assert MASK not in generate(narrow, prompts(), **BLOCKS, **IDS, **options)


def test_a_model_that_returns_its_own_tensors_finds_them_unchanged():
    logits = torch.randn(2, 10, V, generator=torch.Generator().manual_seed(1))
    kept = logits.clone()
    for compat in (False, True):
        generate(
            lambda ids: logits, prompts(2, 2), steps=4, gen_length=8, block_length=8, logits_eos_inf=True,
            confidence_eos_eot_inf=True, compat=compat, **IDS,
        )  # fmt: skip
    assert torch.equal(logits, kept)


def test_refusals():
    with pytest.raises(AssertionError, match="block_length"):
        generate(Toy(), prompts(), steps=8, gen_length=20, block_length=8, **IDS)
    with pytest.raises(AssertionError, match="steps"):
        generate(Toy(), prompts(), steps=8, gen_length=24, block_length=8, **IDS)
    with pytest.raises(NotImplementedError, match="remasking must be one of"):
        generate(Toy(), prompts(), remasking="entropy", **IDS)
    with pytest.raises(ValueError, match="exclude each other"):
        generate(Toy(), prompts(), seed=1, generator=torch.Generator(), **BLOCKS, **IDS)


def test_add_gumbel_noise_and_counts():
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert add_gumbel_noise(logits, 0) is logits
    torch.manual_seed(3)
    found = add_gumbel_noise(logits, 0.7)
    torch.manual_seed(3)
    assert torch.equal(found, gumbel(logits, 0.7)) and found.dtype == torch.float64
    masks = torch.rand(5, 23, generator=torch.Generator().manual_seed(2)) < 0.5
    found = get_num_transfer_tokens(masks, 7)
    assert torch.equal(found, counts(masks, 7)) and found.dtype == torch.int64


# --- likelihood ------------------------------------------------------------------------------------------------------


def published_likelihood(model, prompt, answer, mc_num, batch_size, cfg_scale):
    """LLaDA's get_log_likelihood.py, in float64 from the logits on; its draws in its order."""
    text, n, losses = torch.cat([prompt, answer]).repeat(batch_size, 1), len(answer), []
    for _ in range(mc_num // batch_size):
        k = torch.randint(1, n + 1, ())
        amounts = torch.linspace(float(k), k + (batch_size - 1) * (n / batch_size), steps=batch_size).round().long()
        amounts = (amounts - 1) % n + 1
        x = text.clone()
        for row, amount in zip(x, amounts):
            row[len(prompt) :][(torch.arange(n) < amount)[torch.randperm(n)]] = MASK
        logits = model(x).logits.double()
        if cfg_scale > 0:
            without = x.clone()
            without[:, : len(prompt)] = MASK
            uncond = model(without).logits.double()
            logits = uncond + (cfg_scale + 1) * (logits - uncond)
        own = logits.log_softmax(-1).gather(-1, text[..., None])[..., 0]
        losses.append(-(own * (x == MASK) * (n / amounts)[:, None]).sum() / batch_size)
    return -float(sum(losses) / len(losses))


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
@pytest.mark.parametrize("mc_num, batch_size, n", [(12, 4, 7), (7, 3, 5), (5, 1, 1), (16, 16, 9)])
def test_likelihood_is_the_published_one(cfg_scale, mc_num, batch_size, n):
    model, prompt, answer = Toy(4), prompts(1, 6)[0], prompts(1, n, 8)[0]
    torch.manual_seed(5)
    found = get_log_likelihood(model, prompt, answer, mc_num, batch_size, cfg_scale, MASK)
    after = torch.rand(1)
    torch.manual_seed(5)
    expected = published_likelihood(model, prompt, answer, mc_num, batch_size, cfg_scale)
    assert torch.equal(after, torch.rand(1))
    assert isinstance(found, float) and found == pytest.approx(expected, rel=2e-6)


def test_likelihood_of_a_model_that_ignores_its_input_is_exact():
    """sum log p over the answer: with equal p every masking weighs the same and the estimate has no variance."""
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    answer = torch.full((6,), 3)
    found = get_log_likelihood(
        lambda ids: bias.expand(*ids.shape, V), prompts(1)[0], answer, 24, 6, mask_id=MASK, generator=torch.Generator()
    )
    assert found == pytest.approx(6 * float(bias.double().log_softmax(0)[3]), rel=1e-6)


@pytest.mark.parametrize("options", [dict(generator=torch.Generator().manual_seed(1)), dict(seed=2)])
def test_forward_process_masks_exact_counts(options):
    text = prompts(1, 10)[0].repeat(8, 1)
    given = torch.arange(10) < 2
    x, share = forward_process(text, given, MASK, **options)
    masked = x == MASK
    assert not masked[:, :2].any() and torch.equal(torch.where(masked, text, x), text)
    # Eight rows, eight answer tokens: every count once.
    assert sorted(masked.sum(1).tolist()) == list(range(1, 9))
    assert torch.equal(share[:, 0], masked.sum(1) / 8) and share.shape == x.shape
    with pytest.raises(ValueError, match="no answer"):
        forward_process(text, given | True, MASK)


def test_likelihood_drawn_in_the_kernel():
    """Unbiased: the mean of 300 estimates is that of 300 as published, within five standard errors."""
    model, prompt, answer = Toy(4, sharpness=2.0), prompts(1, 4)[0], prompts(1, 6, 8)[0]
    options = dict(mc_num=4, batch_size=2, mask_id=MASK)
    before = torch.get_rng_state()
    ours = torch.tensor([get_log_likelihood(model, prompt, answer, seed=s, **options) for s in range(300)])
    assert torch.equal(before, torch.get_rng_state())
    assert ours[3] == get_log_likelihood(model, prompt, answer, seed=3, **options)
    draw = torch.Generator().manual_seed(1)
    published = torch.tensor([get_log_likelihood(model, prompt, answer, generator=draw, **options) for _ in range(300)])
    assert ours.std() > 0
    assert abs(ours.mean() - published.mean()) < 5 * ((ours.var() + published.var()) / 300) ** 0.5
    # How many are masked in one row of a batch is uniform: chi-square, 5 degrees of freedom, p = 1e-5.
    text, given = torch.cat([prompt, answer])[None], torch.arange(10) < 4
    counts = torch.tensor([int((forward_process(text, given, MASK, seed=s)[0] == MASK).sum()) for s in range(600)])
    seen = counts.bincount(minlength=7)[1:]
    assert seen.sum() == 600 and ((seen - 100) ** 2 / 100).sum() < 30.9


def test_likelihood_refuses():
    with pytest.raises(ValueError, match="mc_num must be at least batch_size"):
        get_log_likelihood(Toy(), prompts(1)[0], prompts(1)[0], mc_num=8)
    with pytest.raises(ValueError, match="exclude each other"):
        get_log_likelihood(Toy(), prompts(1)[0], prompts(1)[0], mask_id=MASK, seed=1, generator=torch.Generator())
