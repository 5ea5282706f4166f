"""The package as a wheel: what is in it, and what happens without a compiler."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import genfast

ROOT = Path(__file__).resolve().parent.parent


def wheel(tmp_path: Path, **environment) -> Path:
    """A wheel built from a copy of the sources, so that nothing built before is picked up."""
    source = tmp_path / "a source folder"
    source.mkdir()
    for name in ("csrc", "genfast", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."],
        cwd=source,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    return next(tmp_path.glob("*.whl"))


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"GENFAST_NATIVE": "0"}, "GENFAST_NATIVE=0"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler was found (/nowhere/c++)"),
    ],
)
def test_without_native_modules_the_reference_works_and_says_why(tmp_path, environment, reason):
    with zipfile.ZipFile(wheel(tmp_path, **environment)) as archive:
        names = archive.namelist()
        assert reason in json.loads(archive.read("genfast/_build_info.json"))["missing"]["cpu"]
        archive.extractall(tmp_path / "installed")
    assert "genfast/kernels/sampler_step.py" in names and "genfast/reference/sampler_step.py" in names
    assert not any(name.startswith(("tests", "benchmarks")) or name.endswith(".so") for name in names)
    # An isolated interpreter, given torch's folder and the unpacked wheel: no editable install can step in.
    folders = [str(tmp_path / "installed"), str(Path(torch.__file__).parent.parent)]
    code = (
        f"import sys; sys.path[:0] = {folders!r}\n"
        "import torch, genfast\n"
        "assert genfast.__file__.startswith(sys.path[0]), genfast.__file__\n"
        "print(genfast.sampler_step([torch.ones(3)], [2.0]).tolist())"
    )
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[2.0, 2.0, 2.0]", result.stderr
    assert reason in result.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this architecture")
def test_a_module_that_does_not_compile_is_left_out_alone(tmp_path):
    # A compiler that is too old for AVX-512, and otherwise so fast that the test is: it makes empty files.
    compiler = tmp_path / "old c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-mavx512f*) echo "c++: error: unrecognized option -mavx512f" >&2; exit 1;; esac\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : >"$2"; [ "$1" = -MF ] && echo "$2:" >"$2"; shift; done\n'
        "exit 0\n"
    )
    compiler.chmod(0o755)
    # nvcc, where it is, knows no such architecture and is left alone.
    path = wheel(tmp_path, CXX=f"'{compiler}'", TORCH_CUDA_ARCH_LIST="1.0")
    with zipfile.ZipFile(path) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".so")}
        info = json.loads(archive.read("genfast/_build_info.json"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert modules == {f"genfast/_cpu_{isa}{suffix}" for isa in ("base", "avx2")}
    assert info["modules"] == ["_cpu_avx2", "_cpu_base"]
    assert info["missing"]["cpu_avx512"] == "it did not compile: c++: error: unrecognized option -mavx512f"
    assert "cpu" not in info["missing"] and "cuda" in info["missing"]
    assert path.name.startswith(f"genfast-{genfast.__version__}-cp") and not path.name.endswith("none-any.whl")


def test_native_sources_know_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not any(f"<{name}/" in text for name in ("torch", "ATen", "c10")), path
