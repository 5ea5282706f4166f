"""The samplers of LLaDA and Fast-dLLM, and the floor of all text samplers: layout, padding, draws, early stop."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_peer import EOS, EOT, MASK, Toy, V, fast_dllm, llada

from genfast import TextSample, backend, generate_fast_dllm, generate_llada
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import HeadOutput, Output, call
from genfast.samplers.text.run import even_counts

NEVER = -1e4
"""A logit of the mask token that gives it no probability: nothing is then left of the peer's oddity about it."""

BLOCKS = dict(steps=12, gen_length=24, block_length=8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that on a busy machine threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draws(seed=3):
    return torch.Generator().manual_seed(seed)


def prompts(batch=3, length=6, seed=1):
    return torch.randint(0, V - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(seed=1):
    return [row[:n] for row, n in zip(prompts(4, 9, seed), (9, 4, 1, 6))]


SAMPLERS = {
    "llada": lambda model, prompt, **kw: generate_llada(model, prompt, **{"mask_id": MASK, **BLOCKS, **kw}),
    "threshold": lambda model, prompt, **kw: generate_fast_dllm(
        model, prompt, threshold=0.4, **{"mask_id": MASK, "gen_length": 24, "block_length": 8, **kw}
    ),
    "prefix": lambda model, prompt, **kw: generate_fast_dllm(
        model, prompt, threshold=0.4, cache="prefix", **{"mask_id": MASK, "gen_length": 24, "block_length": 8, **kw}
    ),
    "dual": lambda model, prompt, **kw: generate_fast_dllm(
        model, prompt, factor=1.4, cache="dual", **{"mask_id": MASK, "gen_length": 24, "block_length": 8, **kw}
    ),
}
everywhere = pytest.mark.parametrize("name", SAMPLERS)


# --- the published loops ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    blocks=st.sampled_from([(8, 16, 16), (16, 16, 4), (24, 24, 8), (3, 24, 24), (4, 12, 3), (20, 20, 4)]),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    cfg_scale=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_llada_is_the_published_loop(batch, length, blocks, temperature, cfg_scale, seed):
    model, prompt = Toy(seed, mask_logit=NEVER), prompts(batch, length, seed)
    options = dict(zip(("steps", "gen_length", "block_length"), blocks), temperature=temperature, cfg_scale=cfg_scale)
    found = generate_llada(model, prompt, mask_id=MASK, generator=draws(), **options)
    assert torch.equal(found.tokens, llada(model, prompt, generator=draws(), **options))
    assert isinstance(found, TextSample) and found.start == length and not found.pad.any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    rule=st.sampled_from([{}, dict(threshold=0.3), dict(threshold=0.8), dict(factor=0.9), dict(factor=1.7)]),
    cache=st.sampled_from([None, "prefix", "dual"]),
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_fast_dllm_is_the_published_loop(batch, rule, cache, temperature, seed):
    """With its corrections: no wasted draw, no acceptance of a last failure, blocks are finished. Batches too."""
    model, prompt = Toy(seed, mask_logit=NEVER), prompts(batch, 5, seed)
    options = dict(gen_length=24, block_length=8, temperature=temperature, cache=cache, **rule)
    steps = {} if rule else dict(steps=9)
    found = generate_fast_dllm(model, prompt, mask_id=MASK, generator=draws(), **options, **steps)
    published, calls = fast_dllm(
        model, prompt, generator=draws(), fixed=False, accept_last=False, second_draw=False, **{"steps": 24, **steps},
        **options,
    )  # fmt: skip
    assert torch.equal(found.tokens, published)
    assert found.evaluations == found.steps == calls


def test_parallel_decoding_takes_fewer_steps_and_caches_read_fewer_tokens():
    model, prompt = Toy(2, mask_logit=NEVER, sharpness=20.0), prompts(2, 6)
    options = dict(mask_id=MASK, gen_length=24, block_length=8)
    for cache, sizes in ((None, {30}), ("prefix", {30, 24, 16, 8}), ("dual", {30, 8})):
        model.calls.clear()
        plain = generate_fast_dllm(model, prompt, cache=cache, **options)
        assert plain.steps == plain.evaluations == 24 == len(model.calls)
        assert {n for _, n in model.calls} == sizes
        assert generate_fast_dllm(model, prompt, cache=cache, threshold=0.3, **options).steps < 24


def test_caches_are_exact_for_a_model_whose_keys_and_values_do_not_change():
    """One layer's keys and values depend on their own token only, and none in a prefix or suffix changes."""
    model, prompt = Toy(4, mask_logit=NEVER), prompts(3, 6)
    model.layers = model.layers[:1]
    texts = [
        generate_fast_dllm(
            model, prompt, mask_id=MASK, gen_length=24, block_length=8, threshold=0.5, temperature=0.9, seed=1, cache=c
        ).tokens
        for c in (None, "prefix", "dual")
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


# --- every sampler ---------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_padded_row_is_the_row_alone(name, temperature):
    model, rows = Toy(7, mask_logit=NEVER), ragged()
    together = SAMPLERS[name](model, rows, temperature=temperature, seed=11)
    assert together.pad.tolist() == [0, 5, 8, 3] and together.start == 9
    for b, row in enumerate(rows):
        alone = SAMPLERS[name](model, row[None], temperature=temperature, seed=11, offset=b)
        assert torch.equal(alone.tokens[0], together.tokens[b, together.pad[b] :])


def test_a_padded_row_is_the_row_alone_with_guidance_and_random_remasking():
    model, rows = Toy(7, mask_logit=NEVER), ragged()
    for options in (dict(cfg_scale=1.0), dict(remasking="random"), dict(remasking="sequential")):
        together = SAMPLERS["llada"](model, rows, temperature=0.9, seed=11, **options)
        for b, row in enumerate(rows):
            alone = SAMPLERS["llada"](model, row[None], temperature=0.9, seed=11, offset=b, **options)
            assert torch.equal(alone.tokens[0], together.tokens[b, together.pad[b] :])


@everywhere
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_batch_in_parts_is_the_batch_whole(name, remasking):
    model, prompt = Toy(8, mask_logit=NEVER), prompts(5)
    whole = SAMPLERS[name](model, prompt, temperature=1.0, remasking=remasking, seed=21, offset=4).tokens
    for first, last in ((0, 1), (1, 3), (3, 5)):
        part = SAMPLERS[name](
            model, prompt[first:last], temperature=1.0, remasking=remasking, seed=21, offset=4 + first
        ).tokens
        assert torch.equal(part, whole[first:last])


@everywhere
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_seed_per_row_makes_a_row_its_own(name, remasking):
    model, prompt = Toy(9, mask_logit=NEVER), prompts(3)
    options = dict(temperature=1.0, remasking=remasking)
    seeds = torch.tensor([5, -7, 2**40])
    whole = SAMPLERS[name](model, prompt, seed=seeds, **options).tokens
    order = torch.tensor([2, 0, 1])
    assert torch.equal(SAMPLERS[name](model, prompt[order], seed=seeds[order], **options).tokens, whole[order])
    assert torch.equal(SAMPLERS[name](model, prompt[1:2], seed=seeds[1:2], **options).tokens, whole[1:2])
    # Rows with the same prompt and seed are the same row; without, they differ.
    same = SAMPLERS[name](model, prompt[:1].expand(2, -1), seed=seeds[:1].expand(2), **options).tokens
    assert torch.equal(same[0], same[1])
    assert not torch.equal(*SAMPLERS[name](model, prompt[:1].expand(2, -1), seed=5, **options).tokens)


@everywhere
def test_the_reference_writes_the_same_text(name):
    model, rows = Toy(9), ragged()
    for options in (dict(temperature=0.9), dict(remasking="random"), dict(eos_id=EOS)):
        found = SAMPLERS[name](model, rows, seed=3, **options).tokens
        with backend("reference"):
            assert torch.equal(SAMPLERS[name](model, rows, seed=3, **options).tokens, found)


@everywhere
def test_without_a_seed_torchs_default_generator_decides(name):
    model, prompt, texts = Toy(9, mask_logit=NEVER), prompts(2), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(SAMPLERS[name](model, prompt, temperature=1.0).tokens)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@everywhere
def test_callback_order_and_progress(name, monkeypatch, capsys):
    model, prompt, seen = Toy(3, mask_logit=NEVER), prompts(2), []

    def callback(state):
        assert torch.equal(state.x == MASK, torch.where(state.order == 0, state.x == MASK, False))
        seen.append((state.step, state.block, int((state.x == MASK).sum())))

    found = SAMPLERS[name](model, prompt, callback=callback, progress=True)
    assert [step for step, _, _ in seen] == list(range(1, found.steps + 1))
    left = [masks for _, _, masks in seen]
    assert left == sorted(left, reverse=True) and left[-1] == 0
    assert sorted({block for _, block, _ in seen}) == [(6, 14), (14, 22), (22, 30)]
    assert not found.order[:, :6].any() and found.order.dtype == torch.int32
    assert (found.order[:, 6:] > 0).all() and found.order.max() == found.steps
    # Blocks are written one after the other.
    assert (found.order[:, 6:14].max() < found.order[:, 14:22].min()) and found.tokens[:, :6].equal(prompt)

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr("genfast.samplers.progress._bar_missing_said", False)
    with pytest.warns(UserWarning, match="tqdm"):
        again = SAMPLERS[name](model, prompt, progress=True)
    assert torch.equal(again.tokens, found.tokens)


@everywhere
def test_a_row_that_has_ended_is_filled_and_the_loop_stops(name):
    """A model that likes the end of sequence: the text before a row's first one is what it is without early stop."""
    model, rows = Toy(5, mask_logit=NEVER), ragged()
    model.head[:, EOS] *= 3
    free = SAMPLERS[name](model, rows, temperature=0.8, seed=4)
    found = SAMPLERS[name](model, rows, temperature=0.8, seed=4, eos_id=EOS)
    ends = 0
    for freely, stopped, order in zip(free.tokens[:, 9:], found.tokens[:, 9:], found.order[:, 9:]):
        assert MASK not in stopped.tolist() and (order > 0).all()
        if EOS in stopped.tolist():
            end, ends = stopped.tolist().index(EOS), ends + 1
            assert (stopped[end:] == EOS).all()
            assert torch.equal(stopped[:end], freely[:end])
        else:
            assert torch.equal(stopped, freely)
    assert ends > 0
    alone = SAMPLERS[name](model, rows[1][None], temperature=0.8, seed=4, offset=1, eos_id=EOS)
    assert torch.equal(alone.tokens[0], found.tokens[1, 5:])

    model.head[:] = 0
    model.bias = torch.eye(V)[EOS] * 9
    found = SAMPLERS[name](model, rows, eos_id=EOS)
    assert found.evaluations < 9 and (found.tokens[:, 9:] == EOS).all()


@everywhere
def test_suppressed_ids(name):
    model, prompt = Toy(6), prompts(3)
    often = SAMPLERS[name](model, prompt, temperature=1.0, seed=1).tokens[:, 6:]
    assert MASK not in often
    likely = often.flatten().bincount(minlength=V).topk(2).indices.tolist()
    found = SAMPLERS[name](model, prompt, temperature=1.0, seed=1, suppress=likely).tokens[:, 6:]
    assert not set(found.flatten().tolist()) & {*likely, MASK}


def test_ids_suppressed_from_confidence_go_last():
    """As LLaDA's confidence_eos_eot_inf, whose aliasing makes it right at temperature 0."""
    for seed in range(4):
        model, prompt = Toy(seed, mask_logit=NEVER), prompts(3)
        model.head[:, EOS] *= 2
        found = generate_llada(model, prompt, mask_id=MASK, suppress_confidence=[EOS, EOT], **BLOCKS)
        assert torch.equal(found.tokens, llada(model, prompt, confidence_eos_eot_inf=True, **BLOCKS))


@pytest.mark.parametrize("remasking", ["margin", "entropy", "tempered"])
def test_other_confidences(remasking):
    """Two steps of one block against the definitions."""
    model, prompt = Toy(1, mask_logit=NEVER), prompts(3)
    found = generate_llada(model, prompt, mask_id=MASK, steps=2, gen_length=8, block_length=8, remasking=remasking)
    x = torch.cat([prompt, torch.full((3, 8), MASK)], 1)
    for _ in range(2):
        p = model(x).logits[:, 6:].double().softmax(-1)
        best = p.topk(2, -1).values
        confidence = {"margin": best[..., 0] - best[..., 1], "entropy": (p * p.log().clamp_min(-1e3)).sum(-1)}
        confidence = confidence.get(remasking, best[..., 0]).masked_fill(x[:, 6:] != MASK, -torch.inf)
        chosen = confidence.topk(4).indices
        x[:, 6:] = x[:, 6:].scatter(1, chosen, p.argmax(-1).gather(1, chosen))
    assert torch.equal(found.tokens, x)


def test_sequential_and_random_choose_before_they_draw():
    model, prompt = Toy(1, mask_logit=NEVER), prompts(1)
    found = generate_llada(model, prompt, mask_id=MASK, steps=8, gen_length=8, block_length=8, remasking="sequential")
    assert found.order[0, 6:].tolist() == list(range(1, 9))
    orders = {
        tuple(
            generate_llada(
                model, prompt, mask_id=MASK, steps=8, gen_length=8, block_length=8, remasking="random", seed=s
            ).order[0].tolist()
        )
        for s in range(5)
    }  # fmt: skip
    assert len(orders) == 5


def test_half_precision_logits_and_other_answers():
    prompt = prompts(2)
    for dtype in (torch.bfloat16, torch.float16):
        model = Toy(3, mask_logit=NEVER, dtype=dtype)
        found = generate_llada(model, prompt, mask_id=MASK, **BLOCKS)
        widened = generate_llada(lambda ids, model=model: model(ids).logits.float(), prompt, mask_id=MASK, **BLOCKS)
        as_tuple = generate_llada(lambda ids, model=model: (model(ids).logits, None), prompt, mask_id=MASK, **BLOCKS)
        assert torch.equal(found.tokens, widened.tokens) and torch.equal(found.tokens, as_tuple.tokens)


def test_no_prompt_and_steps_that_would_do_nothing():
    model = Toy(3, mask_logit=NEVER)
    found = generate_llada(model, 3, mask_id=MASK, steps=20, gen_length=8, block_length=4, temperature=1.0, seed=2)
    assert found.tokens.shape == (3, 8) and found.start == 0 and found.steps == 8 == found.evaluations
    for cache in ("prefix", "dual"):
        options = dict(mask_id=MASK, gen_length=8, block_length=4, temperature=1.0, seed=2, threshold=0.5)
        assert MASK not in generate_fast_dllm(model, 3, cache=cache, **options).tokens


class Headless:
    """A toy that returns hidden states, and its head; ``whole`` makes the logits of it."""

    def __init__(self, seed):
        self.toy = Toy(seed)
        self.head = (self.toy.head.T.float().contiguous(), torch.linspace(-1, 1, V))

    def __call__(self, ids, **options):
        hidden, present = self.toy.hidden(ids, **{k: v for k, v in options.items() if k != "use_cache"})
        return SimpleNamespace(last_hidden_state=hidden.float(), past_key_values=present)

    def whole(self, ids, **options):
        answer = self(ids, **options)
        weight, bias = self.head
        answer.logits = (answer.last_hidden_state.double() @ weight.T.double() + bias).float()
        return answer


@everywhere
@pytest.mark.parametrize("options", [{}, dict(cfg_scale=1.5), dict(remasking="random"), dict(suppress=[1, EOS])])
def test_a_head_apart_from_the_model(name, options):
    """At temperature 0 the text is that of the logits; the draws are others, but a row's own too."""
    if name != "llada" and {"cfg_scale", "remasking"} & options.keys():
        pytest.skip("an option of generate_llada")
    model, rows = Headless(6), ragged()
    found = SAMPLERS[name](model, rows, head=model.head, seed=2, **options)
    assert torch.equal(found.tokens, SAMPLERS[name](model.whole, rows, seed=2, **options).tokens)
    hot = SAMPLERS[name](model, rows, head=model.head, seed=2, temperature=1.0, **options)
    assert not torch.equal(hot.tokens, found.tokens) and MASK not in hot.tokens[:, 9:]
    alone = SAMPLERS[name](model, rows[1][None], head=model.head, seed=2, offset=1, temperature=1.0, **options)
    assert torch.equal(alone.tokens[0], hot.tokens[1, 5:])


def test_a_head_refuses():
    model = Headless(6)
    with pytest.raises(ValueError, match="confidence must be"):
        SAMPLERS["threshold"](model, prompts(), head=model.head, remasking="random")
    for options, said in ((dict(generator=draws()), "give a seed"), (dict(remasking="margin"), "confidence must be")):
        with pytest.raises(ValueError, match=said):
            generate_llada(model, prompts(), head=model.head, mask_id=MASK, **BLOCKS, **options)


def test_shifted_hidden_states():
    hidden = torch.randn(2, 5, 6, generator=draws())
    head = torch.randn(V, 6, generator=draws(4))
    ids = Layout(2, 5, mask_id=MASK).row_ids(torch.arange(5), 0, False)
    found = HeadOutput(hidden, head, shift=True).sample(0, 5, None, ids)
    assert torch.equal(found.tokens, Output(hidden @ head.T, shift=True).sample(0, 5, None, ids).tokens)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(steps=5), "steps must be a multiple"),
        (dict(gen_length=20), "gen_length must be a multiple"),
        (dict(steps=0), "steps must be a whole number"),
        (dict(block_length=True), "block_length must be a whole number"),
        (dict(remasking="high_confidence"), "remasking must be one of low_confidence"),
        (dict(cfg_scale=-1.0), "cfg_scale must not be negative"),
        (dict(temperature=-1.0), "temperature must be in"),
        (dict(seed=1, generator=draws()), "exclude each other"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "seed has shape"),
        (dict(suppress=[V]), "suppress is out of range"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(ValueError, match=said):
        generate_llada(Toy(), prompts(), **{"mask_id": MASK, **BLOCKS, **options})


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(threshold=0.5, factor=1.0), "exclude each other"),
        (dict(threshold=0.5, steps=8), "steps goes with neither"),
        (dict(factor=1.0, remasking="sequential"), "needs? confidences"),
        (dict(cache="suffix"), 'None, "prefix" or "dual"'),
    ],
)
def test_refusals_of_fast_dllm(options, said):
    with pytest.raises(ValueError, match=said):
        generate_fast_dllm(Toy(), prompts(), mask_id=MASK, gen_length=24, block_length=8, **options)


