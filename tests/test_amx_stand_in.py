"""The tile kernel of ``lm_head_sample`` with a stand-in for the tile unit, which few machines have.

Shows that layouts, edges and order are right. What it cannot show is what only the hardware has: speed, and how it
rounds. On a machine with the unit ``test_token_head.py`` runs the module ``amx`` itself.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from benchmarks.compile_report import ROOT
from genfast import backends
from genfast.checks import token_head as checks

COMPILER = shutil.which("c++") or shutil.which("g++")
if "avx512bf16" not in backends.machine_isas():
    pytest.skip("the stand-in multiplies what is left over with AVX512-BF16", allow_module_level=True)
if COMPILER is None:
    pytest.skip("there is no C++ compiler on the PATH", allow_module_level=True)
pybind11 = pytest.importorskip("pybind11")

MODULE = """
#include "cpu/bindings.h"
PYBIND11_MODULE(stand_in, module) { genfast::register_token_head(module); }
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amx")
    Path(folder, "module.cpp").write_text(MODULE)
    sources = [folder / "module.cpp", *(ROOT / "csrc/cpu" / f"token_head{end}.cpp" for end in ("", "_bindings"))]
    target = folder / f"stand_in{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = backends.build_info()["flags"]["_cpu_avx512bf16"].split()
    kept = [flag for flag in flags if flag.startswith(("-std", "-m", "-f"))]
    includes = ["-I", ROOT / "csrc", "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    stand_in = ["-include", ROOT / "tests/amx_stand_in.h"]
    command = [COMPILER, "-O1", "-shared", *kept, *includes, *stand_in, *sources, "-o", target, "-ldl"]
    subprocess.run([str(part) for part in command], check=True)
    spec = importlib.util.spec_from_file_location("stand_in", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, size, depth", [(1, 32, 32), (16, 33, 64), (17, 600, 96), (40, 512, 600), (130, 140, 544), (33, 1100, 33)]
)
def test_tiles(rows, size, depth, stand_in, monkeypatch):
    monkeypatch.setattr(backends, "cpu_module", lambda: stand_in)
    backends._forget_choices()
    try:
        case = checks.HeadCase((rows, depth), size, dict(temperature=4.0), dtype=checks.BF16, strided=True)
        error, allowed = checks.check(case, "cpu")
    finally:
        monkeypatch.undo()
        backends._forget_choices()
    assert error <= allowed
