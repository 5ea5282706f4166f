"""The CUDA kernels, run on the CPU: the sources of csrc/cuda compiled against a stand-in for the CUDA runtime.

Shows that indexing, synchronisation and arithmetic are right. What it cannot show is what only a GPU has: races
between warps, alignment faults, speed. On a GPU ``test_triton_sampler_step.py`` runs the same tests on the real thing.
"""

import importlib.util
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import test_triton_sampler_step as shared
import torch
from test_triton_gradient_bucket import anywhere_in_memory

import genfast
from benchmarks.compile_report import ROOT
from genfast import BucketLayout, pack_gradients, unpack_gradients
from genfast.checks import gradient_bucket
from genfast.native import gradient_bucket_cuda, sampler_step_cuda

COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-mf16c", "-mfma", "-ffp-contract=off", "-Wno-attributes"]

if platform.system() != "Linux" or platform.machine() != "x86_64":
    pytest.skip("the stand-in needs Linux on x86-64", allow_module_level=True)
if COMPILER is None:
    pytest.skip("there is no C++ compiler on the PATH", allow_module_level=True)
pybind11 = pytest.importorskip("pybind11")


def as_cpp(source: str) -> str:
    """Kernel launches are the one piece of CUDA's grammar that the stand-in cannot define away."""
    launch = re.compile(r"(\w+(?:<[\w, ]*>)?)<<<(.*?), kThreads, 0, stream>>>\((.*?)\);", re.DOTALL)
    result, count = launch.subn(r"host::launch(\2, kThreads, [&] { \1(\3); });", source)
    assert count == source.count("<<<")
    return result


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    sources = [ROOT / "csrc" / "cuda" / "module.cpp"]
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        sources.append(folder / (path.stem + "_cu.cpp"))
        sources[-1].write_text(as_cpp(path.read_text()))
    target = folder / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    include = [Path(__file__).with_name("cuda_on_host"), ROOT / "csrc", pybind11.get_include()]
    include.append(sysconfig.get_paths()["include"])
    built = subprocess.run(
        [COMPILER, *FLAGS, "-DGENFAST_MODULE=_cuda", *(f"-I{path}" for path in include), *map(str, sources), "-o",
         str(target)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    spec = importlib.util.spec_from_file_location("_cuda", target)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def backend(module, monkeypatch):
    function = sampler_step_cuda.bind(module).sampler_step
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0}))
    monkeypatch.setattr("genfast.ops.sampler_step.choose", lambda *_: ("cuda", function))
    monkeypatch.setattr("genfast.backends.choose", lambda *_: ("cuda", function))
    monkeypatch.setattr(shared, "DEVICE", "cpu")
    with genfast.backend("reference"):  # an explicit order, so that no other path is taken before `choose`
        yield "cuda"


class TestStep(shared.TestStep):
    __test__ = True


class TestPhilox(shared.TestPhilox):
    __test__ = True


class TestThreshold(shared.TestThreshold):
    __test__ = True


class TestRescale(shared.TestRescale):
    __test__ = True


def test_the_stand_in_counts_launches_as_written(module, backend):
    """A kernel that was not run would leave the output as it was."""
    out = torch.full((3, 1000), 7.0)
    genfast.randn(3, 1000, seed=1, out=out)
    assert not (out == 7.0).any()


def bucket_of_lists(layout, kinds):
    """Gradients through all three ops, and what they wrote."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator).to(kinds[k % len(kinds)]) for k, n in enumerate(layout.numels)]
    residual = torch.randn(layout.numel, generator=generator) * 1e-3
    packed = pack_gradients(gradients, layout, scale=0.5, residual=residual)
    written = [torch.empty_like(t) for t in gradients]
    square_norm, finite = unpack_gradients(packed.wire, layout, written, scale=2.0)
    return [packed.wire, packed.finite, residual, *written, finite, square_norm]


BUCKET_LISTS = {
    "300 tensors, and no values": [k % 5 for k in range(300)],
    "one value each": [1] * 700,
    "a tensor in two launches": [3] * 255 + [9000, 0, 5000, 1] + [2] * 300,
    "aligned": [4096, 2048, 1024],
}


class TestBucket:
    @pytest.fixture
    def on_cuda(self, module, monkeypatch):
        """The result of a call on the reference, and on the CUDA kernels."""
        ops = gradient_bucket_cuda.bind(module)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0}))

        def both(call):
            with genfast.backend("reference"):  # an explicit order, so that no other path is taken before `choose`
                expected = call()
                with monkeypatch.context() as patch:
                    patch.setattr("genfast.ops.gradient_bucket.choose", lambda _, op, __: ("cuda", getattr(ops, op)))
                    return expected, call()

        return both

    @pytest.mark.parametrize("case", gradient_bucket.cases(), ids=lambda case: case.name)
    def test_cases(self, on_cuda, case):
        (*expected, exact), (*got, square_norm) = on_cuda(lambda: case.run("cpu"))
        assert gradient_bucket.agree(got, expected)
        torch.testing.assert_close(square_norm, exact, rtol=1e-12, atol=0, equal_nan=True)

    @pytest.mark.parametrize("wire", ["bf16", "fp8_e5m2"])
    @pytest.mark.parametrize("numels", BUCKET_LISTS.values(), ids=BUCKET_LISTS)
    @pytest.mark.parametrize("kinds", [(torch.float32,), (torch.float32, torch.bfloat16, torch.float16)], ids=len)
    def test_lists(self, on_cuda, wire, numels, kinds):
        layout = BucketLayout(numels, 3, wire)
        (*expected, exact), (*got, square_norm) = on_cuda(lambda: bucket_of_lists(layout, kinds))
        assert gradient_bucket.agree(got, expected)
        torch.testing.assert_close(square_norm, exact, rtol=1e-12, atol=0)

    def test_buckets_and_residuals_anywhere_in_memory(self, on_cuda):
        expected, got = on_cuda(lambda: anywhere_in_memory("cpu"))
        assert all(map(torch.equal, got, expected))

    def test_a_launch_has_positions_of_32_bits(self, module):
        """A tensor of 2^33 values takes four launches, each with a sum for every 1024 of its values, and one more."""
        tensor = (0, 0, 2**33)
        assert module.bucket_workspace([tensor]) == 4 * (2**31 // 1024 + 1)
