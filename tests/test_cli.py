"""The command line: every command as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from genfast import backends


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "genfast", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_doctor_says_what_is_chosen_and_why():
    result = run("doctor")
    assert result.returncode == 0, result.stderr
    assert f"instruction set {backends.cpu_isa()}: the best that this machine" in result.stdout
    for name in ("GENFAST_BACKEND=(not set)", "GENFAST_ISA=(not set)", "triton", "nvtx", "reference  yes"):
        assert name in result.stdout


def test_doctor_reports_a_cap():
    result = run("doctor", GENFAST_ISA="base")
    assert "instruction set base: capped by GENFAST_ISA=base" in result.stdout


def test_doctor_explains_a_build_without_modules(monkeypatch):
    from genfast import doctor

    monkeypatch.setattr(backends, "native_module", lambda name: None)
    monkeypatch.setattr(backends, "build_info", lambda: {"missing": {"cpu": "no C++ compiler was found (c++)"}})
    backends.machine_isas.cache_clear()
    backends.cpu_isa.cache_clear()
    try:
        text = "\n".join(doctor.report())
    finally:
        backends.machine_isas.cache_clear()
        backends.cpu_isa.cache_clear()
    assert "no C++ compiler was found" in text


def test_ops_lists_the_registry():
    names = [row["name"] for row in json.loads(run("ops", "--json").stdout)]
    assert "sampler_step" in names and "verify" in names
    text = run("ops").stdout
    assert all(name in text for name in names)


def test_verify_passes_and_names_what_it_cannot_do():
    result = run("verify", "--quick", "sampler_step")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed" in result.stdout and "cpu[base]" in result.stdout
    result = run("verify", "nothing")
    assert result.returncode == 2 and "families must be among" in result.stderr
    result = run("verify", "--backend", "cuda")
    if result.returncode == 2:
        assert "backend 'cuda' was asked for, but" in result.stderr


def test_verify_fails_when_a_kernel_is_wrong(monkeypatch, capsys):
    import genfast
    from genfast.checks import sampler_step as family

    true = family.sampler_step

    def wrong(inputs, table, **options):
        result = true(inputs, table, **options)
        return result * (1 + 1e-4) if not isinstance(result, tuple) else result

    monkeypatch.setattr(family, "sampler_step", wrong)
    assert genfast.verify(["sampler_step"], quick=True, backends=["cpu"]) is False
    assert "FAILED" in capsys.readouterr().out


def test_unknown_command_and_arguments():
    assert run("frobnicate").returncode == 2
    assert run("doctor", "--nope").returncode == 2
    assert run("--version").stdout.startswith("genfast ")


@pytest.mark.parametrize("separator", [["--"], ["--", "python"]])
def test_profile_writes_a_trace(tmp_path, separator):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, genfast\n"
        "genfast.sampler_step([torch.ones(3, 4)], [2.0])\n"
        "print(sys.argv[1:])\n"
        "raise SystemExit(3)\n"
    )
    trace = tmp_path / "trace.json"
    # Without nsys on the PATH the command falls back to torch.profiler, which every machine has.
    result = run("profile", "-o", str(trace), *separator, str(script), "a", "b", PATH=str(tmp_path))
    assert result.returncode == 3, result.stderr
    assert "['a', 'b']" in result.stdout
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert any(str(n).startswith("sampler_step.sampler_step[") and str(n).endswith("] 3x4") for n in names)


def test_profile_needs_a_target():
    result = run("profile")
    assert result.returncode == 2 and "say what to run" in result.stderr
