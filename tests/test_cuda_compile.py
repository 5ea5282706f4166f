"""The CUDA backend as far as a machine with no GPU can test it: compilation, import, and what reaches the module."""

import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from benchmarks import compile_report
from genfast.native import sampler_step_cuda
from genfast.step_table import StepTable, quantile_rank

NVCC = compile_report.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is neither on the PATH, nor in CUDA_HOME or /usr/local/cuda")


@needs_nvcc
@pytest.mark.parametrize("source", compile_report.cuda_sources(), ids=lambda path: path.name)
def test_compiles_without_spills(source):
    rows = compile_report.cuda_rows(source, NVCC)
    assert {row.target for row in rows} == set(compile_report.NVIDIA)
    assert not [row for row in rows if row.spilled]


@needs_nvcc
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler on the PATH")
def test_the_module_imports_without_a_gpu(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    csrc = compile_report.ROOT / "csrc"
    module = tmp_path / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    built = subprocess.run(
        [NVCC, "-std=c++17", "-O1", "-shared", "-cudart", "static", "-arch=sm_90", "-DGENFAST_MODULE=_cuda",
         "-Xcompiler", "-fPIC", "--threads", "0", "-I", pybind11.get_include(),
         "-I", sysconfig.get_paths()["include"], "-I", str(csrc),
         *map(str, [*compile_report.cuda_sources(), csrc / "cuda" / "module.cpp"]), "-o", str(module)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    script = (
        "import _cuda\n"
        "print(_cuda.missing_device())\n"
        "print(_cuda.workspace_bytes(batch=2, inner=1000, float64=False, rescale=False, threshold=False))\n"
        "print(_cuda.workspace_bytes(batch=8, inner=2**30, float64=False, rescale=True, threshold=True) // 8)\n"
        "tensor = (0, 0, 0)\n"
        "none = dict.fromkeys('uncond log_variance noise second clip threshold seed'.split())\n"
        "zero = dict.fromkeys('table row row_stride steps guidances guidance_stride seeds seed_stride stream offset "
        "workspace device cuda_stream'.split(), 0)\n"
        "try:\n"
        "    _cuda.sampler_step(inputs=[tensor], out=tensor, batch=1, inner=4, float64=False, rows=1, has_x0=False,\n"
        "                       guidance=1.0, rescale=0.0, **none, **zero)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    why, nothing, per_sample, error = done.stdout.splitlines()
    assert why.startswith("there is no usable NVIDIA GPU: ")
    assert int(nothing) == 0
    assert 0 < int(per_sample) <= 20_000
    assert error.startswith("sampler_step cannot run on CUDA: there is no usable NVIDIA GPU: ")


class FakeModule:
    """Takes the calls of the CUDA module and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def workspace_bytes(self, batch, inner, float64, rescale, threshold):
        self.workspace = (batch, inner, float64, rescale, threshold)
        return 64

    def sampler_step(self, **arguments):
        self.calls.append(arguments)


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 77}))
    module = FakeModule()

    def run(inputs, table, **options):
        defaults = dict(
            step=None, uncond=None, guidance=1.0, guidance_rescale=0.0, clip=None, threshold=None, log_variance=None,
            noise=None, seed=None, stream=0, offset=0, second_out=None,
        )  # fmt: skip
        options.setdefault("out", torch.empty_like(inputs[0]))
        sampler_step_cuda.bind(module).sampler_step(inputs, table, **{**defaults, **options})
        run.arguments = module.calls[-1] if module.calls else None
        return run.arguments

    run.module = module
    return run


def test_dense_tensors_are_one_sample(call):
    x, m = torch.randn(2, 3, 5), torch.randn(2, 3, 5).bfloat16()
    out, table = torch.empty_like(x), StepTable([[0.5, 0.3]] * 4)
    got = call([x, m], table, step=2, out=out)
    assert got["inputs"] == [(x.data_ptr(), 0, 15), (m.data_ptr(), 1, 15)]
    assert got["out"] == (out.data_ptr(), 0, 15)
    assert (got["batch"], got["inner"], got["float64"]) == (1, 30, False)
    assert (got["table"], got["rows"], got["row"], got["row_stride"], got["steps"]) == (
        table.data.data_ptr(),
        4,
        2,
        0,
        0,
    )
    assert got["workspace"] == 0 and got["cuda_stream"] == 77 and got["device"] == 0
    optional = ("uncond", "log_variance", "noise", "second", "clip", "threshold", "seed")
    assert all(got[name] is None for name in optional)


def test_what_differs_between_samples_keeps_the_batch(call):
    x = [torch.randn(2, 6).double() for _ in range(2)]
    table = StepTable([[0.5, 0.3]] * 2)
    got = call(x, table)
    assert (got["batch"], got["inner"], got["row"], got["row_stride"], got["float64"]) == (2, 6, 0, 1, True)
    step = torch.tensor([1, 0])
    got = call(x, table, step=step)
    assert (got["steps"], got["row_stride"]) == (step.data_ptr(), 1)
    one = torch.tensor([1])
    got = call(x, table, step=one)
    assert (got["steps"], got["row_stride"], got["batch"]) == (one.data_ptr(), 0, 1)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    got = call(x, table, step=0, uncond=torch.randn(2, 6), guidance=scale)
    assert (got["guidances"], got["guidance_stride"], got["batch"]) == (scale.data_ptr(), 1, 2)


def test_noise_by_seed(call):
    x, table = [torch.randn(3, 6)], StepTable([[0.5]] * 4, noise=0.1)
    got = call(x, table, step=2, seed=-5, stream=7, offset=9)
    assert (got["seed"], got["seeds"], got["stream"], got["offset"], got["batch"]) == (-5, 0, 9, 9, 3)
    step = torch.tensor([2])
    assert call(x, table, step=step, seed=-5, stream=7)["stream"] == 7  # the kernel adds the step
    seeds = torch.tensor([1, 2, 3])
    got = call(x, table, step=2, seed=seeds)
    assert (got["seed"], got["seeds"], got["seed_stride"]) == (None, seeds.data_ptr(), 1)
    assert call(x, table, step=2, seed=seeds[0])["seed_stride"] == 0


def test_reductions_get_a_workspace(call):
    x, uncond = [torch.randn(2, 60) for _ in range(2)], torch.randn(2, 60)
    table = StepTable([0.5, 0.3], x0=1.0, to_x0=[1.0, 0.5])
    got = call(x, table, uncond=uncond, guidance=3.0, guidance_rescale=0.5)
    assert call.module.workspace == (2, 60, False, True, False)
    assert (got["rescale"], got["guidance"]) == (0.5, 3.0) and got["workspace"] != 0
    got = call(x, table, threshold=(0.995, 2.0))
    assert call.module.workspace == (2, 60, False, False, True)
    assert got["threshold"] == (*quantile_rank(0.995, 60, torch.float32), 2.0) and got["workspace"] != 0
    assert call(x, table, clip=(-1.0, 1.0))["clip"] == (-1.0, 1.0)


def test_layouts(call):
    wide = torch.randn(2, 8, 3)
    a, b = wide[:, :4], wide[:, 4:]
    got = call([a, b], StepTable([0.5, 0.3]), out=torch.empty(2, 4, 3))
    assert [stride for _, _, stride in got["inputs"]] == [24, 24] and got["out"][2] == 12
    assert (got["batch"], got["inner"]) == (2, 12)

    last = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    got = call([last], StepTable([0.5]), out=torch.empty_like(last))
    assert got["inputs"][0][0] == last.data_ptr() and got["batch"] == 1
    got = call([last], StepTable([0.5], noise=1.0), seed=1, out=torch.empty_like(last))
    assert got["inputs"][0][0] != last.data_ptr()  # draws are counted in row-major order

    out = torch.empty_like(last).fill_(3.0)
    got = call([torch.randn(2, 4, 3, 5)], StepTable([0.5]), out=out)
    assert got["out"][0] != out.data_ptr()
    assert not torch.equal(out, torch.full_like(out, 3.0))  # the result was copied back from where the module wrote it


def test_nothing_to_do(call):
    assert call([torch.empty(0, 4)], StepTable([0.5])) is None
