"""The small transformer: its two ways to attend against plain PyTorch, and decoding with caches against without."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from genfast import AttentionMask, generate_block_diffusion, generate_fast_dllm
from genfast.demo.text.transformer import Answer, Cache, Transformer, rotated, turns, whole

LETTERS, MASK, LENGTH, BLOCK = 12, 12, 40, 8


@pytest.fixture(scope="module")
def model():
    """With random weights everywhere, so that every letter matters to every other."""
    torch.manual_seed(3)
    net = Transformer(LETTERS, width=32, layers=2, heads=2, longest=64).eval()
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    return net


def ids_of(*shape, seed=0, masked=False):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(LETTERS, shape, generator=draw)
    return ids.masked_fill(torch.rand(shape, generator=draw) < 0.5, MASK) if masked else ids


def plain(rope, position_ids, dense, layer, q, k, v):
    by = turns(rope, position_ids)
    return scaled_dot_product_attention(rotated(q, by), rotated(k, by), v, attn_mask=dense)


def block_causal(length):
    number = torch.arange(length) // BLOCK
    return (number[:, None] >= number)[None, None]


def test_training_is_that_of_plain_attention(model):
    """Logits, loss and every gradient of a pass over x_t and x_0; no parameter is left without one."""
    x, x0 = ids_of(3, LENGTH, masked=True), ids_of(3, LENGTH)
    mask, places = AttentionMask.block_diffusion(LENGTH, BLOCK), torch.arange(LENGTH).repeat(2)
    found = []
    for attend in (whole(model.rope, places, mask), partial(plain, model.rope, places, mask.to_dense()[:, None])):
        logits = model.logits(torch.cat([x, x0], 1), attend)[:, :LENGTH]
        loss = cross_entropy(logits[x == MASK], x0[x == MASK])
        found.append((logits[..., :MASK], loss, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for (name, p), ours, theirs in zip(model.named_parameters(), found[0][2], found[1][2]):
        assert ours.shape == p.shape and ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    net = Transformer(LETTERS, width=32, layers=1, heads=2, longest=LENGTH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    attend = whole(net.rope, torch.arange(LENGTH).repeat(2), AttentionMask.block_diffusion(LENGTH, BLOCK))
    losses = []
    for step in range(40):
        x0 = (ids_of(16, 1, seed=step) + torch.arange(LENGTH)) % LETTERS  # the alphabet, from any letter on
        hidden = torch.rand(x0.shape, generator=torch.Generator().manual_seed(step)) < 0.5
        logits = net.logits(torch.cat([x0.masked_fill(hidden, MASK), x0], 1), attend)[:, :LENGTH]
        loss = cross_entropy(logits[hidden], x0[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.2 and losses[-1] < 0.5


@torch.no_grad()
def test_blocks_are_trained_as_they_are_sampled(model):
    """The noised half of a training pass says what a pass over the clean past and one noised block says."""
    x, x0 = ids_of(2, LENGTH, masked=True), ids_of(2, LENGTH)
    attend = whole(model.rope, torch.arange(LENGTH).repeat(2), AttentionMask.block_diffusion(LENGTH, BLOCK))
    trained = model.logits(torch.cat([x, x0], 1), attend)[:, :LENGTH]
    for first in range(0, LENGTH, BLOCK):
        last = first + BLOCK
        ids = torch.cat([x0[:, :first], x[:, first:last]], 1)
        sampled = model(ids, attention_mask=block_causal(last)).logits[:, first:]
        torch.testing.assert_close(trained[:, first:last], sampled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cached_is_uncached(model, dtype):
    """Three blocks at once, then one at a time, with a noised pass over each before it is decided."""
    model.bfloat16 = dtype == torch.bfloat16
    try:
        ids, mask, cache, stored = ids_of(3, LENGTH), block_causal(LENGTH), None, 0
        for first in range(2 * BLOCK, LENGTH, BLOCK):
            last = first + BLOCK
            for block in (torch.full((3, BLOCK), MASK), ids[:, first:last]):
                text = torch.cat([ids[:, :first], block], 1)
                seen = mask[..., stored:last, :last]
                answer = model(text[:, stored:], attention_mask=seen, past_key_values=cache, use_cache=True)
                expected = model(text, attention_mask=mask[..., :last, :last]).logits[:, stored:]
                cache, stored = answer.past_key_values, first
                assert cache.length == stored and [c.lengths.tolist() for c in cache.layers] == [[first] * 3] * 2
                tolerance = 1e-4 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(answer.logits, expected, rtol=tolerance, atol=tolerance)
                cache.crop(first)
        cache.crop(BLOCK)
        assert cache.length == BLOCK and [c.lengths.tolist() for c in cache.layers] == [[BLOCK] * 3] * 2
    finally:
        model.bfloat16 = False


@pytest.mark.parametrize("remasking, temperature", [("low_confidence_static", 0.0), ("random", 1.0)])
def test_block_diffusion_writes_the_same_with_its_cache(model, remasking, temperature):
    for prompt in (3, ids_of(3, 19), [ids_of(n, seed=n) for n in (1, 5, 7)]):
        common = dict(gen_length=21, block_length=BLOCK, steps=4, mask_id=MASK, seed=1)
        options = dict(common, remasking=remasking, temperature=temperature)
        cached, recomputed = (generate_block_diffusion(model, prompt, cache=c, **options) for c in (True, False))
        assert torch.equal(cached.tokens, recomputed.tokens) and torch.equal(cached.order, recomputed.order)


class Published:
    """Fast-dLLM's protocol in plain PyTorch: keys and values come and go as tuples of tensors."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids, past_key_values=None, use_cache=False, replace_position=None):
        before = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if replace_position is not None:
            before = int(replace_position[0].nonzero()[0])
        by, layers = turns(self.model.rope, torch.arange(before, before + ids.shape[1])), []

        def attend(layer, q, k, v):
            q, k = rotated(q, by), rotated(k, by)
            if replace_position is not None:
                old_k, old_v = (t.clone() for t in past_key_values[layer])
                old_k[:, :, replace_position[0]], old_v[:, :, replace_position[0]] = k, v
                k, v = old_k, old_v
            elif past_key_values is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past_key_values[layer], (k, v)))
            layers.append((k, v))
            return scaled_dot_product_attention(q, k, v)

        return Answer(self.model.logits(ids, attend), tuple(layers) if use_cache else None)


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize(
    "prompt, options",
    # Where all is masked, positions are equal but for rounding: only the order from the left is said then.
    [(5, dict(threshold=0.3)), (0, dict(remasking="sequential", steps=12))],
)
def test_fast_dllm_writes_what_it_writes_with_the_published_caches(model, cache, prompt, options):
    common = dict(gen_length=24, block_length=BLOCK, mask_id=MASK, cache=cache, temperature=1.0, seed=2)
    ours, theirs = (generate_fast_dllm(m, ids_of(3, prompt), **common, **options) for m in (model, Published(model)))
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.order, theirs.order)
    assert ours.evaluations == theirs.evaluations and ours.steps > 3


@torch.no_grad()
def test_masks_that_no_cache_serves_are_refused(model):
    ids, cache = ids_of(2, 2 * BLOCK), Cache(64, model.rope)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    # The end of the last block is not that of the pass; a block that does not see what is before it; one row each.
    short, apart = causal.clone(), block_causal(16).clone()
    short[-1, -1], apart[..., 8:, :8] = False, False
    for mask, said in (
        (short[None, None], "not block causal"),
        (apart, "not block causal"),
        (block_causal(16).expand(2, -1, -1, -1), "in the same block"),
        (block_causal(24), r"expected \[1, 1, 16, 16\]"),
        (torch.ones(2, 16, dtype=torch.int64), "in the same block"),
    ):
        with pytest.raises(ValueError, match=said):
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert cache.length == 0 and not cache.layers
    one_by_one = model(ids, attention_mask=causal[None, None], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(one_by_one, model(ids, attention_mask=causal[None, None]).logits, rtol=1e-4, atol=1e-4)
    assert cache.length == 15
