"""The drop-in of Fast-dLLM against the published loops written out in PyTorch."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_peer import MASK, Toy, V, fast_dllm, transfer, transfer_dynamic

from genfast import generate_fast_dllm
from genfast.dropin import fast_dllm as dropin
from genfast.dropin import llada

LOOPS = {None: dropin.generate, "prefix": dropin.generate_with_prefix_cache, "dual": dropin.generate_with_dual_cache}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that on a busy machine threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(batch=3, length=5, seed=1):
    return torch.randint(0, V - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def both(cache, model, prompt, seed=0, peer=None, **options):
    """((tokens, calls) of ours, of the peer), each after the same ``torch.manual_seed``."""
    torch.manual_seed(seed)
    ours = LOOPS[cache](model, prompt, **options, mask_id=MASK)
    after = torch.rand(1)
    options.pop("compat", None)
    torch.manual_seed(seed)
    published = fast_dllm(model, prompt, cache=cache, **options, **(peer or {}))
    assert torch.equal(after, torch.rand(1)), "not as many draws as published"
    return ours, published


def test_signatures_are_the_published_ones():
    for loop in LOOPS.values():
        found = inspect.signature(loop).parameters.values()
        assert [(p.name, p.default) for p in found if p.kind is not p.KEYWORD_ONLY][2:] == [
            ("steps", 128), ("gen_length", 128), ("block_length", 128), ("temperature", 0.0),
            ("remasking", "low_confidence"), ("mask_id", 126336), ("threshold", None), ("factor", None),
            ("step_callback", None),
        ]  # fmt: skip
    for function, last in ((dropin.get_transfer_index, "threshold"), (dropin.get_transfer_index_dynamic, "factor")):
        names = list(inspect.signature(function).parameters)
        assert names[:7] == [
            "logits", "temperature", "remasking", "mask_index", "x", "num_transfer_tokens", last,
        ]  # fmt: skip
    assert dropin.get_num_transfer_tokens is llada.get_num_transfer_tokens


runs = dict(
    batch=st.integers(1, 3),
    cache=st.sampled_from([None, "prefix", "dual"]),
    rule=st.sampled_from([{}, dict(threshold=0.3), dict(threshold=0.8), dict(factor=0.9), dict(factor=1.7)]),
    blocks=st.sampled_from([(12, 24, 8), (24, 24, 8), (3, 24, 24), (12, 12, 2), (30, 12, 4)]),
    temperature=st.sampled_from([0.0, 0.7]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    likely_mask=st.booleans(),
    seed=st.integers(0, 99),
)


def model_and_options(rule, blocks, likely_mask, seed, **options):
    model = Toy(seed, sharpness=9.0)
    if likely_mask:
        model.head[:, MASK] *= 2
    return model, options | rule | dict(zip(("steps", "gen_length", "block_length"), blocks))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**runs)
def test_tokens_are_the_published_ones(batch, cache, seed, **run):
    model, options = model_and_options(seed=seed, **run)
    peer = dict(fixed=False, accept_last=False)
    (ours, calls), (published, expected) = both(cache, model, prompts(batch, 5, seed), seed, peer, **options)
    assert torch.equal(ours, published) and calls == expected and MASK not in ours


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**runs)
def test_compat_has_the_published_oddities(batch, cache, seed, **run):
    model, options = model_and_options(seed=seed, **run)
    (ours, calls), (published, expected) = both(cache, model, prompts(batch, 5, seed), seed, compat=True, **options)
    assert torch.equal(ours, published) and calls == expected


def test_the_oddities_show():
    prompt = prompts()
    models = [Toy(seed, mask_logit=-1e4, sharpness=9.0) for seed in range(6)]
    few = dict(steps=6, gen_length=24, block_length=8, mask_id=MASK, threshold=0.9)
    left = [MASK in dropin.generate_with_dual_cache(m, prompt, compat=True, **few)[0] for m in models]
    assert any(left) and not any(MASK in dropin.generate_with_dual_cache(m, prompt, **few)[0] for m in models)
    pairs = [
        [
            dropin.generate(
                m, prompt, steps=24, gen_length=24, block_length=4, mask_id=MASK, factor=0.9, compat=compat
            )[1]
            for compat in (False, True)
        ]
        for m in models
    ]
    assert any(a > b for a, b in pairs), "accepting a last failure saves no step here: nothing tested it"


@pytest.mark.parametrize("cache", LOOPS)
@pytest.mark.parametrize("rule", [dict(threshold=0.5), dict(factor=1.2)])
def test_masks_in_the_prompt_are_filled(cache, rule):
    prompt = prompts()
    prompt[1, 2:4] = MASK
    options = dict(steps=24, gen_length=24, block_length=8, **rule)
    peer = dict(fixed=False, accept_last=False)
    (ours, calls), (published, expected) = both(cache, Toy(5, sharpness=9.0), prompt, 1, peer, **options)
    assert torch.equal(ours, published) and calls == expected
    planned, _ = LOOPS[cache](Toy(5), prompt, steps=12, gen_length=24, block_length=8, mask_id=MASK)
    assert MASK not in planned[:, 5:]


@pytest.mark.parametrize("cache", LOOPS)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_in_kernel_draws(cache, remasking):
    """The sampler's tokens: one number per row; a row is the row alone though its neighbours take other steps."""
    model, prompt = Toy(3, mask_logit=-1e4, sharpness=9.0), prompts(4)
    options = dict(gen_length=24, block_length=8, temperature=0.9, remasking=remasking, mask_id=MASK, threshold=0.6)
    before = torch.get_rng_state()
    found, _ = LOOPS[cache](model, prompt, steps=24, seed=7, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found, generate_fast_dllm(model, prompt, cache=cache, seed=7, **options).tokens)
    seeds = torch.arange(4)
    rows, _ = LOOPS[cache](model, prompt, steps=24, seed=seeds, **options)
    for b in range(4):
        alone, _ = LOOPS[cache](model, prompt[b : b + 1], steps=24, seed=seeds[b : b + 1], **options)
        assert torch.equal(alone, rows[b : b + 1])


