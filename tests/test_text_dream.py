"""``generate_dream``: against the published loop written out, and what it promises beyond it."""

import numpy as np
import pytest
import torch
from tiny_lm import TinyLM

import genfast
from genfast.samplers.text.dream import transfer_counts

MASK, EOS, VOCAB = 39, 38, 40
RANKED = ("maskgit_plus", "topk_margin", "entropy")


def prompts(*lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOS, (n,), generator=draw) for n in lengths]


def run(model, prompt, **options):
    return genfast.generate_dream(model, prompt, **{"mask_id": MASK, "gen_length": 12, "steps": 6, **options})


def published(model, prompt, length, steps, alg, top_p=None, top_k=None, eps=1e-3):
    """The loop of generation_utils.py for temperature 0 and one row; the mask is never drawn."""
    x = torch.nn.functional.pad(prompt[None], (0, length), value=MASK)
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        masked = x == MASK
        logits = model(x).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)[masked].clone()
        logits[:, MASK] = -torch.inf
        if top_p is not None:
            values, order = logits.sort(descending=True)
            gone = values.softmax(-1).cumsum(-1) > top_p
            gone = torch.nn.functional.pad(gone, (1, 0))[:, :-1]
            logits = logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -torch.inf)
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        p = logits.softmax(-1)
        confidence, token = p.max(-1)
        if alg == "topk_margin":
            first, second = p.topk(2).values.unbind(-1)
            confidence = first - second
        elif alg == "entropy":
            confidence = torch.special.xlogy(p, p).sum(-1)
        t, s = times[i], times[i + 1]
        count = int(masked.sum() * (1 - s / t)) if i < steps - 1 else int(masked.sum())
        places = masked[0].nonzero()[:, 0]
        best = confidence.sort(descending=True, stable=True).indices[:count]
        x[0, places[best]] = token[best]
    return x


@pytest.mark.parametrize("alg", RANKED)
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}])
def test_greedy_tokens_are_the_published_ones(alg, filters):
    model = TinyLM()
    for prompt in prompts(5, 1, 9):
        expected = published(model, prompt, 12, 6, alg, **filters)
        found = run(model, prompt[None], alg=alg, **filters)
        assert torch.equal(found.tokens, expected)
        assert found.start == len(prompt) and found.steps == found.evaluations == int(found.order.max())
        assert (found.order[:, : found.start] == 0).all() and (found.order[:, found.start :] > 0).all()


def test_counts_are_the_published_ones_and_empty_steps_are_not_made():
    for length, steps in ((12, 6), (50, 50), (64, 200), (7, 1), (300, 512)):
        times = torch.linspace(1, 1e-3, steps + 1)
        left, expected = length, []
        for i in range(steps):
            expected.append(int(torch.tensor(left) / 1 * (1 - times[i + 1] / times[i])) if i < steps - 1 else left)
            left -= expected[-1]
        found = transfer_counts(length, np.linspace(1, 1e-3, steps + 1, dtype=np.float32))
        assert sum(found) == length and len(found) == steps
        # linspace of torch and numpy may differ in the last bit, which moves a count across a whole number.
        assert sum(a != b for a, b in zip(found, expected)) <= steps // 20
    model = TinyLM()
    found = run(model, prompts(3)[0][None], gen_length=8, steps=60, alg="entropy")
    assert found.steps == found.evaluations == model.calls <= 8


@pytest.mark.parametrize("alg", ["origin", *RANKED])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_padded_row_is_the_row_alone(alg, temperature):
    model = TinyLM()
    rows = prompts(3, 7, 1, 7)
    options = dict(alg=alg, temperature=temperature, seed=5, top_p=0.95)
    if alg != "origin":
        options["alg_temp"] = 0.3
    together = run(model, rows, **options)
    assert together.pad.tolist() == [4, 0, 6, 0] and together.start == 7
    for b, row in enumerate(rows):
        alone = run(model, row[None], offset=b, **options)
        assert torch.equal(together.tokens[b, 7:], alone.tokens[0, len(row) :])
        assert torch.equal(together.tokens[b, together.pad[b] : 7], row)
    assert not (together.tokens[:, 7:] == MASK).any()


def test_a_batch_drawn_in_parts_is_the_batch_drawn_whole():
    model, rows = TinyLM(), torch.stack(prompts(4, 4, 4, 4, 4))
    for options in (dict(alg="origin"), dict(alg="entropy", alg_temp=0.5)):
        whole = run(model, rows, temperature=1.0, seed=3, **options).tokens
        parts = [
            run(model, part, temperature=1.0, seed=3, offset=k, **options).tokens
            for k, part in ((0, rows[:2]), (2, rows[2:]))
        ]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, run(model, rows, temperature=1.0, seed=4, **options).tokens)
        seeds = torch.tensor([9, 2, 5, 2, 7])
        own = run(model, rows[:1].expand(5, -1), temperature=1.0, seed=seeds, **options).tokens
        assert torch.equal(own[1], own[3]) and not torch.equal(own[1], own[2])


