"""SDAR's drop-in against the published loop, written out here in eager PyTorch."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from tiny_lm import Cache, TinyLM

from genfast.dropin import sdar

MASK, EOS = 39, 38
FILTERS = [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}]


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    """transformers' cache, which the drop-in imports, in the form of the small model's."""
    module = types.ModuleType("transformers.cache_utils")
    module.DynamicCache = Cache
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", module)


def prompts(*lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOS, (1, n), generator=draw) for n in lengths]


def draw(logits, temperature, top_k=0, top_p=1.0):
    shape, logits = logits.shape[:-1], logits.reshape(-1, logits.shape[-1])
    if temperature <= 0:  # of the later releases
        p = F.softmax(logits, dim=-1)
        token = logits.argmax(-1, keepdim=True)
        return token.view(shape), p.gather(-1, token).view(shape), p.view(*shape, -1)
    if temperature != 1.0:
        logits = logits / temperature
    if top_k > 0:
        logits = torch.where(logits < torch.topk(logits, top_k)[0][..., -1, None], -torch.inf, logits)
    if top_p < 1.0:
        ordered, index = torch.sort(logits, descending=True)
        remove = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        logits = logits.masked_fill(torch.scatter(torch.zeros_like(remove), -1, index, remove), -torch.inf)
    p = F.softmax(logits, dim=-1)
    token = torch.multinomial(p, num_samples=1)
    return token.view(shape), p.gather(-1, token).view(shape), p.view(*shape, -1)


def choose(name, confidence, entropy, mask, n, threshold, bound, first_release):
    """One row's choice; the later releases look at masked positions only."""
    chosen = torch.zeros_like(mask)
    if name == "sequential":
        if first_release:
            start = int(mask.nonzero()[:, 0].min())
            chosen[start : start + n] = True
        else:
            chosen[mask.nonzero()[:n, 0]] = True
        return chosen
    if name == "entropy_bounded":
        values, order = torch.sort(entropy[mask], stable=True)
        k = max(int(torch.searchsorted(torch.cumsum(values, 0), torch.tensor(bound))), 1)
        chosen[mask.nonzero()[order[:k], 0]] = True
        return chosen
    confidence = torch.where(mask, confidence, -torch.inf)
    high = confidence > threshold
    if name == "low_confidence_dynamic" and high.sum() >= n:
        return high
    if first_release:
        chosen[torch.topk(confidence, n)[1]] = True
    else:
        chosen[confidence.sort(descending=True, stable=True).indices[: min(n, int(mask.sum()))]] = True
    return chosen


