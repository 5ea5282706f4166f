"""``generate_block_diffusion``: against the published loops written out, and what it promises beyond them."""

import pytest
import torch
from tiny_lm import Cache, TinyLM

import genfast
from genfast.samplers.text.cache import block_causal, cropped
from genfast.samplers.text.layout import Layout

MASK, EOS, VOCAB = 39, 38, 40
STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


def prompts(*lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOS, (n,), generator=draw) for n in lengths]


def run(model, prompt, **options):
    return genfast.generate_block_diffusion(
        model, prompt, **{"mask_id": MASK, "gen_length": 13, "block_length": 4, "threshold": 0.4, **options}
    )


def block_mask(length, block):
    place = torch.arange(length) // block
    return (place[:, None] >= place)[None, None]


def chosen_positions(name, p, entropy, masked, n, threshold, bound):
    """One step's choice for one row, as SDAR's and JetEngine's loops make it."""
    places = masked.nonzero()[:, 0]
    if name == "sequential":
        return places[:n]
    if name == "entropy_bounded":
        values, order = entropy[places].sort(stable=True)
        k = int(torch.searchsorted(values.cumsum(0), torch.tensor(bound)))
        return places[order[: max(k, 1)]]
    if name == "low_confidence_dynamic":
        high = places[p[places] > threshold]
        if len(high) >= n:
            return high
    return places[p[places].sort(descending=True, stable=True).indices[:n]]


