"""The benchmark command: statistics, verdicts, what it writes, and the published arithmetic that it compares with."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import genfast
from benchmarks import __main__ as command
from benchmarks import harness, peers, published, report, timing
from benchmarks.harness import Bar, Case, Peer, Plan, Row, Settings
from benchmarks.rotation import Pool

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SETTINGS = Settings(CPU, quick=True)


def tiny_case(**changes) -> Case:
    """A case that takes microseconds: twice a tensor."""
    tensors = Pool((2, 8), torch.float32, CPU, seed=0)
    case = dict(
        name="double",
        shape=(2, 8),
        dtype="fp32",
        run=lambda i: tensors[i] * 2,
        exact=lambda: tensors[0].double() * 2,
        peers=[Peer("added", "1", lambda i: tensors[i] + tensors[i], bars=(Bar("ratio", at_least=1e-6),))],
        output_bytes=64,
    )
    return Case(**{**case, **changes})


def run_command(monkeypatch, case: Case, *arguments: str) -> int:
    from benchmarks import sampler_step

    monkeypatch.setattr(sampler_step, "plans", lambda settings: [Plan(case.name, lambda: case)])
    return command.main(["sampler_step", *arguments])


# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_call_in_another_process_has_the_clock_of_that_process():
    class Elsewhere:
        def __call__(self, i):
            time.sleep(0.01)

        def seconds(self, i):
            return 2.0 + i % 2

    times, _ = timing.interleave([Elsewhere()], CPU, seconds=0, least=4, most=4)
    assert set(times[0]) == {2.0, 3.0}


def test_runs_take_turns_and_every_call_has_its_own_number():
    seen = []

    def run(name):
        return lambda i: (seen.append((name, i)), __import__("time").sleep(3e-4))

    times, used = timing.interleave([run("a"), run("b")], CPU, seconds=0, least=4, most=9)
    assert times.shape == (2, 4) and (times > 2.9e-4).all()
    assert [name for name, _ in seen[-8:]] == ["a", "b"] * 4
    numbers = [number for _, number in seen]
    assert numbers == list(range(used))


def test_rounds_stop_at_the_time_limit_and_at_the_maximum():
    times, _ = timing.interleave([lambda i: None], CPU, seconds=30, least=2, most=5)
    assert times.shape == (1, 5)


def test_short_calls_are_timed_several_at_once():
    calls = []
    timing.interleave([calls.append], CPU, seconds=0, least=1, most=1)
    assert len(calls) > 100


def test_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    peer, ours = np.array([2.0, 30.0, 10.0]), np.array([1.0, 10.0, 20.0])
    middle, low, high = timing.paired_ratio(peer, ours)
    assert (middle, low, high) == (2.0, 1.25, 2.5)
    assert np.median(peer) / np.median(ours) == 1.0


def test_peak_memory_counts_what_is_live_at_once():
    x = torch.randn(1 << 16)
    megabyte = x.numel() * 4

    def three_in_turn():
        y = x.sin()
        for _ in range(3):
            y = y.sin()
        return y

    assert timing.peak_bytes(lambda: x.sin_(), CPU) == 0
    assert timing.peak_bytes(lambda: x.sin(), CPU) == megabyte
    assert timing.peak_bytes(three_in_turn, CPU) == 2 * megabyte


def test_freed_memory_is_kept_for_the_next_call():
    # In a process of its own, since the setting stays: a block given back and asked for again brings no new page.
    code = """
