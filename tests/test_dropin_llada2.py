"""LLaDA2's drop-in against the published loops, written out here in eager PyTorch."""

import types

import pytest
import torch
from test_dropin_sdar import FILTERS, draw
from tiny_lm import TinyLM

from genfast.dropin import llada2

MASK, EOS = 39, 38


class Model(TinyLM):
    """Does not draw the mask; says EOS where it is told to, by place, and nowhere else."""

    def __init__(self, *ends, **options):
        super().__init__(**options)
        self.ends, self.read = ends, 0

    def forward(self, ids, position_ids=None, **options):
        assert options["attention_mask"].dtype == torch.bfloat16
        self.read += ids.numel()
        found = super().forward(ids, position_ids=position_ids, **options)
        found.logits[..., MASK] = -torch.inf
        found.logits[..., EOS] = torch.where(torch.isin(position_ids, torch.tensor(self.ends)), 50.0, -torch.inf)
        return found


def prompts(*lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOS, (1, n), generator=draw) for n in lengths]


def published(
    model, ids, temperature=0.0, block=4, steps=4, length=11, early=False, threshold=0.5, edit=None, post=16,
    at_one=False, minimal=1, **filters,
):  # fmt: skip
    """``at_one``: temperature 0 draws at 1, as in 2.0. (text, or what an early stop of 2.0 returns; whether it did)"""
    steps = min(steps, length // minimal)
    size = ids.shape[1]
    blocks = (size + length + block - 1) // block
    mask = torch.tril(torch.ones(blocks, blocks)).repeat_interleave(block, 0).repeat_interleave(block, 1)
    mask = mask[None, None].log().to(torch.bfloat16)
    places = torch.arange(blocks * block)[None]
    x = torch.full((1, blocks * block), MASK)
    x[:, :size] = ids
    share = [block // steps + (i < block % steps) for i in range(steps)]
    for k in range(size // block, blocks):
        end = (k + 1) * block
        now = x[:, :end]
        own = torch.arange(end - block, end) >= size
        step = posts = 0
        while True:
            old = now[:, -block:].clone()
            masked = old == MASK
            posts += not masked.any()
            if posts > (0 if edit is None else post):
                break
            logits = model(now, attention_mask=mask[:, :, :end, :end], position_ids=places[:, :end]).logits[:, -block:]
            x0, p, _ = draw(logits, 1.0 if at_one and temperature == 0 else temperature, **filters)
            n = share[step] if edit is None else 1
            confidence = torch.where(masked, p, -torch.inf)[0]
            chosen = confidence > threshold
            if chosen.sum() < n:
                chosen = torch.zeros(block, dtype=torch.bool)
                chosen[torch.topk(confidence, min(n, int(masked.sum())))[1]] = True
            edited = torch.zeros(block, dtype=torch.bool)
            if edit is not None:
                edited = (~masked & own & (p > edit) & (x0 != old))[0]
            now[:, -block:][:, chosen | edited] = x0[:, chosen | edited]
            step += 1
            if edit is None and early and (x0[:, chosen] == EOS).any():
                at = int((now[0] == EOS).nonzero()[0, 0])
                if (now[0, size:at] != MASK).all():
                    return x[:, : at + 1], True
            if not masked.any() and not edited.any():
                break
        if (early or edit is None) and (x[0, size:end] == EOS).any():
            break
    text = x[:, size : size + length]
    ends = (text[0] == EOS).nonzero()
    return text[:, : int(ends[0, 0]) + 1] if len(ends) else text, False


def both(ids, ends=(), compat=False, cache=False, **options):
    torch.manual_seed(4)
    expected, early = published(Model(*ends), ids, at_one=compat, **options)
    after = torch.get_rng_state()
    renamed = {
        "block": "block_length", "length": "gen_length", "early": "eos_early_stop", "edit": "editing_threshold",
        "post": "max_post_steps", "minimal": "minimal_topk",
    }  # fmt: skip
    options = {
        renamed.get(k, k): v for k, v in {"block": 4, "steps": 4, "length": 11, "threshold": 0.5, **options}.items()
    }
    torch.manual_seed(4)
    found = llada2.generate(Model(*ends), ids, eos_id=EOS, mask_id=MASK, compat=compat, cache=cache, **options)
    # Ours may stop earlier: 2.0 looks after steps that write an end of sequence, and 2.1 after blocks.
    assert torch.equal(torch.get_rng_state(), after) or (options.get("eos_early_stop") and not compat)
    return expected, early, found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("cache", [False, True])
def test_tokens_are_the_published_ones(temperature, filters, cache):
    filters = filters if temperature else {}
    for ids in prompts(6, 8, 3):
        for block, steps in ((4, 4), (5, 2)):
            expected, _, found = both(ids, block=block, steps=steps, temperature=temperature, cache=cache, **filters)
            assert torch.equal(found, expected) and found.shape == (1, 11)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_stops(early, temperature):
    stops = 0
    for ids in prompts(6, 8, 3):
        for end in (9, 10, 11, 12, 40):
            options = dict(early=early, temperature=temperature, length=20)
            expected, stopped, found = both(ids, (end, end + 1), **options)
            size = ids.shape[1]
            # An early stop of 2.0 returns the prompt as well, which ours does with compat only.
            assert torch.equal(found, expected[:, size if stopped else 0 :])
            assert found.shape[1] == min(end + 1 - size, 20)
            stops += stopped
    assert (stops > 0) == early


def test_an_early_stop_calls_the_model_less_often():
    models = [Model(12), Model(12)]
    for model, early in zip(models, (False, True)):
        llada2.generate(
            model, prompts(8)[0], 0.0, 8, 8, 20, eos_early_stop=early, threshold=2.0, eos_id=EOS, mask_id=MASK
        )
    assert models[1].calls <= models[0].calls
    ends = Model(8)
    llada2.generate(ends, prompts(8)[0], 0.0, 8, 8, 20, eos_early_stop=True, threshold=2.0, eos_id=EOS, mask_id=MASK)
    assert ends.calls < models[0].calls


def test_compat_is_llada2_0():
    for ids in prompts(6, 8, 3):
        expected, _, found = both(ids, compat=True)
        greedy = both(ids)[2]
        assert torch.equal(found, expected) and not torch.equal(found, greedy)
        expected, stopped, found = both(ids, (12,), compat=True, early=True, temperature=0.8)
        assert stopped and torch.equal(found, expected) and torch.equal(found[:, : ids.shape[1]], ids)
        ids[0, 1] = EOS  # an end of sequence in the prompt is taken for the text's
        expected, stopped, found = both(ids, (12,), compat=True, early=True)
        assert stopped and torch.equal(found, expected) and found.shape[1] == 2
        expected, stopped, found = both(ids, (12,))
        assert torch.equal(found, expected)
        ids[0, :2] = torch.tensor([MASK, 5])
        expected, stopped, found = both(ids, (12,), compat=True, early=True, temperature=0.8)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("early", [False, True])
def test_editing(temperature, early):
    for ids in prompts(6, 8, 3):
        for edit in (0.1, 0.5):
            options = dict(temperature=temperature, edit=edit, post=3, early=early, threshold=0.4)
            expected, _, found = both(ids, (12,), **options)
            assert torch.equal(found, expected)


def test_seed_cache_and_method():
    ids = prompts(6)[0]
    options = dict(block_length=4, steps=4, gen_length=20, eos_id=EOS, mask_id=MASK, temperature=1.0)
    state = torch.get_rng_state()
    a, b, c = (llada2.generate(Model(), ids, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)
    model, plain = Model(), Model()
    assert torch.equal(llada2.generate(model, ids, seed=1, cache=True, **options), a)
    plain.generate = types.MethodType(llada2.generate, plain)
    assert torch.equal(plain.generate(ids, seed=1, **options), a)
    assert model.read < 0.6 * plain.read
    expected, _, found = both(ids, minimal=4)
    assert torch.equal(found, expected)


def test_refusals():
    ids = prompts(6)[0]
    for options, word in ((dict(seed=1), "compat"), (dict(editing_threshold=0.5), "compat")):
        with pytest.raises(ValueError, match=word):
            llada2.generate(Model(), ids, compat=True, **options)
    with pytest.raises(ValueError, match="inputs must be"):
        llada2.generate(Model(), ids.expand(2, -1))

    class OnlyMask(TinyLM):
        def forward(self, ids, **options):
            found = super().forward(ids, **options)
            found.logits[..., MASK] = 100.0
            return found

    with pytest.raises(RuntimeError, match="mask token itself"):
        llada2.generate(OnlyMask(), ids, 0.0, 4, 4, 8, eos_id=EOS, mask_id=MASK)