# --- the floor -------------------------------------------------------------------------------------------------------


def test_layout_pads_on_the_left():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([], dtype=torch.int64)]
    layout = Layout(rows, 2, mask_id=MASK, pad_id=0)
    assert layout.x.tolist() == [[1, 2, 3, MASK, MASK], [0, 0, 4, MASK, MASK], [0, 0, 0, MASK, MASK]]
    assert layout.pad.tolist() == [0, 2, 3] and layout.start == 3
    assert layout.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    ids = layout.row_ids(torch.tensor([2, 3]), 5, False)
    assert (ids >> 32).tolist() == [[5, 5], [6, 6], [7, 7]] and (ids & 0xFFFFFFFF).tolist() == [[2, 3], [0, 1], [0, 0]]
    assert (layout.row_ids(torch.tensor([3]), 5, True) >> 32).tolist() == [[5]] * 3
    tensor = torch.tensor([[1, 2, 3], [4, 9, 9], [9, 9, 9]])
    same = Layout(tensor, 2, mask_id=MASK, pad_id=0, prompt_lengths=torch.tensor([3, 1, 0]))
    assert torch.equal(same.x, layout.x) and torch.equal(same.attention_mask, layout.attention_mask)
    plain = Layout(tensor, 2, mask_id=MASK)
    assert plain.attention_mask is None and not plain.pad.any() and plain.x[:, :3].equal(tensor)
    assert Layout(2, 3, mask_id=MASK).x.tolist() == [[MASK] * 3] * 2
    assert Layout([], 3, mask_id=MASK).x.shape == (0, 3)