def published(model, prompt, length, block, steps, name, threshold=0.4, bound=0.35, edit=None, most=16, eos=None):
    """The loops of SDAR's generate.py and of LLaDA2's models, for temperature 0; every pass over the whole text."""
    blocks = -(-(len(prompt) + length) // block)
    x = torch.full((1, blocks * block), MASK)
    x[0, : len(prompt)] = prompt
    share = [block // steps + (i < block % steps) for i in range(steps)]
    for k in range(len(prompt) // block, blocks):
        first, last = k * block, (k + 1) * block
        own = torch.arange(first, last) >= len(prompt)
        step = post = 0
        while True:
            masked = x[0, first:last] == MASK
            post += not masked.any()
            if post > (0 if edit is None else most):
                break
            logits = model(x[:, :last], attention_mask=block_mask(last, block)).logits[0, first:].clone()
            logits[:, MASK] = -torch.inf
            p, token = logits.softmax(-1).max(-1)
            entropy = -torch.special.xlogy(logits.softmax(-1), logits.softmax(-1)).sum(-1)
            n = share[min(step, steps - 1)]
            changed = torch.zeros(block, dtype=torch.bool)
            if edit is not None:
                changed = ~masked & own & (p > edit) & (token != x[0, first:last])
            done = not masked.any() and not changed.any()
            changed[chosen_positions(name, p, entropy, masked, n, threshold, bound)] = True
            x[0, first:last] = torch.where(changed, token, x[0, first:last])
            step += 1
            if done:
                break
        if eos is not None and (x[0, len(prompt) : last] == eos).any():
            break
    return x[:, : len(prompt) + length]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("cache", ["object", "tuple", None])
@pytest.mark.parametrize(("block", "steps"), [(4, 4), (4, 2), (5, 3), (1, 1)])
def test_greedy_tokens_are_the_published_ones(name, cache, block, steps):
    model = TinyLM(cache=cache)
    for prompt in prompts(6, 8, 3):
        expected = published(model, prompt, 13, block, steps, name)
        found = run(model, prompt[None], block_length=block, steps=steps, remasking=name, cache=cache is not None)
        assert torch.equal(found.tokens, expected)
        assert found.start == len(prompt) and found.steps == found.evaluations
        assert (found.order[:, : found.start] == 0).all() and (found.order[:, found.start :] > 0).all()


def test_no_prompt_at_all():
    model = TinyLM()
    empty = torch.empty(0, dtype=torch.int64)
    assert torch.equal(run(model, 2).tokens[:1], published(model, empty, 13, 4, 4, "low_confidence_dynamic"))
    assert run(model, []).tokens.shape == (0, 13) and run(model, 0).steps == 0
    assert run(model, prompts(5)[0][None], gen_length=0).tokens.tolist() == [prompts(5)[0].tolist()]


@pytest.mark.parametrize("edit", [0.2, 0.5])
def test_editing_is_llada2s(edit):
    model = TinyLM(sharp=2.0)
    replaced = 0
    for prompt in prompts(6, 8, 3, 5):
        for name in ("low_confidence_static", "low_confidence_dynamic"):
            options = dict(threshold=0.3, edit=edit, most=3)
            plain = published(model, prompt, 13, 4, 2, name, threshold=0.3)
            model.calls = 0
            expected = published(model, prompt, 13, 4, 2, name, **options)
            calls = model.calls
            found = run(
                model, prompt[None], steps=2, remasking=name, threshold=0.3, editing_threshold=edit, max_post_steps=3
            )
            assert torch.equal(found.tokens, expected) and found.evaluations == calls
            assert torch.equal(found.tokens[0, : len(prompt)], prompt)
            replaced += int((expected != plain).sum())
    assert replaced > 0


@pytest.mark.parametrize("name", [*STRATEGIES, "random", "entropy_bounded_exclusive"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cache", [True, False])
def test_a_padded_row_is_the_row_alone(name, temperature, cache):
    model = TinyLM()
    rows = prompts(3, 9, 4, 9, 1)
    options = dict(remasking=name, temperature=temperature, seed=5, cache=cache, top_p=0.9, eos_id=EOS)
    if name.startswith("low"):
        options["editing_threshold"] = 0.6
    together = run(model, rows, **options)
    assert together.pad.tolist() == [6, 0, 5, 0, 8] and together.start == 9
    for b, row in enumerate(rows):
        alone = run(model, row[None], offset=b, **options)
        assert torch.equal(together.tokens[b, 9:], alone.tokens[0, len(row) :])
        assert torch.equal(together.tokens[b, together.pad[b] : 9], row)
    assert not (together.tokens[:, 9:] == MASK).any()


@pytest.mark.parametrize("kind", ["object", "tuple"])
def test_cached_is_uncached_and_reads_less(kind):
    class Counts(TinyLM):
        read = 0

        def forward(self, ids, **options):
            self.read += ids.numel()
            return super().forward(ids, **options)

    rows = prompts(11, 2, 7)
    options = dict(temperature=0.7, seed=3, gen_length=30)
    for name in STRATEGIES:
        models = [Counts(cache=kind), Counts(cache=kind)]
        with_cache, without = (run(m, rows, remasking=name, cache=c, **options) for m, c in zip(models, (True, False)))
        assert torch.equal(with_cache.tokens, without.tokens)
        assert with_cache.evaluations == without.evaluations
        assert models[0].read < 0.4 * models[1].read
    a, b = (
        run(TinyLM(cache=kind), rows, cache=c, temperature=0.7, generator=torch.Generator().manual_seed(2)).tokens
        for c in (True, False)
    )
    assert torch.equal(a, b)


def test_a_batch_drawn_in_parts_is_the_batch_drawn_whole():
    model, rows = TinyLM(), prompts(4, 7, 4, 2, 4)
    for name in ("low_confidence_dynamic", "random"):
        options = dict(remasking=name, temperature=1.0)
        whole = run(model, rows, seed=3, **options).tokens[:, -13:]
        parts = [run(model, rows[a:b], seed=3, offset=a, **options).tokens[:, -13:] for a, b in ((0, 2), (2, 5))]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, run(model, rows, seed=4, **options).tokens[:, -13:])
        seeds = torch.tensor([9, 2, 5, 2, 7])
        same = [rows[0]] * 5
        own = run(model, same, seed=seeds, **options).tokens
        assert torch.equal(own[1], own[3]) and not torch.equal(own[1], own[2])


def test_early_stop():
    class Ends(TinyLM):
        """Says EOS, and nothing else does, at one place of every row."""

        def forward(self, ids, position_ids=None, **options):
            found = super().forward(ids, position_ids=position_ids, **options)
            found.logits[..., EOS] = -torch.inf
            found.logits[position_ids == torch.tensor(self.ends)[:, None]] += 0
            found.logits[..., EOS][position_ids == torch.tensor(self.ends)[:, None]] = 100.0
            return found

    rows, model = prompts(4, 6, 5), Ends()
    model.ends = [5, 13, 99]
    found, plain = (run(model, rows, gen_length=30, eos_id=e) for e in (EOS, None))
    for b, end in enumerate((5, 13)):
        place = 6 - len(rows[b]) + end  # the column of EOS
        assert torch.equal(found.tokens[b, :place], plain.tokens[b, :place])
        assert (found.tokens[b, place:] == EOS).all() and (found.order[b, 6:] > 0).all()
    assert torch.equal(found.tokens[2], plain.tokens[2])
    model.ends = [5, 13]
    found = run(model, rows[:2], gen_length=30, eos_id=[EOS, 1])
    assert found.evaluations < plain.evaluations and not (found.tokens[:, 6:] == MASK).any()
    # Several ids: the one that came stays, what follows is the first of them.
    found = run(model, rows[:2], gen_length=30, eos_id=[2, EOS])
    for b, end in enumerate((5, 13)):
        text = found.tokens[b, found.pad[b] :]
        stop = int(torch.isin(text[len(rows[b]) :], torch.tensor([2, EOS])).nonzero()[0, 0]) + len(rows[b])
        assert stop <= end and text[stop] in (2, EOS) and (text[stop + 1 :] == 2).all()
        assert text[5] == EOS or b == 1
    # An end of sequence in the prompt ends nothing.
    prompt = rows[0].clone()
    prompt[-1] = EOS
    model.ends = [99]
    assert torch.equal(run(model, prompt[None, :3], eos_id=EOS).tokens, run(model, prompt[None, :3]).tokens)
    assert torch.equal(run(model, prompt[None, 1:], eos_id=EOS).tokens, run(model, prompt[None, 1:]).tokens)


def test_law_of_the_tokens():
    """Chi-square at 1e-6: tokens are drawn from the tempered softmax, also where positions are chosen by confidence."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 2.0])

    def model(ids, attention_mask=None, position_ids=None):
        return logits.expand(*ids.shape, -1)

    expected = (logits[:4] / 0.7).softmax(0).double() * 800 * 12
    # With one block and as many kept as are drawn, nothing selects among draws.
    for name in ("random", "sequential"):
        found = run(model, 800, mask_id=4, gen_length=12, temperature=0.7, remasking=name, seed=2, cache=False)
        counts = torch.bincount(found.tokens.reshape(-1), minlength=4).double()
        assert float(((counts - expected) ** 2 / expected).sum()) < 30.7  # 3 degrees
    orders = run(model, 2000, mask_id=4, gen_length=3, block_length=3, remasking="random", seed=2, cache=False).order
    code = (orders * torch.tensor([9, 3, 1])).sum(1)
    _, counts = code.unique(return_counts=True)
    assert len(counts) == 6
    assert float(((counts - 2000 / 6) ** 2 / (2000 / 6)).sum()) < 35.9  # 5 degrees


def test_a_threshold_must_be_exceeded():
    def model(ids, attention_mask=None, position_ids=None):
        return torch.tensor([0.0, 0.0, -torch.inf]).expand(*ids.shape, -1)

    for threshold, steps in ((0.5, 4), (0.4999, 1)):
        found = run(model, 1, mask_id=2, gen_length=4, threshold=threshold, cache=False)
        assert found.steps == steps


def test_masks_and_caches():
    layout = Layout(prompts(4, 8), 4, mask_id=MASK)
    allowed = block_causal(layout, 0, 12, 4)
    assert allowed.shape == (2, 1, 12, 12) and torch.equal(allowed[1, 0], block_mask(12, 4)[0, 0])
    assert torch.equal(allowed[0, 0, 4:, 4:], block_mask(8, 4)[0, 0])
    assert not allowed[0, 0, 4:, :4].any() and allowed[0, 0, :4, :4].all()
    assert torch.equal(block_causal(layout, 8, 12, 4), allowed[:, :, 8:])
    keys = tuple((torch.randn(2, 1, 7, 3), torch.randn(2, 1, 7, 3)) for _ in range(2))
    assert all(torch.equal(a, b[..., :5, :]) for x, y in zip(cropped(keys, 5), keys) for a, b in zip(x, y))
    cache = Cache()
    cache.layers = list(keys)
    assert cropped(cache, 5) is cache and cache.get_seq_length() == 5


def test_callback_and_progress():
    seen = []
    found = run(TinyLM(), prompts(6)[0][None], progress=True, callback=lambda s: seen.append((s.step, s.block)))
    assert [s for s, _ in seen] == list(range(1, found.steps + 1))
    assert sorted({b for _, b in seen}) == [(4, 8), (8, 12), (12, 16), (16, 20)]


def test_refusals():
    model, rows = TinyLM(), prompts(3, 5)
    for options, word in (
        (dict(remasking="best"), "remasking must be"),
        (dict(block_length=0), "block_length must be"),
        (dict(steps=0), "steps must be"),
        (dict(num_to_transfer=0), "num_to_transfer must be"),
        (dict(remasking="sequential", editing_threshold=0.5), "editing_threshold"),
        (dict(remasking="entropy_bounded", editing_threshold=0.5), "editing_threshold"),
        (dict(gen_length=-1), "number of tokens"),
        (dict(seed=1, generator=torch.Generator()), "exclude"),
    ):
        with pytest.raises(ValueError, match=word):
            run(model, rows, **options)

    class Forgets(TinyLM):
        def stored(self, past, layers):
            return None

    with pytest.raises(ValueError, match="keeps no cache"):
        run(Forgets(), rows)
