"""The arithmetic of the model of many ranks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import scaling_model
from benchmarks.scaling_model import Inputs, bucket_time, check, fitted, step_time

INPUTS = Inputs((100, 300, 200), 2.0, backward=0.5, pack=1e-3, unpack=2e-3, bandwidth=1e3, launch=0.01, message=0.001)


def test_a_bucket_by_hand():
    # 200 values of 2 bytes to and fro on 4 ranks: 2 * 3/4 * 400 bytes at 1000 a second, and 6 messages.
    assert bucket_time(INPUTS, 4, 200) == pytest.approx(0.2 + 0.01 + 0.006 + 0.6 + 0.4)
    assert INPUTS.alpha(2) == pytest.approx(0.012)
    tree = replace(INPUTS, tree=True)
    assert tree.alpha(2) == INPUTS.alpha(2) and tree.alpha(1024) == pytest.approx(0.03)


def test_a_step_by_hand():
    # On 2 ranks the wire takes 0.012 + 0.002 per value, the kernels 0.003 per value.
    assert step_time(INPUTS, 2) == pytest.approx(max(0.5, 0.3 + 0.9) + 0.2 + 0.012 + 0.4 + 0.4)
    fast = replace(INPUTS, bandwidth=1e12)
    assert step_time(fast, 2) == pytest.approx(0.3 + 0.9 + 0.6 + 0.012)
    assert step_time(replace(fast, pack=0.0, unpack=0.0), 2) == pytest.approx(0.5 + 0.012)
    assert step_time(replace(INPUTS, buckets=(200,)), 2) == pytest.approx(0.5 + bucket_time(INPUTS, 2, 200))


def test_the_fit_finds_the_bandwidth_again():
    measured = step_time(INPUTS, 2)
    assert fitted(replace(INPUTS, bandwidth=1.0), 2, measured).bandwidth == pytest.approx(1e3, rel=1e-9)
    with pytest.raises(ValueError, match="no bandwidth explains"):
        fitted(INPUTS, 2, 0.1)


def made_up_run(hosts: int, factor: float = 1.0) -> dict:
    inputs = replace(INPUTS, buckets=(1000, 1000), launch=0.0, value_bytes=2.0)
    return {
        "hosts": hosts,
        "parameters": 2000,
        "backward_s": 0.5,
        "latency_s": inputs.alpha(hosts),
        "variants": {
            "bf16": {
                "step_s": step_time(inputs, hosts) * factor,
                "buckets": [1000, 1000],
                "work": {"pack_s": 2.0, "reduce_s": 1.0, "unpack_s": 3.0},
            }
        },
    }


def test_the_check_reports_the_miss():
    bandwidth, predicted, miss = check([made_up_run(2), made_up_run(4)])["bf16"]
    assert bandwidth == pytest.approx(1e3) and miss == pytest.approx(0, abs=1e-9)
    assert predicted == pytest.approx(made_up_run(4)["variants"]["bf16"]["step_s"])
    assert check([made_up_run(2), made_up_run(4, 0.8)])["bf16"][2] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no figures of 4 hosts"):
        check([made_up_run(2)])


def test_the_command_marks_every_line(tmp_path, capsys):
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"runs": [made_up_run(2), made_up_run(4)]}))
    assert scaling_model.main(["--fit", str(file), "--parameters", "1e8"]) == 0
    printed = capsys.readouterr().out
    assert "miss +0.0%" in printed or "miss -0.0%" in printed
    lines = [line for line in printed.splitlines() if " GPUs " in line]
    assert len(lines) == 20 and all(line.startswith("modelled") for line in lines)
    assert "   8 GPUs" in lines[0] and " 4096 GPUs" in lines[-1]
    assert scaling_model.main(["--fit", str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", (["--parameters", "0"], ["--memory-gbs", "-1"], ["--message-us", "-1"]))
def test_the_command_refuses_nonsense(wrong):
    with pytest.raises(SystemExit):
        scaling_model.main(wrong)
