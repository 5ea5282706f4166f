"""Dream's drop-in against the published arithmetic, written out here in eager PyTorch."""

import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_lm import TinyLM

from genfast.dropin import dream

MASK, VOCAB = 39, 40
ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy")


class Peer:
    """generation_utils.py of Dream: filters, the draw, and the loop.

    ``ties``: equal confidences in the order that torch.topk happens to take, or by place. They are common: a filter
    that leaves one token gives it the probability 1.
    """

    ties = "topk"

    @classmethod
    def best(cls, confidence, n):
        if cls.ties == "topk":
            return torch.topk(confidence, n)[1]
        return confidence.sort(dim=1, descending=True, stable=True).indices[:, :n]

    @staticmethod
    def sample_tokens(logits, temperature=0.0, top_p=None, top_k=None, margin_confidence=False, neg_entropy=False):
        lowest = torch.finfo(logits.dtype).min
        if temperature > 0:
            logits = logits / temperature
        if top_p is not None and top_p < 1:
            ordered, index = torch.sort(logits, descending=True)
            remove = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > top_p
            remove[..., 1:] = remove[..., :-1].clone()
            remove[..., 0] = 0
            logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, remove), lowest)
        if top_k is not None:
            least = torch.topk(logits, min(top_k, logits.size(-1)))[0][..., -1, None]
            logits = logits.masked_fill(logits < least, lowest)
        p = torch.softmax(logits, dim=-1)
        if temperature > 0:
            try:
                x0 = torch.distributions.Categorical(probs=p).sample()
                confidence = torch.gather(p, -1, x0.unsqueeze(-1)).squeeze(-1)
            except Exception:
                confidence, x0 = p.max(dim=-1)
        else:
            confidence, x0 = p.max(dim=-1)
        if margin_confidence:
            ordered, _ = torch.sort(p, dim=-1, descending=True)
            confidence = ordered[:, 0] - ordered[:, 1]
        if neg_entropy:
            confidence = torch.sum(p * torch.log(p + 1e-10), dim=-1)
        return confidence, x0

    @classmethod
    def generate(
        cls, model, ids, *, steps, max_new_tokens, alg, temperature=0.0, top_p=None, top_k=None, alg_temp=None,
        attention_mask=None, eps=1e-3, logits_hook=lambda i, x, logits: logits, tokens_hook=lambda i, x, logits: x,
    ):  # fmt: skip
        x = F.pad(ids, (0, max_new_tokens), value=MASK)
        mask, places = "full", None
        if attention_mask is not None and torch.any(attention_mask == 0):
            real = F.pad(attention_mask, (0, max_new_tokens), value=1)
            places = real.long().cumsum(-1) - 1
            places.masked_fill_(real == 0, 1)
            mask = torch.logical_and(real[:, None, None, :], real[:, None, :, None])
        times = torch.linspace(1, eps, steps + 1)
        filters = dict(temperature=temperature, top_p=top_p, top_k=top_k)
        history = []
        x = tokens_hook(None, x, None)
        for i in range(steps):
            masked = x == MASK
            logits = model(x, mask, places).logits
            logits = logits_hook(i, x, torch.cat([logits[:, :1], logits[:, :-1]], dim=1))
            rows, t, s = logits[masked], times[i], times[i + 1]
            if alg == "origin":
                p = 1 - s / t if i < steps - 1 else 1
                x0 = torch.zeros_like(x[masked]) + MASK
                chosen = torch.rand(*x0.shape) < p
                _, x0[chosen] = cls.sample_tokens(rows[chosen], **filters)
                x[masked] = x0.clone()
            else:
                kinds = dict(margin_confidence=alg == "topk_margin", neg_entropy=alg == "entropy")
                confidence, x0 = cls.sample_tokens(rows, **filters, **kinds)
                mean = masked.sum() / masked.shape[0]
                n = int(mean * (1 - s / t)) if i < steps - 1 else int(mean)
                full = torch.full_like(x, -torch.inf, dtype=logits.dtype)
                full[masked] = confidence
                if n > 0:
                    if alg_temp is None or alg_temp == 0:
                        index = cls.best(full, n)
                    else:
                        index = torch.multinomial(F.softmax(full / alg_temp, dim=-1), num_samples=n)
                    other = torch.zeros_like(x) + MASK
                    other[masked] = x0.clone()
                    row = torch.arange(x.size(0)).unsqueeze(1).expand_as(index)
                    x[row, index] = other[row, index]
            x = tokens_hook(i, x, logits)
            history.append(x.clone())
        return x, history


