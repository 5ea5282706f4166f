"""The command line: every command as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genfast
from genfast import backends, cli


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "genfast", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        # The folder of the package: in a plain checkout, the current folder alone would lead to it.
        env={**os.environ, "PYTHONPATH": str(Path(genfast.__file__).parent.parent), **environment},
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


def test_ops_lists_the_registry(capsys):
    assert cli.main(["ops", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names and set(names) == set(genfast.__all__)
    assert cli.main(["ops"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == names


def test_verify_passes():
    result = run("verify", "--quick", "sampler_step")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed" in result.stdout
    assert all(f"cpu[{isa}]" in result.stdout for isa in backends.machine_isas())


def test_verify_names_what_it_cannot_do(capsys):
    assert cli.main(["verify", "nothing"]) == 2
    assert "families must be among" in capsys.readouterr().err
    assert cli.main(["verify", "--backend", "gpu"]) == 2
    assert "must be one of reference, cpu, triton, cuda; got 'gpu'" in capsys.readouterr().err
    if backends.missing("cuda", "cuda") or not torch.cuda.is_available():
        assert cli.main(["verify", "--backend", "cuda"]) == 2
        assert "backend 'cuda' was asked for, but" in capsys.readouterr().err


def test_verify_of_nothing_is_no_pass(monkeypatch, capsys):
    import genfast
    from genfast import checks

    monkeypatch.setattr(checks, "_places", lambda names: [])
    assert genfast.verify(["sampler_step"]) is False
    assert "no fused backend runs on this machine" in capsys.readouterr().out


def test_verify_fails_when_a_kernel_is_wrong(monkeypatch, capsys):
    from genfast.checks import sampler_step as family

    true = family.sampler_step

    def wrong(inputs, table, **options):
        result = true(inputs, table, **options)
        return result * (1 + 1e-4) if not isinstance(result, tuple) else result

    monkeypatch.setattr(family, "sampler_step", wrong)
    assert cli.main(["verify", "--quick", "--backend", "cpu", "sampler_step"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["doctor", "--nope"], "unrecognized arguments: --nope"),
        ([], "the following arguments are required: command"),
    ],
)
def test_unknown_command_and_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"genfast {genfast.__version__}\n"


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m genfast ops | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == ""


def test_bench_runs_from_any_folder(tmp_path):
    result = run("bench", "--help", cwd=tmp_path)
    if (Path(genfast.__file__).parent.parent / "benchmarks").is_dir():
        assert result.returncode == 0 and "--device" in result.stdout, result.stderr
    else:
        assert result.returncode == 2 and "run it from a checkout" in result.stderr


# Two ways to name a script, and a module: each imports what lies beside it, gets its arguments, and keeps its status.
@pytest.mark.parametrize("target", [["sub/script.py"], ["python", "sub/script.py"], ["python3", "-m", "sub.script"]])
def test_profile_writes_a_trace(tmp_path, target):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("STATUS = 3\n")
    package = "sub." if "-m" in target else ""
    (tmp_path / "sub" / "script.py").write_text(
        f"from {package}beside import STATUS\n"
        "import sys, torch, genfast\n"
        "genfast.sampler_step([torch.ones(3, 4)], [2.0])\n"
        "print(sys.argv[1:])\n"
        "raise SystemExit(STATUS)\n"
    )
    # Without nsys on the PATH the command falls back to torch.profiler, which every machine has.
    result = run("profile", "-o", "trace.json", "--", *target, "a", "--b", cwd=tmp_path, PATH=str(tmp_path))
    assert result.returncode == 3, result.stderr
    assert "['a', '--b']" in result.stdout and "nsys is not on the PATH" in result.stderr
    names = [str(e.get("name")) for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert any(name.startswith("sampler_step.sampler_step[") and name.endswith("] 3x4") for name in names)


def test_profile_under_nsys(tmp_path):
    # A stand-in that shows what nsys is given and then runs it: what is tested is the command, not nsys.
    nsys = tmp_path / "nsys"
    nsys.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "print('nsys', *sys.argv[1:], flush=True)\n"
        "raise SystemExit(subprocess.call([a for a in sys.argv[2:] if not a.startswith('--')]))\n"
    )
    nsys.chmod(0o755)
    script = tmp_path / "script.py"
    script.write_text("from genfast import profiling\nprint('ranges', profiling.enabled)\n")
    result = run("profile", "-o", "report", str(script), cwd=tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "nsys profile --trace=cuda,nvtx,osrt --output=report --force-overwrite=true" in result.stdout
    assert "ranges True" in result.stdout


@pytest.mark.parametrize(
    "target, message",
    [
        ([], "say what to run"),
        (["--", "-m"], "say what to run"),
        (["--", "python", "-c", "pass"], "expected a script or -m and a module; got the option '-c'"),
        (["--", "nowhere.py"], "there is no script and no command 'nowhere.py'"),
        (["--", "/bin/sh"], "/bin/sh is not a Python program"),
    ],
)
def test_profile_refuses_what_has_no_ranges(target, message, capsys):
    assert cli.main(["profile", *target]) == 2
    assert message in capsys.readouterr().err
