"""The demo end to end, and its parts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
image = pytest.importorskip("PIL.Image", reason="the demo needs pillow")

from genfast import demo  # noqa: E402
from genfast.demo import eager  # noqa: E402
from genfast.demo.data import load_digits  # noqa: E402
from genfast.demo.network import Denoiser, Model, train  # noqa: E402
from genfast.demo.quality import Quality, frechet_distance  # noqa: E402

FILES = ("ddpm", "ddim", "edm_heun", "dpmpp_2m", "rectified_flow")


def test_quick_demo(tmp_path, capsys):
    assert demo.main(["--quick", "--steps", "1500", "--samples", "12", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    noise = float(re.search(r"noise has ([\d.]+)", text).group(1))
    rows = re.findall(r"^(.+?) +(\d+) +(\d+) +([\d.]+) +\(.+?\) .* (\S+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["DDPM", "DDIM", "EDM Heun", "DPM-Solver++ 2M", "rectified flow"]
    for _, _, calls, _, difference, accuracy, distance in rows:
        assert int(calls) > 0
        # The same seed, so rounding alone; a hundred steps amplify it a little.
        assert float(difference) < 1e-4
        assert float(accuracy) > 0.8
        assert float(distance) < noise / 3
    side = 10 * (8 * 5 + 2) + 2
    for name in FILES:
        picture = image.open(tmp_path / f"{name}.png")
        assert picture.size == (side, side) and np.asarray(picture).std() > 20
    assert (tmp_path / "overview.png").exists()


def test_an_untrained_network_scores_badly():
    digits = load_digits()
    quality = Quality(digits)
    assert quality.ceiling > 0.97 and quality.floor < 0.5 < quality.noise
    labels = torch.arange(10).repeat_interleave(5)
    entry = next(e for e in demo._entries() if e.file == "ddim")
    sampler = entry.build(5)
    model = Model(Denoiser().eval(), labels, demo._levels(sampler), sampler.prediction)
    with torch.no_grad():
        samples = sampler(model, sampler.initial_noise((50, 1, 8, 8), seed=1), guidance=1.5)
    assert quality.accuracy(samples, labels) < 0.4 and quality.distance(samples) > 10 * quality.floor


def test_training_is_deterministic():
    digits = load_digits()
    first, second = (train(digits, 3, 5, demo._progress).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_split_shares_no_image():
    digits = load_digits()
    assert len(digits.train) + len(digits.held_out) == 1797
    assert set(digits.held_out_labels.tolist()) == set(range(10))
    assert digits.train.min() == -1 and digits.train.max() == 1


def test_frechet_distance_of_known_normals():
    g = np.random.default_rng(0)
    a = g.standard_normal((200_000, 3)) * [1.0, 2.0, 0.5]
    b = g.standard_normal((200_000, 3)) * [1.0, 1.0, 1.5] + [1.0, 0.0, 0.0]
    # Between diagonal normals: |difference of means|^2 + sum of squared differences of standard deviations.
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 1, abs=0.05)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("entry", demo._entries(), ids=lambda e: e.file)
def test_eager_loops_are_the_fused_samplers(entry):
    sampler = entry.build(7)
    torch.manual_seed(0)
    weights = torch.randn(2, 64, 64) / 8

    def model(x, t):
        flat = x.flatten(1)
        return tuple((flat @ w).view_as(x) * 0.3 + 0.1 * x for w in weights)

    x = sampler.initial_noise((4, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    draws = [torch.Generator().manual_seed(2) for _ in range(2)]
    ours = sampler(model, x, generator=draws[0] if sampler.stochastic else None, guidance=2.0)
    nodes = list(zip(sampler.alphas.tolist(), sampler.sigmas.tolist()))
    times = [torch.full((4,), t) for t in sampler.trajectory.times.tolist()]
    theirs = getattr(eager, entry.file)(eager.guided(model, 2.0), x, nodes, times, draws[1])
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", {"no_such_module": "no-such-package"})
    assert demo.main([]) == 2
    assert "pip install no-such-package" in capsys.readouterr().err
