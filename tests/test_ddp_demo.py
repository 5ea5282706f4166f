"""The demo on 2 ranks: end to end, its flags, and that a quantised wire trains as float32 does."""

from __future__ import annotations

import re
import statistics

import pytest

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
image = pytest.importorskip("PIL.Image", reason="the demo needs pillow")
pytest.importorskip("torch.distributed.distributed_c10d", reason="this torch has no torch.distributed")

from genfast import demo  # noqa: E402
from genfast.demo import ddp  # noqa: E402
from genfast.demo.data import load_digits  # noqa: E402
from genfast.demo.ddp import pictures  # noqa: E402
from genfast.demo.ddp.train import Curve, denoiser, train  # noqa: E402


def test_quick_demo(tmp_path, capsys):
    assert demo.main(["--ddp", "--quick", "--steps", "300", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^(.{12}) +(\d\.\d+) +([-+][\d.]+%)? +([\d,]+) +([\d.]+) *(yes|NO)?$", said, re.MULTILINE)
    assert [row[0].strip() for row in rows] == list(ddp.METHODS)
    loss, sent = ({row[0].strip(): float(row[k].replace(",", "")) for row in rows} for k in (1, 3))
    assert all(row[5] == "yes" for row in rows[1:])
    # Nothing but rounding differs, for 30 steps.
    assert all(value == pytest.approx(loss[ddp.SINGLE], rel=0.02) for value in loss.values())
    assert sent[ddp.SINGLE] == 0 and sent["fp32"] == pytest.approx(sent[ddp.BUILT_IN], rel=0.01)
    for wire, part in (("bf16", 2), ("fp16", 2), ("int8", 4 / (1 + 4 / 256)), ("fp8_e4m3", 4 / (1 + 4 / 256))):
        assert sent["fp32"] / sent[wire] == pytest.approx(part, rel=0.01)
    picture = image.open(tmp_path / "ddp.png").convert("RGB")
    assert picture.size == pictures.size(dict.fromkeys(ddp.METHODS)) and len(picture.getcolors(1 << 20)) > 8


@pytest.mark.parametrize(
    "flag", (["--text"], ["--vq"], ["--samples", "3"], ["--guidance", "2"], ["--prompt", "x"], ["--backend", "cpu"])
)
def test_flags_that_do_not_go_with_it(flag, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--ddp", *flag])
    assert re.search(rf"{flag[0]}.* (does not go|not allowed) with .*--ddp", capsys.readouterr().err)


def test_halves_of_a_batch_have_its_mean_loss():
    digits = load_digits()
    whole = train(denoiser(0), digits, 1, 5).losses[0]
    halves = [train(denoiser(0), digits, 1, 5, rank, 2).losses[0] for rank in (0, 1)]
    assert statistics.fmean(halves) == pytest.approx(whole, rel=1e-5)


def test_the_picture_shows_every_method(tmp_path):
    curves = {"a": Curve([3.0, 2.0, 1.0], 5.0, 100), "b": Curve([3.0], 2.5, 50)}
    pictures.draw(curves, tmp_path / "x.png")
    picture = image.open(tmp_path / "x.png").convert("RGB")
    assert picture.size == pictures.size(curves)
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(0, 0, 0), (128, 128, 128)} <= colours
    assert curves["a"].final == 1.0 and pictures.smooth([1.0, 2.0]) == [1.0, 2.0]


@pytest.mark.slow
def test_int8_with_error_feedback_ends_within_a_percent_of_fp32():
    """The issue's bar, for 3 seeds: pytest -m slow -s shows the figures."""
    for seed in range(3):
        curves = ddp.train_all(500, seed, ("fp32", "int8"))
        miss = curves["int8"].final / curves["fp32"].final - 1
        print(f"seed {seed}: fp32 {curves['fp32'].final:.5f}, int8 {curves['int8'].final:.5f}, {miss:+.3%}")
        assert abs(miss) < 0.01 and curves["int8"].same_bits
