"""The demo with a codebook: end to end, and its parts."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
image = pytest.importorskip("PIL.Image", reason="the demo needs pillow")

from genfast import demo  # noqa: E402
from genfast.demo import vq  # noqa: E402
from genfast.demo.data import CLASSES, load_digits  # noqa: E402
from genfast.demo.vq import autoencoder, eager, pictures, prior, times  # noqa: E402
from genfast.demo.vq.autoencoder import CODES, Autoencoder, perplexity, psnr  # noqa: E402
from genfast.demo.vq.prior import LENGTH, Choice, Kept, Prior  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def stage_one(digits):
    return autoencoder.train(digits, 80, 0, demo._progress)


@pytest.fixture(scope="module")
def untrained():
    """With random weights everywhere, so that every code matters to those after it."""
    torch.manual_seed(3)
    net = Prior(width=32, layers=2, heads=2).eval()
    for p in net.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape)
    return net


def test_quick_demo(tmp_path, capsys):
    arguments = ["--vq", "--quick", "--steps", "200", "--samples", "8", "--top-k", "20", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("squared error", "nats per code"):
        first, last = map(float, re.search(rf"{name} ([\d.]+) -> ([\d.]+)", said).groups())
        assert last < 0.8 * first
    back, mean = map(float, re.search(r"PSNR ([\d.]+) dB \(.*: ([\d.]+) dB", said).groups())
    assert back > mean + 5
    bits, alone = map(float, re.search(r"held-out code ([\d.]+) \(.* alone ([\d.]+)\)", said).groups())
    assert bits < alone - 0.5
    rows = re.findall(r"^(.+?) +[\d.]+ +\([\d.]+\) +[\d.]+ +\([\d.]+\) +[\d.]+x(( +[\d.]+){6})$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["all codes", "top-k 20", "top-p 0.95", "both", "both, guidance 1.5"]
    accuracy = [[float(number) for number in row[1].split()[:2]] for row in rows]
    # Chance has 0.1; sixty steps have begun to tell the classes apart.
    assert min(map(min, accuracy)) > 0.12 and np.mean(accuracy) > 0.2
    assert re.search(r"^a draw with top-k 2000 .* [\d.]+x$", said, re.MULTILINE)
    page = np.asarray(image.open(tmp_path / "vq.png"))
    assert page.ndim == 3 and page.std() > 40
    for colour in (pictures.BLUE, pictures.ORANGE):
        assert (page == colour).all(-1).sum() > 1000


def test_reconstructions(digits, stage_one):
    """They are better than one picture for all, and these codes than any; nearly all of them are used."""
    auto, errors = stage_one
    x = digits.held_out
    codes = auto.encode(x)
    assert codes.shape == (len(x), LENGTH) and codes.dtype == torch.int64
    found = psnr(auto.decode(codes), x)
    assert found > psnr(digits.train.mean(0, keepdim=True), x) + 6
    counts = vq.code_counts(auto.encode(digits.train))
    assert (counts > 0).sum() > 0.75 * CODES and perplexity(counts) > 20
    assert np.mean(errors[-10:]) < 0.3 * np.mean(errors[:10])
    # As many codes of the same spread, but anywhere.
    other = Autoencoder().eval()
    other.load_state_dict(auto.state_dict())
    noise = torch.randn(CODES, autoencoder.SIZE, generator=torch.Generator().manual_seed(1))
    other.codebook.copy_(auto.codebook.mean(0) + noise * auto.codebook.std(0))
    assert found > psnr(other.decode(other.encode(x)), x) + 3


def test_codebook_begins_with_kmeans(digits):
    torch.manual_seed(0)
    auto = Autoencoder().eval()
    auto.initialise_codes(digits.train, 0)
    assert auto.cluster_size.sum().item() == pytest.approx(autoencoder.BATCH * LENGTH, rel=1e-4)
    # Moving averages that agree with the codebook: a step without forgetting changes nothing but the smoothing.
    torch.testing.assert_close(auto.embed_avg / auto.cluster_size[:, None], auto.codebook, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        z = auto.encoder(digits.train)
    error = auto.quantize(z).commitment_loss
    assert error < 0.2 * z.var(dim=(0, 2, 3)).mean()


def test_training_is_deterministic(digits):
    runs = []
    for _ in range(2):
        auto, errors = autoencoder.train(digits, 9, 5, demo._progress)
        net, losses = prior.train(auto, digits, 2, 5, demo._progress)
        runs.append(({**auto.state_dict(), **net.state_dict()}, errors + losses))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][k], runs[1][0][k]) for k in runs[0][0])


def test_kept_keys_and_values_are_the_causal_mask(untrained):
    labels = torch.tensor([3, 7, CLASSES])
    codes = torch.randint(CODES, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    kept = [Kept(3, untrained.heads, untrained.head_dim) for _ in untrained.layers]
    joined = [partial(eager._attend_and_store, []) for _ in untrained.layers]
    with torch.no_grad():
        for attends in (kept, joined):
            logits = [untrained(labels, codes[:, :0], attends)]
            logits += [untrained(labels, codes[:, i : i + 1], attends, cached=i + 1) for i in range(LENGTH - 1)]
            p = torch.cat(logits, 1).log_softmax(-1).gather(-1, codes[..., None])
            torch.testing.assert_close(-p.mean(), untrained.loss(labels, codes), rtol=1e-5, atol=1e-6)


def test_classes_and_codes_matter(untrained):
    labels, codes = torch.tensor([3]), torch.zeros(1, LENGTH, dtype=torch.int64)
    with torch.no_grad():
        first = untrained.loss(labels, codes)
        assert untrained.loss(labels + 1, codes) != first
        other = codes.clone()
        other[0, 5] = 1
        assert untrained.loss(labels, other) != first


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_most_likely_codes_are_the_same_fused_and_eager(untrained, guidance):
    labels = torch.arange(CLASSES)
    choice = Choice(guidance, 1, None)
    ours, _ = prior.sample(untrained, labels, choice, 0)
    theirs, _ = eager.sample(untrained, labels, choice, torch.Generator().manual_seed(0))
    assert torch.equal(ours, theirs) and ours.shape == (CLASSES, LENGTH)
    assert len(ours.unique()) > 10


def test_draws_follow_the_same_law_fused_and_eager(untrained):
    """First codes under top-k, top-p and guidance: chi-square, a false alarm of 1e-4 each at other seeds."""
    labels = torch.full((2000,), 4)
    choice = Choice(1.5, 6, 0.5)
    with torch.no_grad():
        attends = [Kept(2, untrained.heads, untrained.head_dim) for _ in untrained.layers]
        logits = untrained(torch.tensor([4, CLASSES]), torch.zeros(2, 0, dtype=torch.int64), attends)[:, 0]
    p = eager.filtered(logits[1:] + 1.5 * (logits[:1] - logits[1:]), 6, 0.5).softmax(-1)[0]
    kinds = int((p > 0).sum())
    assert kinds > 2
    for codes, _ in (
        prior.sample(untrained, labels, choice, 11),
        eager.sample(untrained, labels, choice, torch.Generator().manual_seed(12)),
    ):
        counts, expected = vq.code_counts(codes[:, 0]), 2000 * p
        assert counts[p == 0].sum() == 0
        chi = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum().item()
        assert chi < {3: 18.4, 4: 21.1, 5: 23.5, 6: 25.7}[kinds]


def test_filters():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    for k, p, left in (
        (None, 0.6, [0, 2]),
        (None, 0.75, [0, 2, 3]),
        (1, None, [0]),
        (3, 0.6, [0, 2]),
        (9, None, [0, 1, 2, 3]),
    ):
        assert eager.filtered(logits, k, p)[0].isfinite().nonzero().flatten().tolist() == left


def test_quantiser_steps_agree():
    """With vectors so that no code dies, for whose place each draws in its own way."""
    g = torch.Generator().manual_seed(0)
    codebook = torch.randn(24, 8, generator=g)
    z = codebook[torch.arange(24).repeat(8).view(12, 4, 4)].movedim(-1, 1).contiguous()
    z = z + 0.1 * torch.randn(z.shape, generator=g)
    ours, theirs = times.fused_step(z, codebook, 0)(), times.eager_step(z, codebook, 0)()
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours[2], codebook)


def test_eager_quantiser_revives_dead_codes():
    codebook = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    sizes, sums = torch.tensor([4.0, 0.1]), codebook * torch.tensor([[4.0], [0.1]])
    z = torch.ones(2, 2, 2, 2)
    found = eager.quantize(z, codebook, 0.25)
    eager.ema_update_(codebook, sizes, sums, z, found.indices, 0.9, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(codebook[1], torch.ones(2)) and sizes[1] == 1 and found.perplexity.item() == pytest.approx(1)


def test_perplexity_and_psnr():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    x = torch.zeros(3, 1, 8, 8)
    assert psnr(x + 0.2, x) == pytest.approx(20)


def test_nearest(digits):
    assert vq.nearest(digits.train[:9], digits.train) == 0
    far = torch.cdist(digits.held_out.flatten(1), digits.train.flatten(1)).min(1).values.mean().item()
    assert vq.nearest(digits.held_out, digits.train) == pytest.approx(far, rel=1e-4)


def test_by_class():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8) / 4
    rows = pictures.by_class(images, torch.tensor([1, 0, 1, 1]), 2)[:, 0, 0, 0].tolist()
    assert rows == [0.25, -1, 0, 0.5] + [-1] * 16


def test_refused_arguments(capsys):
    for arguments, said in (
        (["--vq", "--text"], "not allowed with"),
        (["--vq", "--prompt", "x"], "--prompt goes with --text"),
        (["--top-k", "5"], "--top-k goes with --vq"),
        (["--text", "--top-p", "0.5"], "--top-p goes with --vq"),
        (["--vq", "--top-p", "0"], "--top-p must be above 0"),
        (["--vq", "--top-k", "0"], "--top-k must be at least 1"),
        (["--vq", "--samples", "0"], "--samples must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            demo.main(arguments)
        assert said in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", {"no_such_module": "no-such-package"})
    assert demo.main(["--vq"]) == 2
    assert "pip install no-such-package" in capsys.readouterr().err