def test_step_callback_and_a_given_generator():
    model, seen = Toy(2, mask_logit=-1e4), []
    options = dict(steps=12, gen_length=24, block_length=8, temperature=0.8)
    before = torch.get_rng_state()
    ours, calls = dropin.generate(
        model, prompts(), mask_id=MASK, step_callback=seen.append, generator=torch.Generator().manual_seed(3), **options
    )
    assert torch.equal(before, torch.get_rng_state()) and seen == list(range(calls)) == list(range(12))
    assert torch.equal(ours, fast_dllm(model, prompts(), generator=torch.Generator().manual_seed(3), **options)[0])


# --- the choice ------------------------------------------------------------------------------------------------------


def step(seed, batch=4, length=12, scale=4.0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, V, generator=draw) * scale
    masked = torch.rand(batch, length, generator=draw) < 0.6
    masked[0] = False  # published code for a row that is done: nothing
    x = torch.randint(0, V, (batch, length), generator=draw)
    return logits, masked, torch.where(masked, MASK, x)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.0, 0.7]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    rule=st.sampled_from([None, 0.2, 0.9]),
    forbid=st.booleans(),
)
def test_get_transfer_index(seed, temperature, remasking, rule, forbid):
    logits, masked, x = step(seed)
    n = (masked.sum(1) + 1) // 2
    mask_id = MASK if forbid else None
    torch.manual_seed(seed)
    tokens, chosen = dropin.get_transfer_index(logits, temperature, remasking, masked, x, n, rule, mask_id=mask_id)
    torch.manual_seed(seed)
    published = transfer(logits, temperature, remasking, masked, x, n, rule, forbid=forbid)
    assert torch.equal(tokens, published[0]) and torch.equal(chosen, published[1])
    torch.manual_seed(seed)
    again = dropin.get_transfer_index(logits, temperature, remasking, masked, x, n[:, None], rule, mask_id=mask_id)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], chosen)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.0, 0.7]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    factor=st.sampled_from([0.4, 1, 1.8, 3.0]),
    compat=st.booleans(),
)
def test_get_transfer_index_dynamic(seed, temperature, remasking, factor, compat):
    logits, masked, x = step(seed, length=5)
    torch.manual_seed(seed)
    tokens, chosen = dropin.get_transfer_index_dynamic(
        logits, temperature, remasking, masked, x, None, factor, compat=compat
    )
    torch.manual_seed(seed)
    published = transfer_dynamic(logits, temperature, remasking, masked, x, factor, accept_last=compat)
    assert torch.equal(tokens, published[0]) and torch.equal(chosen, published[1])


def test_a_tie_after_rounding_goes_to_the_first():
    """Confidences 1 - 2e-11 and 1 - 2e-9 are one float32 number; the published float64 tells them apart."""
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1], logits[0, 1, 1] = 20.7, 25.3
    masked, x = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64)
    n = torch.ones(1, dtype=torch.int64)
    assert dropin.get_transfer_index(logits, 0.0, "low_confidence", masked, x, n)[1].tolist() == [[True, False]]
    assert transfer(logits, 0.0, "low_confidence", masked, x, n)[1].tolist() == [[False, True]]


def test_seeded_choice_depends_on_the_row_and_the_step():
    logits, masked, x = step(3, batch=2)
    logits, masked, x = (t[1:].expand(2, *t.shape[1:]).contiguous() for t in (logits, masked, x))
    n = torch.tensor([3, 3])
    options = dict(temperature=2.0, remasking="low_confidence", mask_index=masked, x=x, num_transfer_tokens=n)
    first = dropin.get_transfer_index(logits, seed=1, **options)[0]
    assert torch.equal(first, dropin.get_transfer_index(logits, seed=1, **options)[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, dropin.get_transfer_index(logits, seed=1, stream=1, **options)[0])
    rows = dropin.get_transfer_index(logits, seed=torch.tensor([1, 1]), **options)[0]
    assert torch.equal(rows[0], first[0]) and torch.equal(rows[1], first[0])


def test_refusals():
    logits, masked, x = step(1)
    with pytest.raises(ValueError, match="num_transfer_tokens must be a tensor"):
        dropin.get_transfer_index(logits, 0.0, "low_confidence", masked, x, None)
    with pytest.raises(NotImplementedError, match="remasking must be one of"):
        dropin.get_transfer_index_dynamic(logits, 0.0, "entropy", masked, x, None)
    with pytest.raises(ValueError, match="exclude each other"):
        dropin.get_transfer_index(logits, 0.0, "random", masked, x, masked.sum(1), seed=1, generator=torch.Generator())
    for loop in LOOPS.values():
        with pytest.raises(AssertionError, match="block_length"):
            loop(Toy(), prompts(), gen_length=20, block_length=8, mask_id=MASK)
        with pytest.raises(AssertionError, match="steps"):
            loop(Toy(), prompts(), steps=8, gen_length=24, block_length=8, mask_id=MASK)
        with pytest.raises(NotImplementedError, match="remasking must be one of"):
            loop(Toy(), prompts(), remasking="margin", mask_id=MASK)
