"""The kernels of ``lm_head_sample`` and ``attention`` with a stand-in for the tile unit, which few machines have.

Shows that layouts, edges and order are right. What it cannot show is what only the hardware has: speed, and how it
rounds. On a machine with the unit ``test_token_head.py`` and ``test_attention.py`` run the module ``amx`` itself.
"""

import dataclasses
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_attention import WINDOWS, windows

import genfast
from benchmarks.compile_report import ROOT
from genfast import AttentionMask, backends
from genfast.checks import attention as attention_checks
from genfast.checks import compare
from genfast.checks import token_head as checks

COMPILER = shutil.which("c++") or shutil.which("g++")
if "avx512bf16" not in backends.machine_isas():
    pytest.skip("the stand-in multiplies what is left over with AVX512-BF16", allow_module_level=True)
if COMPILER is None:
    pytest.skip("there is no C++ compiler on the PATH", allow_module_level=True)
pybind11 = pytest.importorskip("pybind11")

MODULE = """
#include "cpu/bindings.h"
PYBIND11_MODULE(stand_in, module) {
  genfast::register_token_head(module);
  genfast::register_attention(module);
}
"""
SOURCES = (
    "token_head", "token_head_bindings", "attention", "attention_backward", "attention_cached", "attention_bindings",
    "pool",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amx")
    Path(folder, "module.cpp").write_text(MODULE)
    sources = [folder / "module.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in SOURCES)]
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
    # What is not in it, the module of this machine has.
    whole = ModuleType("whole")
    vars(whole).update(vars(backends.native_module("cpu_avx512bf16")) | vars(module))
    return whole


@pytest.fixture
def stand_in(built, monkeypatch):
    monkeypatch.setattr(backends, "cpu_module", lambda: built)
    backends._forget_choices()
    yield
    monkeypatch.undo()
    backends._forget_choices()


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stand_in")]


@pytest.mark.parametrize(
    "rows, size, depth", [(1, 32, 32), (16, 33, 64), (17, 600, 96), (40, 512, 600), (130, 140, 544), (33, 1100, 33)]
)
def test_head(rows, size, depth):
    case = checks.HeadCase((rows, depth), size, dict(temperature=4.0), dtype=checks.BF16, strided=True)
    error, allowed = checks.check(case, "cpu")
    assert error <= allowed


def tiled(case: attention_checks.AttentionCase) -> bool:
    """Whether the CPU has enough rows to a key head for tiles of them."""
    _, heads, kv_heads, q_len, *_ = case.shape
    return kv_heads > 0 and heads // kv_heads * q_len > 256


ATTENTION = dict.fromkeys(
    dataclasses.replace(case, dtype=torch.bfloat16, backward=False) for case in attention_checks.cases() if tiled(case)
)


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention(case):
    error, allowed = attention_checks.check(case, "cpu")
    assert error <= allowed


@pytest.mark.parametrize("window", WINDOWS)
def test_intervals_that_begin_anywhere_in_a_tile(window):
    q, k, v, mask, oracle, theirs = windows(window, torch.bfloat16)
    got = genfast.attention(q, k, v, mask=mask, return_lse=True)
    for error, allowed in map(compare, got, oracle, theirs):
        assert error <= allowed


@pytest.mark.parametrize("dim", [24, 64])
def test_keys_and_values_that_a_tile_of_rows_does_not_see_may_be_anything(dim):
    """Rows 0 to 31 see keys 5 to 76, rows 32 to 63 all but three, the rest the first 40."""
    rows = torch.arange(300)[None]
    begin = torch.where(rows < 32, 5, 0)
    end = torch.where(rows < 32, 77, torch.where(rows < 64, 97, 40))
    mask = AttentionMask.intervals(begin, end, kv_len=100)
    draw = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(1, 1, n, dim, generator=draw).bfloat16() for n in (300, 100, 100))
    clean = genfast.attention(q, k, v, mask=mask)
    for t in (k, v):
        t[..., 97:, :] = torch.nan
    assert torch.equal(genfast.attention(q, k, v, mask=mask), clean)
    for t in (k, v):
        t[..., :4, :], t[..., 78:97, :] = torch.nan, torch.inf
    assert torch.equal(genfast.attention(q, k, v, mask=mask)[..., :32, :], clean[..., :32, :])