class ByPlace(Peer):
    ties = "place"


def inputs(batch=3, length=5, seed=1):
    return torch.randint(0, MASK - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def both(options, *, ids=None, model=None, compat=False, **ours):
    """(published, ours), from the same state of torch's generator, and that state after."""
    model, ids = model or TinyLM(), inputs() if ids is None else ids
    options = dict(steps=6, max_new_tokens=12, **options)
    torch.manual_seed(3)
    expected = (Peer if compat else ByPlace).generate(model, ids, **options)[0]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    found = dream.diffusion_generate(model, ids, mask_token_id=MASK, compat=compat, **options, **ours)
    assert torch.equal(torch.get_rng_state(), after)
    return expected, found


FILTERS = [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", [{}, {"margin_confidence": True}, {"neg_entropy": True}])
def test_sample_tokens(filters, temperature, kind):
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) * 3
    torch.manual_seed(1)
    confidence, tokens = Peer.sample_tokens(logits, temperature, **filters, **kind)
    for compat in (False, True):
        torch.manual_seed(1)
        found = dream.sample_tokens(logits, temperature, **filters, **kind, compat=compat)
        assert torch.equal(found[1], tokens) and found[0].dtype == logits.dtype
        torch.testing.assert_close(found[0], confidence, rtol=2e-6, atol=2e-6)


def test_sample_tokens_of_other_dtypes_and_rows_with_nan():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 3
    confidence, tokens = dream.sample_tokens(logits.bfloat16())
    assert confidence.dtype == torch.bfloat16 and torch.equal(tokens, logits.bfloat16().argmax(-1))
    confidence, tokens = dream.sample_tokens(logits.double())
    assert confidence.dtype == torch.float64 and torch.equal(tokens, logits.argmax(-1))
    logits[7, 3] = torch.nan
    for a, b in zip(dream.sample_tokens(logits, 1.0), Peer.sample_tokens(logits, 1.0)):
        torch.testing.assert_close(a, b, equal_nan=True)
    with pytest.raises(TypeError, match="seed="):
        dream.sample_tokens(logits.double(), 1.0, seed=1)


def test_a_seeded_draw_is_of_the_filtered_distribution():
    """Chi-square, at most 3 degrees, at 1e-6; and one seed gives one result."""
    row = torch.tensor([0.3, -1.0, 1.2, 0.0, 2.0])
    _, tokens = dream.sample_tokens(row.expand(50000, -1), 0.8, top_p=0.9, top_k=4, seed=4)
    _, again = dream.sample_tokens(row.expand(50000, -1), 0.8, top_p=0.9, top_k=4, seed=4)
    assert torch.equal(tokens, again)
    p = (row.double() / 0.8).softmax(0)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.9).sum()) + 1][:4]
    expected = torch.zeros(5).double()
    expected[kept] = p[kept] / p[kept].sum() * 50000
    counts = torch.bincount(tokens, minlength=5).double()
    assert (counts[expected == 0] == 0).all() and len(kept) == 3
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 27.7


@pytest.mark.parametrize("alg", ALGS)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("compat", [False, True])
def test_tokens_are_the_published_ones(alg, filters, temperature, compat):
    expected, found = both(dict(alg=alg, temperature=temperature, **filters), compat=compat)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("alg", ALGS[1:])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("compat", [False, True])
def test_positions_are_drawn_as_published(alg, temperature, compat):
    expected, found = both(dict(alg=alg, temperature=temperature, alg_temp=0.3), compat=compat)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("alg", ALGS)
def test_padding(alg):
    ids = inputs()
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    for temperature in (0.0, 0.7):
        options = dict(alg=alg, temperature=temperature, attention_mask=attention_mask)
        expected, found = both(options, ids=ids)
        assert torch.equal(found, expected)
    # The model is called as published.
    seen = []

    def spy(x, mask, places):
        seen.append((mask, places))
        return TinyLM()(x, mask, places)

    Peer.generate(spy, ids, steps=1, max_new_tokens=2, alg=alg, attention_mask=attention_mask)
    options = dict(steps=1, max_new_tokens=2, alg=alg, mask_token_id=MASK)
    dream.diffusion_generate(spy, ids, attention_mask=attention_mask, **options)
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    # With a seed, a row does not depend on its padding.
    options = dict(
        mask_token_id=MASK, alg=alg, temperature=0.7, max_new_tokens=12, steps=6, seed=torch.tensor([5, 6, 7])
    )
    found = dream.diffusion_generate(TinyLM(), ids, attention_mask=attention_mask, **options)
    options["seed"] = options["seed"][:1]
    alone = dream.diffusion_generate(TinyLM(), ids[:1, 2:], **options)
    assert torch.equal(found[0, 5:], alone[0, 3:])


