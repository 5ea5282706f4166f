"""BD3-LM's published names on a stand-in for its class, against the formulas written out."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_peers import draw

from genfast.dropin import bd3lm as ours

SIZE, MASK, BLOCK = 9, 8, 4


class Backbone(torch.nn.Module):
    """One layer of attention, causal over blocks, with a store of its own for the keys of finished blocks."""

    def __init__(self, size=SIZE, block=BLOCK, width=8):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.ids, self.head, self.places = (
            torch.randn(*shape, generator=g, dtype=torch.float64)
            for shape in ((size, width), (width, size), (64, width))
        )
        self.block, self.store, self.calls, self.cached = block, None, [], False

    def reset_kv_cache(self, eval_batch_size):
        self.store, self.cached = None, True

    def forward(self, x, sigma, sample_mode=False, store_kv=False):
        assert sample_mode and sigma.shape == (len(x),) and (sigma == 0).all()
        before = 0 if self.store is None else self.store.shape[1]
        self.calls.append((before, x.shape[1], store_kv))
        places = torch.arange(before, before + x.shape[1])
        h = self.ids[x] + self.places[places]
        keys = h if self.store is None else torch.cat([self.store, h], 1)
        if store_kv:
            self.store = keys
        seen = torch.arange(keys.shape[1]) // self.block <= (places // self.block)[:, None]
        scores = (h @ keys.transpose(1, 2) / 3).masked_fill(~seen, -torch.inf)
        return (torch.tanh(h + scores.softmax(-1) @ keys) @ self.head).float()


class Noise(torch.nn.Module):
    sigma_max = -torch.log(torch.tensor(1e-3))

    def forward(self, t):
        return -1 / t, t


class Diffusion:
    """What the functions ask of BD3-LM's class."""

    dtype, device, parameterization = torch.float32, "cpu", "subs"

    def __init__(
        self, backbone=None, first_hitting=True, nucleus=1.0, cache=False, varied=False, block=BLOCK, mask=MASK
    ):
        self.backbone = Backbone(block=block) if backbone is None else backbone
        self.noise, self.mask_index, self.block_size = Noise(), mask, block
        self.tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=0)
        self.config = SimpleNamespace(
            algo=SimpleNamespace(name="bd3lm"),
            loader=SimpleNamespace(eval_batch_size=1),
            model=SimpleNamespace(length=1024),
            sampling=SimpleNamespace(first_hitting=first_hitting, nucleus_p=nucleus, kv_cache=cache, var_length=varied),
        )

    def _sigma_from_p(self, p):
        return torch.min(-torch.log(1 - p), self.noise.sigma_max)

    def _process_sigma(self, sigma):
        return torch.zeros_like(sigma.mean(-1))


def probabilities(diffusion, x):
    """float64 p(x0) of the last block after SUBS and the nucleus."""
    size, mask = diffusion.block_size, diffusion.mask_index
    logits = diffusion.backbone(x, torch.zeros(len(x)), sample_mode=True)[:, -size:]
    logits[..., mask] -= 1e6
    logp = logits - logits.logsumexp(-1, keepdim=True)
    p = logp.double().exp()
    limit = diffusion.config.sampling.nucleus_p
    if limit < 1:
        ordered, order = p.sort(-1, descending=True)
        keep = ordered.cumsum(-1) <= limit
        keep[..., 0] = True
        p = torch.zeros_like(p).scatter(-1, order, ordered * keep)
        p = p / p.sum(-1, keepdim=True)
    return p


def published(diffusion, steps, strides, context=1024):
    """The published loop of one row, with its grid of times; draws from torch's and NumPy's default generators."""
    size, mask = diffusion.block_size, diffusion.mask_index
    text, changes = torch.empty(1, 0, dtype=torch.int64), 0
    for stride in range(strides):
        text = torch.cat([text, torch.full((1, size), mask)], 1)
        if stride == 0:
            text[:, 0] = 0
        first = max(text.shape[1] - context, 0)
        times = torch.linspace(1, 0, steps)
        for i in range(steps):
            block = text[:, -size:]
            masked = block == mask
            if not masked.any():
                break
            if diffusion.config.sampling.first_hitting:
                np.random.rand()
            p = probabilities(diffusion, text[:, first:])
            if diffusion.config.sampling.first_hitting:
                drawn = draw(p, torch.rand(p.shape, dtype=torch.float64))
                place = masked.nonzero()[torch.randint(0, int(masked.sum()), (1,)), 1]
                active = torch.arange(size) == place
            else:
                stays = (times[i] - 1 / steps) / times[i]
                p = p * (1 - stays)
                p[..., mask] = stays
                drawn, active = draw(p, torch.rand(p.shape, dtype=torch.float64)), masked
            new = torch.where(masked & active, drawn, block)
            changes += int((new != block).any())
            text = torch.cat([text[:, :-size], new], 1)
    return text, changes