def published(
    model, ids, length, block, steps, name, temperature=1.0, threshold=0.85, bound=0.35, stop=None,
    first_release=False, **filters,
):  # fmt: skip
    size = ids.shape[1]
    blocks = (size + length + block - 1) // block
    cache = Cache()
    mask = torch.tril(torch.ones(blocks, blocks)).repeat_interleave(block, 0).repeat_interleave(block, 1)[None]
    places = torch.arange(blocks * block)[None]
    x = torch.full((1, blocks * block), MASK)
    x[:, :size] = ids
    before = size // block * block
    common = dict(past_key_values=cache, use_cache=True)
    if before:
        model(x[:, :before], attention_mask=mask[:, :before, :before], position_ids=places[:, :before], **common)
    share = [block // steps + (i < block % steps) for i in range(steps)]
    for k in range(size // block, blocks):
        part = slice(k * block, (k + 1) * block)
        options = dict(attention_mask=mask[:, part, : part.stop], position_ids=places[:, part], **common)
        now = x[:, part].clone()
        for step in range(block + 1):
            masked = now == MASK
            if not masked.any():
                model(now, **options, store_kv=True)
                break
            logits = model(now, **options, store_kv=False).logits
            x0, confidence, p = draw(logits, temperature, **filters)
            entropy = -torch.special.xlogy(p, p).sum(-1)
            n = share[step] if step < steps else share[-1]
            chosen = choose(name, confidence[0], entropy[0], masked[0], n, threshold, bound, first_release)
            now[0, chosen] = x0[0, chosen]
        x[:, part] = now
        if stop is not None and any(s in x[:, size:] for s in stop):
            break
    return x


def both(ids, length, block, steps, name, *, compat=False, stop=None, model=None, **options):
    model = model or NoMask()
    torch.manual_seed(4)
    expected = published(model, ids, length, block, steps, name, stop=stop, first_release=compat, **options)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    renamed = {{"threshold": "confidence_threshold", "bound": "eb_threshold"}.get(k, k): v for k, v in options.items()}
    found = sdar.block_diffusion_generate(
        model, {"input_ids": ids}, MASK, length, block, steps, remasking_strategy=name, stopping_criteria_idx=stop,
        compat=compat, **renamed,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), after)
    return expected, found


class NoMask(TinyLM):
    """Does not draw the mask."""

    def forward(self, ids, **options):
        found = super().forward(ids, **options)
        found.logits[..., MASK] = -torch.inf
        return found


@pytest.mark.parametrize("name", sdar.STRATEGIES)
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("filters", FILTERS)
def test_tokens_are_the_published_ones(name, temperature, filters):
    for ids in prompts(6, 8, 3):
        for block, steps in ((4, 4), (5, 2)):
            expected, found = both(ids, 11, block, steps, name, temperature=temperature, threshold=0.5, **filters)
            assert torch.equal(found, expected)
            assert torch.equal(found[:, : ids.shape[1]], ids) and found.shape[1] % block == 0


@pytest.mark.parametrize("name", sdar.STRATEGIES[:3])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_compat_is_the_first_releases(name, temperature):
    changed = 0
    for ids in prompts(6, 8, 3, 11):
        expected, found = both(ids, 11, 6, 2, name, temperature=temperature, threshold=0.5, compat=True)
        assert torch.equal(found, expected)
        changed += int((found[:, : ids.shape[1]] != ids).sum())
    # The oddity: with one mask left and three to choose, tokens of the prompt are overwritten.
    assert changed > 0 or name == "sequential"


def test_stops():
    class Ends(NoMask):
        def forward(self, ids, position_ids=None, **options):
            found = super().forward(ids, position_ids=position_ids, **options)
            found.logits[..., EOS] = torch.where(position_ids == 12, 50.0, -torch.inf)
            return found

    ids = prompts(6)[0]
    ids[0, -1] = EOS  # in the prompt it stops nothing
    expected, found = both(ids, 30, 4, 4, "sequential", temperature=0.0, stop=[2000, EOS], model=Ends())
    assert torch.equal(found, expected) and found[0, 12] == EOS
    assert (found[:, 16:] == MASK).all() and not (found[:, :16] == MASK).any()
    batch = torch.cat(prompts(6, 6))
    several = sdar.block_diffusion_generate(
        Ends(), {"input_ids": batch}, MASK, 30, 4, 4, 0.0, remasking_strategy="sequential", stopping_criteria_idx=[EOS]
    )
    for row, one in zip(several, batch):
        alone, _ = both(one[None], 30, 4, 4, "sequential", temperature=0.0, stop=[EOS], model=Ends())
        assert torch.equal(row, alone[0])


@pytest.mark.parametrize("filters", [*FILTERS, {"top_k": 2, "top_p": 0.7}])
def test_a_seeded_draw_is_of_the_filtered_distribution(filters):
    """Chi-square, at most 4 degrees, at 1e-6."""
    row = torch.tensor([0.3, -1.0, 1.2, 0.0, 2.0, -torch.inf])

    class Constant(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, **options):
            return types.SimpleNamespace(logits=row.expand(*ids.shape, -1))

    state = torch.get_rng_state()
    found = sdar.block_diffusion_generate(
        Constant(), {"input_ids": torch.zeros(1000, 5).long()}, 5, 35, 5, 5, 0.8, remasking_strategy="sequential",
        seed=3, **filters,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    p = sdar.probabilities(row, 0.8, filters.get("top_k"), filters.get("top_p"))[0]
    expected = p.double()[:5] * 35000
    counts = torch.bincount(found[:, 5:].reshape(-1), minlength=5).double()
    kept = expected > 0
    assert (counts[~kept] == 0).all()
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 33.4


def test_helpers():
    assert sdar.get_num_transfer_tokens(8, 3).tolist() == [3, 3, 2]
    logits = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0)) * 3
    for options in (dict(temperature=0.0), dict(temperature=0.7, top_k=5, top_p=0.9), dict()):
        torch.manual_seed(0)
        expected = draw(logits, **{"temperature": 1.0, **options})[:2]
        torch.manual_seed(0)
        for a, b in zip(sdar.sample_with_temperature_topk_topp(logits, **options), expected):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_refusals(monkeypatch):
    model, ids = TinyLM(), prompts(6)[0]
    for options, word in (
        (dict(remasking_strategy="best"), "remasking_strategy"),
        (dict(seed=1, compat=True), "exclude"),
        (dict(compat=True, remasking_strategy="entropy_bounded"), "compat"),
    ):
        with pytest.raises(ValueError, match=word):
            sdar.block_diffusion_generate(model, {"input_ids": ids}, MASK, **options)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="padded"):
        sdar.block_diffusion_generate(model, padded, MASK)

    class OnlyMask(TinyLM):
        def forward(self, ids, **options):
            found = super().forward(ids, **options)
            found.logits[..., MASK] = 100.0
            return found

    with pytest.raises(RuntimeError, match="mask token itself"):
        sdar.block_diffusion_generate(OnlyMask(), {"input_ids": ids}, MASK, 4, 4, 4, 0.0)
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    with pytest.raises(ImportError, match="transformers"):
        sdar.block_diffusion_generate(model, {"input_ids": ids}, MASK)