def test_hooks_and_history():
    def logits_hook(step, x, logits):
        logits = logits.clone()
        logits[..., 7] += 1.0 + step
        return logits

    def tokens_hook(step, x, logits):
        if step is None:
            assert logits is None
            x = x.clone()
            x[:, 8] = 11
        elif step == 2:
            x = x.clone()
            x[:, 6] = MASK
        return x

    # The hook leaves rows with other numbers of masks, which "origin" alone treats as published by default.
    for alg in ALGS:
        options = dict(steps=6, max_new_tokens=12, alg=alg, temperature=0.5)
        torch.manual_seed(0)
        expected, history = Peer.generate(
            TinyLM(), inputs(), **options, logits_hook=logits_hook, tokens_hook=tokens_hook
        )
        torch.manual_seed(0)
        found = dream.diffusion_generate(
            TinyLM(),
            inputs(),
            mask_token_id=MASK,
            output_history=True,
            return_dict_in_generate=True,
            generation_logits_hook_func=logits_hook,
            generation_tokens_hook_func=tokens_hook,
            compat=alg != "origin",
            **options,
        )
        assert torch.equal(found.sequences, expected) and (expected[:, 8] == 11).all()
        assert len(found.history) == 6 and all(torch.equal(a, b) for a, b in zip(found.history, history))
        assert found["sequences"] is found[0] is found.to_tuple()[0]
        expected, _ = ByPlace.generate(TinyLM(), inputs(), steps=6, max_new_tokens=12, alg=alg, logits_hook=logits_hook)
        hooks = dict(generation_logits_hook_func=logits_hook)
        options = dict(mask_token_id=MASK, steps=6, max_new_tokens=12, alg=alg)
        if alg != "origin":
            assert torch.equal(dream.diffusion_generate(TinyLM(), inputs(), **options, **hooks), expected)
    assert dream.DreamModelOutput(found[0]).to_tuple() == (found[0],)


def test_rows_with_other_numbers_of_masks():
    """An infilling prompt: compat is the published loop, masks in the prompt included; ours leaves what is there."""
    ids = inputs()
    ids[0, 2] = ids[0, 3] = ids[1, 1] = MASK
    for alg in ALGS[1:]:
        for temperature in (0.0, 0.6):
            expected, found = both(dict(alg=alg, temperature=temperature), ids=ids, compat=True)
            assert torch.equal(found, expected)
        ours = dream.diffusion_generate(
            TinyLM(), ids, mask_token_id=MASK, steps=6, max_new_tokens=12, alg=alg, seed=1, temperature=0.6
        )
        assert torch.equal(torch.where(ids == MASK, ours[:, :5], ids), ours[:, :5])
        alone = dream.diffusion_generate(
            TinyLM(), ids[:1], mask_token_id=MASK, steps=6, max_new_tokens=12, alg=alg, seed=1, temperature=0.6
        )
        assert torch.equal(ours[:1], alone)


def test_the_published_mean_remasks_what_compat_reproduces():
    """The oddity is there: a row with fewer masks than the mean loses tokens."""
    ids = inputs(2, 12)
    ids[0, 1:] = MASK
    expected, found = both(dict(alg="entropy"), ids=ids, compat=True)
    assert torch.equal(found, expected) and (found[1] == MASK).any()
    plain = dream.diffusion_generate(TinyLM(), ids, mask_token_id=MASK, steps=6, max_new_tokens=12, alg="entropy")
    assert torch.equal(plain[1, :12], ids[1])


