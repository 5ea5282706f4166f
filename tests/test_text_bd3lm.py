"""Block diffusion: cached and uncached alike, its law against the exact one, ragged prompts, ends of text."""

import math
from types import SimpleNamespace

import pytest
import torch
from text_peers import Joint, chain, chi_square, mdlm_weights

import genfast
from genfast.samplers.text.bd3lm import entropy

JOINT = Joint(length=4, size=2, seed=2)


class Cache:
    """Keys that calls append to, as Hugging Face's dynamic cache."""

    def __init__(self):
        self.keys = None

    def crop(self, length):
        assert length <= self.keys.shape[1]
        self.keys = self.keys[:, :length]


class Blockwise(torch.nn.Module):
    """One layer of attention, float64 inside; answers as Hugging Face's models do."""

    def __init__(self, size=12, width=8, kind="object", seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.ids, self.head, self.places = (
            torch.randn(*shape, generator=g, dtype=torch.float64)
            for shape in ((size, width), (width, size), (64, width))
        )
        self.kind, self.seen = kind, []

    def forward(self, ids, attention_mask, position_ids, past_key_values=None, use_cache=False):
        past = past_key_values
        before = 0
        if past is not None:
            before = past.keys.shape[1] if isinstance(past, Cache) else past[0][0].shape[2]
        self.seen.append((before, ids.shape[1]))
        assert attention_mask.shape[2:] == (ids.shape[1], before + ids.shape[1])
        h = self.ids[ids] + self.places[position_ids]
        if past is None:
            keys = h
        else:
            keys = torch.cat([past.keys if isinstance(past, Cache) else past[0][0][:, 0], h], 1)
        scores = (h @ keys.transpose(1, 2) / 3).masked_fill(~attention_mask[:, 0], -torch.inf)
        logits = (torch.tanh(h + scores.softmax(-1) @ keys) @ self.head).float()
        if self.kind == "tuple":
            return logits, ((keys[:, None], keys[:, None]),)
        if self.kind == "object" and use_cache:
            past = past or Cache()
            past.keys = keys
        return SimpleNamespace(logits=logits, past_key_values=past)


STYLES = [dict(first_hitting=True), dict(first_hitting=False, steps=9)]
styles = pytest.mark.parametrize("style", STYLES, ids=["first_hitting", "ancestral"])


@styles
@pytest.mark.parametrize("kind", ["object", "tuple"])
@pytest.mark.parametrize("prompt", [1, 4, 6])
def test_cached_is_uncached(style, kind, prompt):
    prompt = torch.randint(0, 11, (3, prompt), generator=torch.Generator().manual_seed(prompt))
    model = Blockwise(kind=kind)
    common = dict(length=11, block_size=4, mask_id=11, seed=4, nucleus_p=0.9, **style)
    cached = genfast.generate_bd3lm(model, prompt, **common)
    # What is finished is seen once: with the first pass over the next block.
    assert all(before % 4 == 0 and count in (4, 8) for before, count in model.seen[1:])
    assert sum(count > 4 for _, count in model.seen[1:]) <= 11 // 4 + 1
    plain = Blockwise(kind=kind)
    assert torch.equal(genfast.generate_bd3lm(plain, prompt, cache=False, **common).tokens, cached.tokens)
    assert len(plain.seen) == len(model.seen) == cached.evaluations
    assert not (cached.tokens == 11).any() and torch.equal(cached.tokens[:, : prompt.shape[1]], prompt)
    if "steps" not in style:
        last = prompt.shape[1] + 11
        columns = -(-last // 4) * 4 - prompt.shape[1]
        assert cached.steps == columns and len(plain.seen) == columns


def test_the_context_is_bounded():
    model = Blockwise()
    got = genfast.generate_bd3lm(model, 2, length=16, block_size=4, mask_id=11, cache=False, context=8, seed=0)
    assert [count for _, count in model.seen] == [4] * 4 + [8] * 12 and not (got.tokens == 11).any()


def joint_model(ids, **_):
    return JOINT.logits(ids)


def test_first_hitting_draws_from_the_joint_distribution():
    """15000 samples of two blocks: exact conditionals make the law exact."""
    got = genfast.generate_bd3lm(joint_model, 15000, length=4, block_size=2, mask_id=2, cache=False, seed=3)
    chi_square(torch.bincount(JOINT.index(got.tokens, 2), minlength=16), JOINT.p)


def test_law_of_ancestral_sampling():
    """15000 samples of one block in three steps: the law of the chain, whose last step leaves no mask."""

    def step(t):
        return lambda x: mdlm_weights(x, JOINT.logits(x), t, t - 1 / 3, 2)

    states = JOINT.states
    law = chain(JOINT, (states, (states == 2).all(1).double()), [step(1), step(2 / 3), step(1 / 3)])
    got = genfast.generate_bd3lm(
        joint_model, 15000, length=4, block_size=4, mask_id=2, cache=False, seed=3, first_hitting=False, steps=3
    )
    law = law.clamp_min(0) * (states != 2).all(1)  # 1/3 - 1/3 is rounded
    chi_square(torch.bincount(JOINT.index(got.tokens), minlength=len(states)), law)


@styles
def test_nucleus_leaves_out_the_token_that_crosses(style):
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def tokens(p):
        def model(ids, **_):
            return torch.nn.functional.pad(law.log(), (0, 1), value=9.0).expand(*ids.shape, 5)

        common = dict(length=12, block_size=4, mask_id=4, cache=False, seed=0, **style)
        return set(genfast.generate_bd3lm(model, 40, nucleus_p=p, **common).tokens.flatten().tolist())

    assert tokens(0.4) == tokens(0.7) == {0}
    assert tokens(0.81) == {0, 1} and tokens(1.0) == {0, 1, 2, 3}


@styles
@pytest.mark.parametrize("cache", [True, False])
def test_rows_depend_on_nothing_but_their_seed(style, cache):
    prompts = [torch.arange(n) % 10 for n in (6, 1, 9, 4)]
    common = dict(length=9, block_size=4, mask_id=11, pad_id=10, cache=cache, **style)
    whole = genfast.generate_bd3lm(Blockwise(), prompts, seed=3, **common)
    assert whole.tokens.shape == (4, 18) and whole.start == 9 and whole.pad.tolist() == [3, 8, 0, 5]
    for b, prompt in enumerate(prompts):
        alone = genfast.generate_bd3lm(Blockwise(), [prompt], seed=3, offset=b, **common)
        pad = int(whole.pad[b])
        assert torch.equal(alone.tokens[0], whole.tokens[b, pad:])
        assert torch.equal(whole.tokens[b, pad:9], prompt) and (whole.tokens[b, :pad] == 10).all()
        assert (whole.order[b, :9] == 0).all() and (whole.order[b, 9:] > 0).all()
    own = genfast.generate_bd3lm(Blockwise(), prompts, seed=torch.tensor([3, 4, 3, 5]), **common)
    assert torch.equal(own.tokens[0], whole.tokens[0])


def test_a_generator_decides():
    def run(seed):
        g = torch.Generator().manual_seed(seed)
        return genfast.generate_bd3lm(Blockwise(), 2, length=8, block_size=4, mask_id=11, generator=g).tokens

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_rows_end_at_the_end_of_sequence():
    model, calls = Blockwise(), []

    def ends(ids, **options):
        calls.append(1)
        answer = model(ids, **options)
        answer.logits[..., 0] += 2.0
        return answer

    prompts = [torch.tensor([0, 5]), torch.tensor([3])]
    common = dict(length=30, block_size=4, mask_id=11, seed=1)
    free = genfast.generate_bd3lm(ends, prompts, **common)
    length = len(calls)
    calls.clear()
    got = genfast.generate_bd3lm(ends, prompts, eos_id=0, **common)
    assert len(calls) < length  # all rows have ended before
    for b in range(2):
        text = free.tokens[b, free.start :]
        first = int((text == 0).nonzero()[0])
        assert 0 <= first < 20
        assert torch.equal(got.tokens[b, got.start :][: first + 1], text[: first + 1])
        assert (got.tokens[b, got.start + first :] == 0).all()
    # The 0 in a prompt ends nothing.
    assert got.tokens[0, :2].tolist() == [0, 5]


def test_degenerate_rows_are_cut():
    """One row repeats a token, the other does not; both finish as they would alone."""

    def model(ids, **_):
        varied = (ids[:, :1] == 1)[..., None]
        logits = torch.zeros(*ids.shape, 12)
        logits[..., 11] = logits[..., 0] = -30.0
        return torch.where(varied, logits, logits + torch.nn.functional.one_hot(torch.tensor(7), 12) * 30)

    common = dict(
        length=31, block_size=4, mask_id=11, cache=False, seed=1, eos_id=0, min_entropy=1.2, entropy_window=12
    )
    got = genfast.generate_bd3lm(model, torch.tensor([[1], [2]]), **common)
    assert (got.tokens[0] != 0).all()
    # After 16 columns the last 12 are found to be alike and go.
    assert got.tokens[1].tolist() == [2, 7, 7, 7] + [0] * 28
    alone = genfast.generate_bd3lm(model, torch.tensor([[2]]), **common)
    assert torch.equal(alone.tokens[0], got.tokens[1]) and alone.evaluations < got.evaluations


def test_entropy():
    tokens = torch.tensor([[1, 1, 2, 3], [5, 5, 5, 5]])
    assert entropy(tokens).tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(4), 0.0])


def test_empty():
    got = genfast.generate_bd3lm(Blockwise(), torch.tensor([[1, 2]]), length=0, block_size=2, mask_id=11)
    assert got.tokens.tolist() == [[1, 2]] and got.evaluations <= 1
    assert genfast.generate_bd3lm(Blockwise(), 0, length=4, block_size=2, mask_id=11).tokens.shape == (0, 4)


REFUSALS = [
    (dict(block_size=0), "block_size must be"),
    (dict(steps=3), "steps goes with"),
    (dict(first_hitting=False), "steps goes with"),
    (dict(min_entropy=1.0), "min_entropy needs"),
    (dict(context=8), "context needs"),
    (dict(context=2, cache=False), "context needs"),
    (dict(first_hitting=False, steps=0), "steps must be"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        genfast.generate_bd3lm(Blockwise(), 2, **{**dict(length=8, block_size=4, mask_id=11), **changes})


def test_a_model_without_a_cache():
    model = Blockwise(kind="none")
    with pytest.raises(ValueError, match="no past_key_values"):
        genfast.generate_bd3lm(model, 1, length=8, block_size=4, mask_id=11)