class Constant:
    """Logits that do not depend on the text."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, ids, attention_mask=None):
        return self.logits.expand(*ids.shape, -1)


def test_law_of_the_tokens_and_of_origins_steps():
    """Chi-square at 1e-6 each: tokens are drawn from the tempered softmax, and positions fall as time does."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 2.0])
    rows, length, steps = 400, 25, 5
    found = run(Constant(logits), rows, mask_id=4, gen_length=length, steps=steps, temperature=0.7, seed=11)
    p = (logits[:4] / 0.7).softmax(0).double()
    expected = p * rows * length
    counts = torch.bincount(found.tokens.reshape(-1), minlength=4).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 30.7  # chi-square, 3 degrees: 1e-6
    expected = torch.full((steps,), rows * length / steps, dtype=torch.float64)
    counts = torch.bincount(found.order.reshape(-1) - 1, minlength=steps).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 33.4  # 4 degrees
    # Tokens and steps are independent: 3 x 4 degrees.
    table = torch.zeros(4, steps, dtype=torch.float64)
    table.index_put_((found.tokens.reshape(-1), found.order.reshape(-1).long() - 1), torch.tensor(1.0).double(), True)
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    assert float(((table - expected) ** 2 / expected).sum()) < 51.3


def test_law_of_positions_under_alg_temp():
    """The first position is drawn from softmax(confidence / alg_temp): chi-square, 2 degrees, at 1e-6."""
    logits = torch.tensor([[9.0, 0.0], [2.0, 0.0], [0.5, 0.0], [1.0, 0.0]])  # of the prompt and three positions

    def model(ids):
        return torch.nn.functional.pad(logits[1:], (0, 1, 0, 1), value=-40.0).expand(len(ids), -1, -1)

    rows = 20000
    prompt = torch.zeros(rows, 1, dtype=torch.int64)
    found = run(model, prompt, mask_id=2, gen_length=3, steps=2, alg="maskgit_plus", alg_temp=0.4, seed=1)
    expected = (logits[1:].double().softmax(-1)[:, 0] / 0.4).softmax(0) * rows
    counts = (found.order[:, 1:] == 1).sum(0).double()
    assert counts.sum() == rows
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.7


def test_early_stop():
    class Ends(TinyLM):
        """Is the surer the further left, and says EOS at ``ends`` tokens of a row."""

        def forward(self, ids, attention_mask=None):
            starts = torch.zeros(len(ids), 1) if attention_mask is None else (attention_mask == 0).sum(1, True)
            place = (torch.arange(ids.shape[1]) - starts).clamp_min(0)
            found = super().forward(ids, attention_mask).logits / (place[..., None] + 1)
            found[..., EOS] += 100.0 * (place + 1 == torch.tensor(self.ends)[:, None])
            return found

    rows = prompts(4, 6, 5)
    model = Ends()
    model.ends = [4 + 2, 6 + 9, 5 + 0]
    options = dict(alg="maskgit_plus", gen_length=40, steps=40)
    found = run(model, rows, eos_id=EOS, **options)
    plain = run(model, rows, **options)
    assert not (found.tokens[:, 6:] == MASK).any() and (found.order[:, 6:] > 0).all()
    for b in range(3):
        text, full = found.tokens[b, 6:], plain.tokens[b, 6:]
        end = int((text == EOS).nonzero()[0, 0])
        assert torch.equal(text[: end + 1], full[: end + 1])
        model.ends = [[6, 15, 5][b]]
        alone = run(model, rows[b][None], eos_id=EOS, **options)
        assert torch.equal(alone.tokens[0, len(rows[b]) :], text)
        model.ends = [6, 15, 5]
    assert found.evaluations < plain.evaluations


def test_generator_and_progress_and_callback():
    model, rows = TinyLM(), torch.stack(prompts(4, 4))
    for alg in ("origin", "entropy"):
        options = dict(alg=alg, temperature=1.0, alg_temp=None if alg == "origin" else 0.5)
        a, b, c = (run(model, rows, generator=torch.Generator().manual_seed(s), **options).tokens for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    seen = []
    found = run(
        model, rows, alg="entropy", progress=True, callback=lambda s: seen.append((s.step, int((s.x == MASK).sum())))
    )
    assert [s for s, _ in seen] == list(range(1, found.steps + 1))
    assert [n for _, n in seen] == sorted((n for _, n in seen), reverse=True) and seen[-1][1] == 0
    assert run(model, rows, gen_length=0).tokens.shape == (2, 4)
    assert run(model, []).tokens.shape == (0, 12) and run(model, 2, alg="entropy").tokens.shape == (2, 12)


def test_refusals():
    model, rows = TinyLM(), prompts(3, 5)
    for options, word in (
        (dict(alg="best"), "alg must be"),
        (dict(steps=0), "steps must be"),
        (dict(eps=0.0), "eps must be"),
        (dict(alg="origin", alg_temp=0.5), "alg_temp"),
        (dict(alg="entropy", alg_temp=-1.0), "alg_temp"),
        (dict(alg="entropy", temperature=-1.0), "temperature"),
        (dict(seed=1, generator=torch.Generator()), "exclude"),
    ):
        with pytest.raises(ValueError, match=word):
            run(model, rows, **options)
    with pytest.raises(ValueError, match="prompt is empty"):
        run(model, prompts(3, 0))