def test_seeded_runs():
    for alg in ALGS:
        options = dict(
            mask_token_id=MASK, steps=6, max_new_tokens=12, alg=alg, temperature=0.7, alg_temp=0.2 * (alg != "origin")
        )
        state = torch.get_rng_state()
        a, b, c = (dream.diffusion_generate(TinyLM(), inputs(), seed=s, **options) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(torch.get_rng_state(), state)
        # Every step draws anew: masks put back after each of them get other tokens.
        texts = []

        def again(step, x, logits, texts=texts):
            texts.append(x)
            return torch.where(torch.arange(x.shape[1]) < 5, x, MASK)

        everything = {**options, "steps": 3, "eps": 1e-9, "temperature": 5.0}
        dream.diffusion_generate(TinyLM(), inputs(), seed=1, generation_tokens_hook_func=again, **everything)
        first, last = (torch.where(text == MASK, -1 - k, text) for k, text in enumerate(texts[2:]))
        same = ((first == last)[:, 5:] & (first >= 0)[:, 5:]).sum() / ((first >= 0) & (last >= 0))[:, 5:].sum()
        assert not same > 0.5
        seeds = torch.tensor([8, 9])
        same = dream.diffusion_generate(TinyLM(), inputs(1).expand(2, -1), seed=seeds, **options)
        swapped = dream.diffusion_generate(TinyLM(), inputs(1).expand(2, -1), seed=seeds.flip(0), **options)
        assert torch.equal(same, swapped.flip(0)) and not torch.equal(same[0], same[1])


def test_seeded_origin_unmasks_as_often_as_published():
    """Positions left after each step, binomial: 5 standard deviations, 6e-7 per step."""
    options = dict(mask_token_id=2, steps=4, max_new_tokens=50, alg="origin", return_dict_in_generate=True)

    def model(x, mask, places):
        return SimpleNamespace(logits=torch.tensor([0.0, 1.0, -torch.inf]).expand(*x.shape, -1))

    found = dream.diffusion_generate(model, torch.zeros(200, 1).long(), output_history=True, seed=3, **options)
    for state, t in zip(found.history, torch.linspace(1, 1e-3, 5)[1:].tolist()):
        t = 0.0 if state is found.history[-1] else t
        left = float((state == 2).double().sum())
        assert abs(left - 10000 * t) <= 5 * (10000 * t * (1 - t)) ** 0.5


def test_configuration():
    config = SimpleNamespace(mask_token_id=MASK, max_new_tokens=6, steps=3, alg="entropy", top_k=5)
    model, ids = TinyLM(), inputs()
    found = dream.diffusion_generate(model, ids, config)
    expected, _ = Peer.generate(model, ids, steps=3, max_new_tokens=6, alg="entropy", top_k=5)
    assert torch.equal(found, expected)
    expected, _ = Peer.generate(model, ids, steps=2, max_new_tokens=6, alg="maskgit_plus", top_k=None)
    assert torch.equal(dream.diffusion_generate(model, ids, config, steps=2, alg="maskgit_plus", top_k=None), expected)
    model.config = SimpleNamespace(mask_token_id=MASK, max_position_embeddings=17)
    with pytest.warns(UserWarning, match="max_length"):
        assert dream.diffusion_generate(model, ids, steps=2).shape == (3, 17)
    assert dream.diffusion_generate(model, ids, steps=2, max_length=20).shape == (3, 20)
    assert dream.diffusion_generate(model, ids, steps=2, max_length=8, num_return_sequences=2).shape == (6, 8)
    with pytest.warns(UserWarning, match="padding"):
        dream.diffusion_generate(model, torch.tensor([[3, 1]]), steps=1, max_new_tokens=2, pad_token_id=3)

    class Model(TinyLM, dream.DreamGenerationMixin):
        pass

    model.diffusion_generate = types.MethodType(dream.diffusion_generate, model)
    for bound in (model, Model()):
        assert torch.equal(bound.diffusion_generate(ids, config), found)


def test_refusals():
    model, ids = TinyLM(), inputs()
    for options, error, word in (
        (dict(), ValueError, "mask_token_id"),
        (dict(mask_token_id=MASK, max_length=5), ValueError, "no room"),
        (dict(mask_token_id=MASK, max_new_tokens=5, alg="best"), ValueError, "alg must"),
        (dict(mask_token_id=MASK, max_new_tokens=5, alg="entropy", alg_temp=-0.1), ValueError, "alg_temp"),
        (dict(mask_token_id=MASK, max_new_tokens=5, do_sample=True), TypeError, "do_sample"),
        (dict(mask_token_id=MASK, max_new_tokens=5, seed=1, compat=True), ValueError, "exclude"),
    ):
        with pytest.raises(error, match=word):
            dream.diffusion_generate(model, ids, **options)
    with pytest.raises(ValueError, match="inputs"):
        dream.diffusion_generate(model)
