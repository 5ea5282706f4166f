"""The package as a wheel: what is in it, and what happens without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def wheel(tmp_path: Path, **environment) -> Path:
    """A wheel built from a copy of the sources, so that nothing built before is picked up."""
    source = tmp_path / "source"
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


def test_native_sources_know_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not any(f"<{name}/" in text for name in ("torch", "ATen", "c10")), path