@pytest.mark.parametrize("nucleus", [1.0, 0.8])
@pytest.mark.parametrize("cache", [False, True])
@torch.no_grad()
def test_a_seeded_first_hitting_run_gives_the_published_tokens(nucleus, cache):
    torch.manual_seed(1), np.random.seed(1)
    expected, changes = published(Diffusion(nucleus=nucleus), 10, 4)
    diffusion = Diffusion(nucleus=nucleus, cache=cache)
    torch.manual_seed(1), np.random.seed(1)
    found, steps = ours._semi_ar_sampler(diffusion, 1, 10, 4, 16)
    assert torch.equal(found, expected) and steps == changes == 15
    assert not (found == MASK).any()
    if cache:
        assert all(count == BLOCK for _, count, _ in diffusion.backbone.calls)
        assert [before for before, _, stored in diffusion.backbone.calls if stored] == [0, 4, 8, 12]


@pytest.mark.parametrize("nucleus", [1.0, 0.8])
@torch.no_grad()
def test_compat_divides_by_zero_as_published(nucleus):
    """With few steps much is still masked at the last one, which the published code fills with one id."""
    torch.manual_seed(2)
    expected, changes = published(Diffusion(first_hitting=False, nucleus=nucleus), 2, 6)
    torch.manual_seed(2)
    diffusion = Diffusion(first_hitting=False, nucleus=nucleus)
    found, steps = ours._semi_ar_sampler(diffusion, 1, 2, 6, 24, compat=True)
    assert torch.equal(found, expected) and steps == changes
    torch.manual_seed(2)
    better, _ = ours._semi_ar_sampler(diffusion, 1, 2, 6, 24)
    assert not torch.equal(better, expected) and not (better == MASK).any()
    with pytest.raises(ValueError, match="leave out seed"):
        ours._semi_ar_sampler(diffusion, 1, 2, 6, 24, seed=1, compat=True)


@torch.no_grad()
def test_law_of_the_corrected_steps():
    """20000 first tokens of three steps have the model's law: five standard errors."""

    def model(x, sigma, sample_mode, store_kv):
        return law.log().expand(*x.shape, 4).contiguous()

    law = torch.tensor([0.5, 0.3, 0.2, 0.7])  # the last is the mask's and not read
    diffusion = Diffusion(model, first_hitting=False, mask=3)
    found, _ = ours._semi_ar_sampler(diffusion, 20000, 3, 1, 4, seed=1)
    for token in range(3):
        share = float((found[:, 1] == token).double().mean())
        assert abs(share - float(law[token])) < 5 * (float(law[token]) * (1 - float(law[token])) / 20000) ** 0.5