@pytest.mark.parametrize(
    "prompt, options, error",
    [
        (torch.zeros(2, 3), {}, ValueError),
        (torch.zeros(2, dtype=torch.int64), {}, ValueError),
        ([torch.zeros(2)], {}, TypeError),
        ([[1, 2]], {}, TypeError),
        (-1, {}, ValueError),
        (2, dict(prompt_lengths=torch.tensor([1, 1])), ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), dict(prompt_lengths=torch.tensor([1, 4])), ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), dict(prompt_lengths=torch.tensor([1])), ValueError),
    ],
)
def test_layout_refuses(prompt, options, error):
    with pytest.raises(error):
        Layout(prompt, 2, mask_id=MASK, **options)


@pytest.mark.parametrize("length", [-1, 1.5, True])
def test_layout_refuses_lengths(length):
    with pytest.raises(ValueError, match="whole number"):
        Layout(1, length, mask_id=MASK)


def test_even_counts():
    assert even_counts(10, 4).tolist() == [3, 3, 2, 2]
    assert even_counts(torch.tensor([5, 0, 2]), 3).tolist() == [[2, 2, 1], [0, 0, 0], [1, 1, 0]]


def test_a_models_answer_is_checked():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"returned \[2, 4, 5\] for ids \[2, 3\]"):
        call(lambda ids: torch.zeros(2, 4, 5), ids)
    with pytest.raises(ValueError, match="returned NoneType"):
        call(lambda ids: (None,), ids)
    with pytest.raises(ValueError, match="columns 1 to 5 are not among 2 to 6"):
        Output(torch.zeros(2, 4, 5), first=2).sample(1, 5, None, torch.zeros(2, 4, dtype=torch.int64))


def test_output_reads_only_the_positions_asked_for():
    logits = torch.randn(2, 6, V, generator=draws())
    where = torch.zeros(2, 3, dtype=torch.bool)
    where[0, 1] = where[1, 2] = True
    poisoned = torch.full_like(logits, torch.nan)
    poisoned[:, 2:5][where] = logits[:, 2:5][where]
    ids = Layout(2, 10, mask_id=MASK).row_ids(torch.arange(6, 9), 0, False)
    found = Output(poisoned, first=4).sample(6, 9, where, ids, temperature=1.0, seed=1)
    whole = Output(logits, first=4).sample(6, 9, None, ids, temperature=1.0, seed=1)
    assert torch.equal(found.tokens, torch.where(where, whole.tokens, 0))
    assert torch.equal(found.confidence, torch.where(where, whole.confidence, 0.0))
