"""The demo with text: end to end, and its parts."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

image = pytest.importorskip("PIL.Image", reason="the demo needs pillow")

from genfast import demo, generate_llada  # noqa: E402
from genfast.demo import text  # noqa: E402
from genfast.demo.text import data, eager, pictures  # noqa: E402
from genfast.demo.text.data import ALPHABET, MASK, VOCABULARY, decode, encode, load_corpus, paragraphs  # noqa: E402
from genfast.demo.text.network import LENGTH, Network, log_score  # noqa: E402
from genfast.demo.text.optimizer import orthogonal  # noqa: E402
from genfast.demo.text.quality import bits_per_character, known_words, simpler_models  # noqa: E402
from genfast.demo.text.train import fast_bfloat16, train  # noqa: E402
from genfast.demo.text.transformer import Answer  # noqa: E402

TITLES = ["LLaDA", "SEDD", "MDLM", "block diffusion"]
FILES = ["llada", "sedd", "mdlm", "block_diffusion"]


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def network():
    """With random weights everywhere, so that every character matters to every other."""
    torch.manual_seed(3)
    net = Network(width=32, layers=2, heads=2).eval()
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    return net


@pytest.fixture(scope="module")
def untied(network):
    """The network, with something of its own at every position: where all is masked, many would have the same to say,
    and it is not said which of equals ``topk`` takes."""
    table = torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(7))

    def model(ids, position_ids=None, **options):
        answer = network(ids, position_ids=position_ids, **options)
        places = torch.arange(ids.shape[1]) if position_ids is None else position_ids
        return Answer(answer.logits + table[places], answer.past_key_values)

    return model


def some_ids(*shape, seed=0):
    return torch.randint(MASK, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_corpus(monkeypatch, corpus):
    monkeypatch.setattr(text, "load_corpus", lambda: corpus)


def test_quick_demo(tmp_path, capsys, small_corpus):
    arguments = ["--text", "--quick", "--steps", "300", "--prompt", "Return the", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    bits = {name: float(value) for name, value in re.findall(r"^  (\w.*?)  +(\d\.\d\d)$", said, re.MULTILINE)}
    whole, blocks = bits["whole texts (LLaDA, SEDD, MDLM)"], bits["blocks of 16 (block diffusion)"]
    # Thirty steps have begun to look at neighbours.
    assert 2 < whole < bits["characters' frequencies"] and 2 < blocks < bits["characters' frequencies"]
    numbers = r"^(\w.*?) +(\d+) +([\d,]+) +([\d,]+) +(\d+)% +\d+% +\d+ +\d+ +[\d.]+x +([\d.]+) +([\d.]+)$"
    rows = re.findall(numbers, said, re.MULTILINE)
    assert [row[0] for row in rows] == TITLES
    for _, calls, fused, plain, share, ours, theirs in rows:
        assert 0 < int(calls) <= 40 and int(share) > 10
        assert int(fused.replace(",", "")) > 0 and int(plain.replace(",", "")) > 0
        assert 0 <= float(ours) <= 1 and 0 <= float(theirs) <= 1
    for name in FILES:
        written = (tmp_path / f"{name}.txt").read_text()
        assert set(written) <= set(ALPHABET) and written.count("return the") >= 4
    panels = [pictures.Panel(title, ["x" * LENGTH] * text.SHOWN, [[1] * LENGTH] * text.SHOWN, 1) for title in TITLES]
    picture = image.open(tmp_path / "unmasking.png")
    assert picture.size == pictures.size(panels)
    assert len(picture.getcolors(1 << 20)) > 40


def test_prompts_that_cannot_be_continued(capsys):
    for prompt, said in (("été", "does not know 'é'"), ("x" * LENGTH, "at most 63 characters")):
        with pytest.raises(SystemExit):
            demo.main(["--text", "--prompt", prompt])
        assert said in capsys.readouterr().err
    for arguments in (["--prompt", "x"], ["--text", "--guidance", "2"], ["--text", "--steps", "0"]):
        with pytest.raises(SystemExit):
            demo.main(arguments)
        assert arguments[-2] in capsys.readouterr().err


def test_a_machine_without_text(monkeypatch, capsys):
    def nothing():
        raise data.NoText("there is none")

    monkeypatch.setattr(text, "load_corpus", nothing)
    assert demo.main(["--text"]) == 2
    assert "there is none" in capsys.readouterr().err


def test_paragraphs_are_prose():
    source = """Compute the Mean  of
    all values.

    >>> mean([1, 2])  # an example, which is no prose
    1.5

    name        what is in a table is left out as well
    x: int = 3; y[2:] == {z ** 5}

    Short one.

    Another paragraph, (with brackets) and a number 7.
    """
    source = inspect.cleandoc(source)
    assert paragraphs(source) == [
        "compute the mean of all values.",
        "another paragraph, (with brackets) and a number 7.",
    ]
    assert decode(encode(ALPHABET)) == ALPHABET and len(ALPHABET) + 1 == VOCABULARY
    assert decode(torch.tensor([3, MASK])) == "b\N{LIGHT SHADE}"


def test_corpus_is_deterministic_and_disjoint(tmp_path, corpus):
    for i in range(26):
        body = "\n\n".join(f"Paragraph {j} of the document {chr(97 + i)} {'is about something ' * 3}" for j in range(9))
        (tmp_path / f"{chr(97 + i)}.py").write_text(f'"""{body}\n\nThis paragraph is in all the documents."""\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text('"""Never seen: documentation of a test of something."""')
    first, second = load_corpus(tmp_path), load_corpus(tmp_path)
    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)
    both = decode(first.train) + decode(first.held_out)
    assert both.count("this paragraph is in all the documents") == 1 and "never seen" not in both
    for found in (first, corpus):
        train_, held_out = (set(decode(part).split("\n")) - {""} for part in (found.train, found.held_out))
        assert train_ and held_out and not train_ & held_out
        assert found.documents[0] / found.documents[1] == pytest.approx(data.HELD_OUT - 1, rel=0.2)
    with pytest.raises(data.NoText, match="documentation strings"):
        load_corpus(tmp_path / "test")


def test_bits_of_an_untrained_network_and_of_a_trained_one(corpus):
    net = Network()
    net.head.weight.data.zero_()
    for blocks in (False, True):
        # Every character costs log2 of the alphabet, however many are masked: the weights add up to one.
        assert bits_per_character(net, corpus.held_out, blocks, windows=16) == pytest.approx(6, abs=1e-5)
    simple = simpler_models(corpus)
    assert list(simple.values())[:3] == sorted(list(simple.values())[:3], reverse=True)
    net = train(corpus, 30, 0, demo._progress, fast_bfloat16())
    for blocks in (False, True):
        assert 2 < bits_per_character(net, corpus.held_out, blocks, windows=32) < 4.6


def test_bound_of_a_model_that_knows_how_much_is_masked():
    """A network sure of a character with probability n / L when n of L are masked: the mean of -log2(n / L)."""

    class Sure(torch.nn.Module):
        def forward(self, ids):
            p = (ids == MASK).float().mean(1)[:, None, None].expand(*ids.shape, 1)
            logits = torch.full((*ids.shape, VOCABULARY), -torch.inf)
            logits[..., 5], logits[..., 6] = p[..., 0].log(), (1 - p[..., 0]).log()
            return Answer(logits, None)

    n = torch.arange(1, LENGTH + 1).double() / LENGTH
    found = bits_per_character(Sure(), torch.full((4096,), 5), False, windows=32, draws=LENGTH // 32)
    assert found == pytest.approx(-n.log2().mean().item(), rel=1e-5)


def test_training_is_deterministic(corpus):
    first, second = (train(corpus, 2, 5, demo._progress).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_orthogonal():
    for shape in ((24, 8), (8, 24), (8, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.5 and values.max() < 1.3


def test_padding_changes_nothing(network):
    ids = some_ids(2, 20)
    padded = torch.cat([torch.full((2, 5), MASK), ids], 1)
    seen = torch.ones(2, 25, dtype=torch.int64)
    seen[:, :5] = 0
    position = (torch.arange(25) - 5).clamp_min(0).expand(2, -1)
    found = network(padded, attention_mask=seen, position_ids=position).logits[:, 5:]
    torch.testing.assert_close(found, network(ids).logits, rtol=1e-4, atol=1e-4)


def test_score_is_the_ratio_of_the_marginals(network):
    """p_sigma(y) / p_sigma(mask) of a character that was y with p(y) and is masked with probability 1 - e^-sigma."""
    ids = torch.full((2, 8), MASK)
    sigma = torch.tensor([0.3, 2.0])
    score = log_score(network)(ids, sigma).exp()
    p, kept = network(ids).logits.softmax(-1), torch.exp(-sigma)[:, None, None]
    torch.testing.assert_close(score[..., :MASK], (p * kept / (1 - kept))[..., :MASK])
    assert (score[..., MASK] == 1).all()
    # Summed over y, the time reversal says with what probability a mask goes: 1 - m_s / m_t.
    back = 0.1
    moved = (torch.exp(torch.tensor(back)) - 1) * score[..., :MASK].sum(-1)
    m = -torch.expm1(-torch.stack([sigma, sigma - back]))
    torch.testing.assert_close(moved, (1 - m[1] / m[0])[:, None].expand(2, 8))


def test_eager_llada_is_the_fused_sampler(untied):
    prompt = some_ids(3, 4)
    x = torch.cat([prompt, torch.full((3, 28), MASK)], 1)
    for temperature in (0.0, 1.0):
        draws = [torch.Generator().manual_seed(2) for _ in range(2)]
        ours = generate_llada(
            untied,
            prompt,
            gen_length=28,
            block_length=28,
            steps=9,
            temperature=temperature,
            mask_id=MASK,
            generator=draws[0],
        )
        with torch.no_grad():
            theirs = eager.llada(untied, x, 4, 9, temperature, draws[1])
        assert torch.equal(ours.tokens, theirs)


@pytest.mark.parametrize("entry", text.entries(), ids=lambda e: e.file)
def test_samplers_fill_every_mask_and_keep_the_prompt(entry, network):
    prompt = some_ids(2, 6)
    x = torch.cat([prompt, torch.full((2, 42), MASK)], 1)
    with torch.no_grad():
        found = entry.fused(entry.model(network), prompt, 42, 21, 3)
        other = entry.eager(entry.model(network), x, 6, 21, torch.Generator().manual_seed(1))
    for tokens in (found.tokens, other):
        assert torch.equal(tokens[:, :6], prompt) and not (tokens == MASK).any()
    assert found.order.shape == x.shape and found.order[:, 6:].min() >= 1 and found.order.max() <= found.steps


def test_eager_blocks_are_the_fused_sampler(untied, monkeypatch):
    """At temperature 0, where nothing is drawn."""
    monkeypatch.setitem(text.TEMPERATURE, "block_diffusion", 0.0)
    entry = next(e for e in text.entries() if e.file == "block_diffusion")
    for start, steps in ((1, 40), (20, 128), (0, 17)):
        prompt = some_ids(3, start)
        x = torch.cat([prompt, torch.full((3, 64 - start), MASK)], 1)
        ours = entry.fused(untied, prompt, 64 - start, steps, 0).tokens
        with torch.no_grad():
            assert torch.equal(ours, entry.eager(untied, x, start, steps, None))


@pytest.mark.parametrize("entry", [e for e in text.entries() if e.file in ("sedd", "mdlm")], ids=lambda e: e.file)
def test_eager_and_fused_follow_the_same_law(entry):
    """Characters of a network that says the same everywhere: chi-square, a false alarm of 1e-4 each at other seeds."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    temperature = text.TEMPERATURE[entry.file]

    def constant(ids, past_key_values=None, **_):
        logits = torch.full((*ids.shape, VOCABULARY), -torch.inf)
        logits[..., :4] = p.log() * temperature
        return Answer(logits, None)

    rows, room = 64, 32
    prompt, masks = torch.zeros(rows, 0, dtype=torch.int64), torch.full((rows, room), MASK)
    model = entry.model(constant)
    with torch.no_grad():
        found = entry.fused(model, prompt, room, 8, 11).tokens
        other = entry.eager(model, masks, 0, 8, torch.Generator().manual_seed(12))
    for tokens in (found, other):
        counts = torch.bincount(tokens.flatten(), minlength=4)[:4].double()
        chi = ((counts - rows * room * p) ** 2 / (rows * room * p)).sum().item()
        assert counts.sum() == rows * room and chi < 21.1


def test_pictures(tmp_path):
    panels = [pictures.Panel("one", ["abc\n" * 30] * 2, [[0] * 4 + list(range(1, 117))] * 2, 116)]
    pictures.draw(panels, tmp_path / "x.png")
    picture = image.open(tmp_path / "x.png").convert("RGB")
    assert picture.size == pictures.size(panels)
    top = pictures.MARGIN + 2 * pictures.CAPTION
    at = [
        picture.getpixel((pictures.MARGIN + i % 64 * pictures.CELL, top + i // 64 * pictures.LINE)) for i in (0, 4, 119)
    ]
    assert at == [pictures.PROMPT, pictures.COLOURS[0], pictures.COLOURS[-1]]
    assert pictures.colour(0.5) == tuple(round((a + b) / 2) for a, b in zip(*pictures.COLOURS[1:3]))


def test_known_words(corpus):
    assert known_words(["return the value zzzqqq cut"], corpus) == pytest.approx(14 / 20)
    assert known_words(["the thr", ""], corpus) == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", {"PIL": "pillow", "no_such_module": "no-such-package"})
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda module: None)
    assert demo.main(["--text"]) == 2
    said = capsys.readouterr().err
    assert "pip install pillow" in said and "no-such-package" not in said