import resource, torch
from benchmarks.published import ddim_step
from benchmarks.timing import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x, eps = start, start
    for _ in range(5):
        x = ddim_step(x, eps, 0.7, 0.7, 0.8, 0.6, None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start = torch.ones(2**21)
faults()
without = faults()
if keep_freed_memory():
    for _ in range(5):
        faults()
    print(without, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("this C library has no mallopt")
    without, kept = map(int, done.stdout.split())
    assert kept < 100 or kept < without / 2


def test_pool_is_random_and_rotates():
    pool = Pool((3, 5), torch.bfloat16, CPU, seed=3)
    assert len(pool) >= 4 and pool[len(pool)] is pool[0]
    assert not torch.equal(pool[0], pool[1]) and pool[1].dtype == torch.bfloat16
    assert all(t.count_nonzero() == t.numel() and t.is_contiguous() for t in pool.tensors)


def test_error_is_relative_to_the_largest_exact_value_and_never_nan():
    exact = torch.tensor([4.0, -8.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([4.0, -8.0]), exact) == 0
    assert harness.relative_error(torch.tensor([5.0, -8.0]), exact) == 0.125
    assert harness.relative_error(torch.tensor([float("nan"), -8.0]), exact) == math.inf


# --- rows and verdicts -----------------------------------------------------------------------------------------------


def test_a_case_gives_one_full_row_per_peer():
    missing = Peer("absent", missing="absent is not installed", bars=(Bar("ratio", at_least=5),))
    case = tiny_case(bytes=128, peers=[*tiny_case().peers, missing], bars=(Bar("extra_bytes", at_most=0),))
    measured, unmeasured = harness.measure("sampler_step", case, SETTINGS)
    assert 0 < measured.ratio_quartiles[0] <= measured.ratio <= measured.ratio_quartiles[1]
    assert measured.floor_ms > 0 and measured.floor_percent > 0 and measured.copy_gb_per_s > 0
    assert measured.our_error == 0 and measured.peer_error == 0 and measured.accurate
    assert measured.our_peak_bytes >= 64 and measured.peer_peak_bytes == 64
    assert measured.rounds >= SETTINGS.least_rounds
    assert unmeasured.ratio is None and unmeasured.peer_ms is None and unmeasured.our_ms == measured.our_ms
    assert unmeasured.bar == ">=5x" and unmeasured.bar_met is None
    assert "absent is not installed" in report.line(unmeasured)
    assert "missing peers: absent is not installed" in report.summary("f", [measured, unmeasured], 1)


@pytest.mark.parametrize(
    ("bar", "good", "bad", "text"),
    [
        (Bar("ratio", at_least=5), {"ratio": 5.0}, {"ratio": 4.99}, ">=5x"),
        (Bar("floor_percent", at_least=75), {"floor_percent": 80.0}, {"floor_percent": 74.0}, "floor >=75%"),
        (Bar("our_us", at_most=8), {"our_ms": 0.0079}, {"our_ms": 0.0081}, "<=8 us"),
        (Bar("extra_bytes", at_most=0), {"our_peak_bytes": 64}, {"our_peak_bytes": 65}, "extra <=0 B"),
        (Bar("launches", at_most=1), {"counts": {"launches": 1}}, {"counts": {"launches": 2}}, "launches <=1"),
    ],
)
def test_bars(bar, good, bad, text):
    for values, expected in ((good, True), (bad, False)):
        row = Row("f", "c", "2x8", "fp32", "cpu", "p", "1", **values)
        harness.judge(row, [bar], output_bytes=64)
        assert row.bar == text and row.bar_met is expected
    both = Row("f", "c", "2x8", "fp32", "cpu", "p", "1", **good)
    harness.judge(both, [bar, Bar("ratio", at_least=1e9)], output_bytes=64)
    assert both.bar_met is (False if both.ratio is not None else None)


def test_a_wrong_result_is_marked(monkeypatch, capsys):
    tensors = Pool((2, 8), torch.float32, CPU, seed=0)
    case = tiny_case(run=lambda i: tensors[i] * 2.001)
    assert run_command(monkeypatch, case, "--quick") == 1
    printed = capsys.readouterr().out
    assert "(ERROR)" in printed and "ERROR TOO LARGE: double" in printed


def test_a_case_that_raises_does_not_stop_the_others():
    def broken():
        raise RuntimeError("no such thing")

    found = list(harness.rows("f", [Plan("broken", broken), Plan("double", tiny_case)], SETTINGS))
    assert found[0].failed == "RuntimeError: no such thing" and found[1].ratio is not None
    assert "FAILED: RuntimeError: no such thing" in report.line(found[0])
    assert not report.passed(found, SETTINGS) and report.passed(found[1:], SETTINGS)


def test_a_missed_bar_fails_a_full_run_and_not_a_quick_one():
    row = Row("f", "c", "2x8", "fp32", "cpu", "p", "1", bar=">=5x", bar_met=False)
    assert report.passed([row], SETTINGS) and not report.passed([row], Settings(CPU))
    assert "0 of 1 bars met, MISSED: c 2x8 fp32 vs p" in report.summary("f", [row], 1)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(peers.Missing, match="no-such-package is not installed"):
        peers.package("no-such-package")
    assert peers.package("numpy") is np


def test_a_missing_diffusers_is_named_with_its_bar(monkeypatch):
    from benchmarks import sampler_step_loops as loops

    monkeypatch.setattr(peers, "version", lambda name: (_ for _ in ()).throw(peers.Missing(f"{name} is not installed")))
    feed = loops.StandIn((1, 2, 4, 4), 3, CPU)
    bars = (Bar("ratio", at_least=6),)
    peer = loops.diffusers_peer(loops.LOOPS[0], [666, 333, 0], CPU, feed, None, bars)
    assert peer.run is None and peer.missing == "diffusers is not installed" and peer.bars == bars


def test_a_peer_with_other_timesteps_is_refused():
    pytest.importorskip("diffusers")
    from benchmarks import sampler_step_loops as loops

    feed = loops.StandIn((1, 2, 4, 4), 3, CPU)
    with pytest.raises(
        ValueError, match=r"DDIMScheduler steps through \[666, 333, 0\], genfast through \[666, 333, 1\]"
    ):
        loops.diffusers_peer(loops.LOOPS[0], [666, 333, 1], CPU, feed, None, ())


# --- the command -----------------------------------------------------------------------------------------------------


def test_json_table_and_plot(monkeypatch, capsys, tmp_path):
    case = tiny_case(note="a remark", counts=lambda: {"launches": 1})
    json_file, plot = tmp_path / "sub" / "rows.json", tmp_path / "plot.png"
    assert run_command(monkeypatch, case, "--quick", "--json", str(json_file), "--plot", str(plot)) == 0
    content = json.loads(json_file.read_text())
    assert content["environment"]["torch"] == torch.__version__ and content["environment"]["quick"] is True
    assert content["environment"]["genfast"] == genfast.__version__
    (row,) = content["rows"]
    assert row.keys() == Row.__dataclass_fields__.keys()
    assert row["case"] == "double" and row["peer"] == "added" and row["bar_met"] is True
    assert row["counts"] == {"launches": 1}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("case") and printed[2].startswith("double")
    assert any("a remark; launches 1" in text for text in printed)
    assert printed[-1] == content["summaries"][0] and printed[-1].startswith("sampler_step: 1 rows, 1 of 1 bars met")
    pytest.importorskip("matplotlib")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_plot_file_per_family():
    assert command.plot_path(None, "sampler_step", 1) == Path("build/bench_sampler_step.png")
    assert command.plot_path(Path("a/b.png"), "sampler_step", 1) == Path("a/b.png")
    assert command.plot_path(Path("a/b.png"), "sampler_step", 2) == Path("a/b_sampler_step.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "FAMILY must be one of dropin, sampler_step"),
        (["sampler_step", "--only", "no case has this"], "leaves no case of sampler_step"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_the_real_command_on_its_smallest_case(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["sampler_step", "--quick", "--only", "op DDIM small", "--json", str(file)]
    arguments += ["--plot", str(tmp_path / "plot.png")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["shape"] == "1x4x64x64" and row["accurate"] and row["our_error"] < 1e-6
    assert row["our_peak_bytes"] == 1 * 4 * 64 * 64 * 4
    assert row["bar"] == ">=5x, extra <=0 B, <=8 us"


# --- the published arithmetic ----------------------------------------------------------------------------------------

LEVELS = published.linear_levels(range(950, -1, -50))


def draws(count: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, dtype=dtype, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("loop", [published.ddim_loop, published.dpmpp_2m_loop, published.unipc_loop])
def test_published_solvers_are_exact_where_the_path_is_straight(loop):
    data, eps = draws(2)
    alpha, sigma = LEVELS[0]
    assert torch.allclose(loop(alpha * data + sigma * eps, lambda k: eps, LEVELS), data, rtol=0, atol=1e-12)


def test_published_euler_is_exact_where_the_path_is_straight():
    data, eps = draws(2)
    alpha, sigma = LEVELS[0]
    start = data + sigma / alpha * eps
    assert torch.allclose(published.euler_loop(start, lambda k: eps, LEVELS), data, rtol=0, atol=1e-9)


def test_published_heun_ends_at_the_data_of_a_perfect_network():
    data, noise = draws(2)
    sigmas = published.edm_sigmas(5)
    assert sigmas[0] == pytest.approx(80) and sigmas[-2] == pytest.approx(0.002) and sigmas[-1] == 0
    # The levels of the 2 N - 1 evaluations: a step's own, then its target's, where that is not 0.
    visited = [sigma for pair in itertools.pairwise(sigmas) for sigma in pair if sigma > 0]
    asked = []

    def perfect(k, scaled):
        asked.append(k)
        total = visited[k] ** 2 + 0.25
        return (data - 0.25 / total * math.sqrt(total) * scaled) * math.sqrt(total) / (0.5 * visited[k])

    result = published.edm_heun_loop(data + 80 * noise, perfect, sigmas)
    assert torch.allclose(result, data, rtol=0, atol=1e-9) and asked == list(range(9))


def test_published_ddpm_keeps_the_variance_of_the_schedule():
    # With data of variance zero, x_t has variance sigma_t^2 after every step, whatever the sub-sequence of timesteps.
    generator = torch.Generator().manual_seed(0)
    shape, levels = (100_000,), LEVELS[10:12] + [(0.9, math.sqrt(0.19))]
    x = levels[0][1] * torch.randn(shape, dtype=torch.float64, generator=generator)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    result = published.ddpm_loop(x, lambda k: x / levels[0][1], [levels[0], levels[1]], lambda k: noise)
    assert float(result.var()) == pytest.approx(levels[1][1] ** 2, rel=0.02)  # 4.5 standard errors


def test_guidance_of_one_and_a_wide_threshold_change_nothing():
    x, eps, other = draws(3)
    levels = (0.7, 0.714, 0.8, 0.6)
    plain = published.ddim_step(x, eps, *levels, None)
    assert torch.allclose(published.guided_ddim_step(x, eps, other, 1.0, 0.7, levels), plain)
    small = published.thresholded_ddim_step(0.01 * x, 0.01 * eps, levels, 0.9, 2.0)
    x0 = (0.01 * x - levels[1] * 0.01 * eps) / levels[0]
    assert float(x0.abs().max()) < 1 and torch.allclose(small, published.ddim_step(0.01 * x, 0.01 * eps, *levels, None))


@pytest.mark.parametrize(
    ("scheduler", "loop", "options"),
    [
        ("DDIMScheduler", published.ddim_loop, {"clip_sample": False}),
        ("DDIMScheduler", lambda *a: published.ddim_loop(*a, clip=1.0), {}),
        ("DPMSolverMultistepScheduler", published.dpmpp_2m_loop, {}),
        ("UniPCMultistepScheduler", published.unipc_loop, {}),
        ("EulerDiscreteScheduler", published.euler_loop, {"timestep_spacing": "leading"}),
    ],
)
def test_published_loops_agree_with_diffusers(scheduler, loop, options):
    diffusers = pytest.importorskip("diffusers")
    peer = getattr(diffusers, scheduler)(**options)
    peer.set_timesteps(12)
    x, *outputs = draws(13, torch.float32)
    exact = loop(x.double(), lambda k: outputs[k].double(), published.linear_levels([int(t) for t in peer.timesteps]))
    clipped = {"use_clipped_model_output": True} if peer.config.get("clip_sample") else {}
    for k, t in enumerate(peer.timesteps):
        peer.scale_model_input(x, t)
        x = peer.step(outputs[k], t, x, return_dict=False, **clipped)[0]
    assert harness.relative_error(x, exact) < 2e-5
