"""The benchmark between hosts: it runs, takes down what it made, also after a crash, and says where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from benchmarks import hosts, namespaces


@pytest.fixture(scope="module")
def possible():
    try:
        with hosts.Hosts(1, "1gbit"):
            pass
    except hosts.Unavailable as error:
        pytest.skip(f"no network namespaces here: it {error}")


def left() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"{hosts.PREFIX}{os.getpid()}-")]


def test_quick_run(possible, tmp_path, capfd):
    file = tmp_path / "figures.json"
    assert namespaces.main(["--quick", "--hosts", "2", "--wires", "bf16", "int8", "--json", str(file)]) == 0
    assert left() == []
    printed = capfd.readouterr().out
    assert "DDP default" in printed and " NO " not in printed
    (run,) = json.loads(file.read_text())["runs"]
    sent = {name: v["sent_bytes"] / run["parameters"] for name, v in run["variants"].items()}
    assert sent["ddp"] == pytest.approx(4, rel=0.1)
    assert sent["bf16"] == pytest.approx(2, rel=0.1) and sent["int8"] == pytest.approx(1, rel=0.2)
    assert all(v["bitwise"] for v in run["variants"].values())
    errors = [run["variants"][name]["error"] for name in ("ddp", "bf16", "int8")]
    assert errors[0] < 1e-6 < errors[1] < errors[2] < 0.03


def test_nothing_is_left_after_a_crash(possible):
    with pytest.raises(KeyboardInterrupt), hosts.Hosts(2, "1gbit") as made:
        process = made.start(1, ["sleep", "60"])
        assert len(left()) == 3
        raise KeyboardInterrupt
    assert left() == [] and process.returncode is not None


def test_a_rate_that_tc_does_not_know_is_refused_and_leaves_nothing(possible, capsys):
    assert namespaces.main(["--quick", "--hosts", "2", "--rate", "quick"]) == 2
    assert "tc" in capsys.readouterr().err and left() == []


def test_it_says_so_where_it_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    assert namespaces.main(["--quick"]) == 2
    assert "must be run as root" in capsys.readouterr().err
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: None)
    assert namespaces.main(["--quick"]) == 2
    assert "needs ip and tc" in capsys.readouterr().err