@pytest.mark.parametrize("first_hitting", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_rows_of_a_batch(first_hitting, cache):
    """Seeded in the kernel a row does not depend on its batch; without a seed batches work too."""

    def run(count, **options):
        diffusion = Diffusion(first_hitting=first_hitting, cache=cache, nucleus=0.9)
        return ours._semi_ar_sampler(diffusion, count, 6, 3, 12, **options)[0]

    whole = run(4, seed=5)
    assert torch.equal(run(2, seed=5, offset=1), whole[1:3]) and not (whole == MASK).any()
    assert not torch.equal(whole[0], whole[1]) and (whole[:, 0] == 0).all()
    assert not (run(3) == MASK).any()
    drawn = [run(2, seed=torch.Generator().manual_seed(n)) for n in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_cached_is_uncached():
    a, b = (ours._semi_ar_sampler(Diffusion(cache=c), 3, 6, 4, 16, seed=5)[0] for c in (True, False))
    assert torch.equal(a, b)


@torch.no_grad()
def test_the_context_is_bounded():
    diffusion = Diffusion()
    torch.manual_seed(3), np.random.seed(3)
    expected, _ = published(diffusion, 6, 4, context=8)
    diffusion.backbone.calls.clear()
    torch.manual_seed(3), np.random.seed(3)
    assert torch.equal(ours._semi_ar_sampler(diffusion, 1, 6, 4, 16, context_size=8)[0], expected)
    assert {count for _, count, _ in diffusion.backbone.calls} == {4, 8}


@torch.no_grad()
def test_what_the_model_said_is_kept_while_nothing_changes():
    diffusion = Diffusion(first_hitting=False)
    x = torch.full((2, BLOCK), MASK)
    t = torch.full((2, 1), 0.9)
    for seed in range(50):
        kept, same = ours._ddpm_caching_update(diffusion, x, t, 0.01, seed=seed)
        if kept is not None:
            break
    assert torch.equal(same, x)
    calls = len(diffusion.backbone.calls)
    again = ours._ddpm_caching_update(diffusion, x, t, 0.9, kept, seed=1)
    assert again[0] is None and (again[1] != MASK).all() and len(diffusion.backbone.calls) == calls
    p = kept.probabilities(x, torch.float64)
    assert p.dtype == torch.float64
    given = ours._ddpm_caching_update(diffusion, x, t, 0.9, p.float(), seed=1)
    assert torch.equal(given[1], again[1])


@torch.no_grad()
def test_other_algorithms_go_through_forward():
    diffusion = Diffusion()
    diffusion.config.algo.name = "sar"
    diffusion.forward = lambda x, sigma, sample_mode, store_kv: diffusion.backbone(
        x, torch.zeros(len(x)), sample_mode, store_kv
    ).log_softmax(-1)
    a = ours._semi_ar_sampler(diffusion, 2, 6, 2, 8, seed=1)[0]
    assert torch.equal(a, ours._semi_ar_sampler(Diffusion(), 2, 6, 2, 8, seed=1)[0])


@torch.no_grad()
def test_mdlm_slides_half_a_window():
    mask, seen = 200, []

    def forward(x, sigma, sample_mode, store_kv):
        seen.append(x.clone())
        return torch.zeros(*x.shape, mask + 1)

    diffusion = Diffusion(lambda *_: None, first_hitting=False, block=1024, mask=mask)
    diffusion.config.algo.name, diffusion.config.model.length, diffusion.forward = "mdlm", 2048, forward
    text, _ = ours._semi_ar_sampler(diffusion, 1, 2, 99, 2048, seed=0)
    assert text.shape == (1, 2048) and not (text == mask).any()
    for k, first in enumerate((0, 512, 1024)):
        kept = 512 if k else 1
        start = next(
            x for x in seen if (x[:, :kept] != mask).all() and (x[:, kept:] == mask).all() and x.shape[1] == 1024
        )
        assert torch.equal(start[:, :kept], text[:, first : first + kept])
        seen = seen[[x is start for x in seen].index(True) + 1 :]


def test_nucleus():
    diffusion = Diffusion(nucleus=0.7)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(1, 6, 4).clone()
    before = p.clone()
    found = ours._nucleus_sample(diffusion, p)
    assert found is p and torch.equal(p[:, :2], before[:, :2])  # only the last block
    assert (found[:, 2:] == torch.tensor([1.0, 0, 0, 0])).all()
    diffusion.config.sampling.nucleus_p = 0.81
    assert torch.allclose(ours._nucleus_sample(diffusion, before.clone())[:, 2:], torch.tensor([0.625, 0.375, 0, 0]))
    diffusion.config.sampling.nucleus_p = 1.0
    assert torch.equal(ours._nucleus_sample(diffusion, before.clone()), before)


def test_where_texts_end():
    varied, fixed = Diffusion(varied=True), Diffusion()
    rich = torch.arange(1, 301)[None]
    assert ours._check_stop_conds(fixed, rich) == (False, rich) and not ours._check_stop_conds(varied, rich)[0]
    poor = rich.clone()
    poor[:, -256:] = 7
    assert ours._check_stop_conds(fixed, poor)[0] and ours._check_stop_conds(fixed, poor)[1] is poor
    stop, cut = ours._check_stop_conds(varied, poor)
    assert stop and torch.equal(cut, poor[:, :44])
    ended = rich.clone()
    ended[:, [0, 120, 200]] = 0  # begins with the end of sequence, as GPT-2's texts do
    assert not ours._check_stop_conds(fixed, ended)[0]
    stop, cut = ours._check_stop_conds(varied, ended)
    assert stop and torch.equal(cut, ended[:, :121])
    once = rich.clone()
    once[:, 0] = 0
    assert not ours._check_stop_conds(varied, once)[0]
    assert not ours._check_stop_conds(varied, torch.cat([ended, once]))[0]
    stop, both = ours._check_stop_conds(varied, torch.cat([ended, poor]))
    assert stop and both.shape == (2, 121) and (both[1, 44:] == 0).all() and torch.equal(both[1, :44], poor[0, :44])
    counts = torch.tensor([2, 1, 1]).double() / 4
    assert float(ours._compute_entropy(fixed, torch.tensor([[1, 1], [2, 3]]))) == pytest.approx(
        -float((counts * counts.log()).sum())
    )
    assert math.log(300) > ours.LEAST_ENTROPY


@pytest.mark.parametrize(
    "block, varied, compat, length",
    [(64, False, False, None), (64, True, False, 64), (1, True, False, 1), (1, True, True, None)],
)
@torch.no_grad()
def test_degenerate_texts(block, varied, compat, length):
    """Tokens of many kinds and then one kind only: given up, or cut before the last 256."""

    def model(x, sigma, sample_mode, store_kv):
        logits = torch.zeros(*x.shape, 201)
        if x.shape[1] > 220:
            logits[..., 3] = 50.0
        return logits

    diffusion = Diffusion(model, varied=varied, block=block, mask=200, first_hitting=False)
    diffusion.tokenizer.eos_token_id = -1
    text, steps = ours._semi_ar_sampler(diffusion, 1, min(block, 2), 320 // block, 320, compat=compat)
    assert (text is None) == (steps is None) == (length is None)
    if length == 64:
        assert text.shape == (1, 64) and (text != 200).all()
    elif length:
        assert 1 < text.shape[1] < 64
