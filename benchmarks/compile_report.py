"""What the compilers make of the GPU kernels that ship, on a machine with no GPU.

``python -m benchmarks.compile_report [--quick] [--target sm_90 ...] [--skip triton|cuda]`` compiles every Triton
configuration of ``genfast.kernels`` (``*configurations.py``) and every ``csrc/cuda/*.cu`` ahead of time and prints
registers, spills and shared memory per kernel and target. The exit code is 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
QUICK_CASES = ("ddim", "guided_rescale_threshold_philox", "on_device")
QUICK_TOKEN_CASES = ("greedy", "guided_few_rows", "top_k_top_p")
QUICK_HEAD_CASES = ("head_greedy", "head_draw")
QUICK_ATTENTION_CASES = ("attention_few_queries_64", "attention_backward_64")
QUICK_CODE_CASES = ("codes_8", "codes_cosine_64")
QUICK_BUCKET_CASES = ("bucket_bf16", "bucket_fp8_e4m3_odd_size")
QUICK_DTYPES = ("fp32+bf16",)


@dataclass(frozen=True)
class Row:
    """One kernel on one target."""

    source: str
    kernel: str
    target: str
    registers: int
    spilled: int
    """Bytes of memory per thread that registers spill to."""
    shared: int


@dataclass(frozen=True)
class Launch:
    """A kernel as one launch specialised it: what ``triton.compile`` needs."""

    kernel: object
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    def key(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))


# --- Triton ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the Triton launches made inside the block, and run none of them."""
    import triton

    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        values = dict(zip(names, args))
        values.update((k, v) for k, v in kwargs.items() if k in names)
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(_specialised(kernel, values, options))

    run = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


def _specialised(kernel, values: dict, options: dict) -> Launch:
    """The types, constants and alignments that Triton's launcher would derive from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[param.name] = _argument_type(
                value, (index,), not param.do_not_specialize, param.annotation_type, constants, attributes
            )
    return Launch(kernel, signature, constants, attributes, options)


def _argument_type(value, path, specialise, annotated, constants, attributes):
    if isinstance(value, tuple):
        # The launcher specialises the elements of a tuple whatever the kernel says.
        return tuple(_argument_type(v, (*path, i), True, "", constants, attributes) for i, v in enumerate(value))
    if value is None or (type(value) is int and value == 1 and specialise):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + _TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return annotated or "fp32"
    if specialise and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
}


def triton_launches(cases=None, dtypes=None, target: str = "sm_90") -> dict[str, tuple[str, Launch]]:
    """Every distinct kernel of the configurations: key -> (name of the first configuration that uses it, launch)."""
    found: dict[str, tuple[str, Launch]] = {}
    for case, dtype, call in _triton_calls(target):
        if (cases is None or case in cases) and (dtypes is None or dtype in dtypes):
            with recorded_launches() as launches:
                call()
            for launch in launches:
                found.setdefault(launch.key(), (f"{case}[{dtype}]", launch))
    return found


def _triton_calls(target: str) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(name, dtypes, call) of every configuration of every family, as the target runs it."""
    from genfast.kernels import (
        attention,
        attention_configurations,
        code_update,
        code_update_configurations,
        configurations,
        gradient_bucket,
        gradient_configurations,
        scalar_quantize,
        scalar_quantize_configurations,
        token_configurations,
        vector_quantize,
        vector_quantize_configurations,
    )
    from genfast.kernels.attention_cached import attention_cached, cache_write
    from genfast.kernels.sampler_step import sampler_step
    from genfast.kernels.token_head import lm_head_partials, merge_head_partials
    from genfast.kernels.token_masking import forward_mask
    from genfast.kernels.token_sampling import sample_tokens
    from genfast.kernels.token_transfer import commit_, select_transfer
    from genfast.kernels.token_transition import discrete_transition

    for case in configurations.CASES:
        for dtypes in configurations.DTYPES:
            args, options = configurations.arguments(case, dtypes)
            yield case.name, dtypes, functools.partial(sampler_step, *args, **options)
    for name in token_configurations.CASES:
        for dtype in token_configurations.DTYPES:
            logits, options = token_configurations.arguments(name, dtype)
            yield name, dtype, functools.partial(sample_tokens, logits, **options)
    for name in token_configurations.HEADS:
        for dtype in token_configurations.DTYPES:
            calls = token_configurations.head_arguments(name, dtype)
            for function, (args, options) in zip((lm_head_partials, merge_head_partials), calls):
                yield name, dtype, functools.partial(function, *args, **options)
    for name in token_configurations.TRANSFERS:
        args, options = token_configurations.transfer_arguments(name)
        yield name, "fp32", functools.partial(select_transfer, *args, **options)
    args, options = token_configurations.commit_arguments()
    yield "commit", "fp32", functools.partial(commit_, *args, **options)
    for name in token_configurations.MASKS:
        x0, options = token_configurations.mask_arguments(name)
        yield name, "fp32", functools.partial(forward_mask, x0, **options)
    for name in token_configurations.TRANSITIONS:
        for dtype in token_configurations.DTYPES:
            args, options = token_configurations.transition_arguments(name, dtype)
            yield name, dtype, functools.partial(discrete_transition, *args, **options)
    for name in attention_configurations.CASES:
        for dtype in attention_configurations.DTYPES:
            op, args, options = attention_configurations.arguments(name, dtype)
            yield name, dtype, functools.partial(getattr(attention, op), *args, **options, target=target)
    for name in attention_configurations.CACHED:
        for dtype in attention_configurations.DTYPES:
            args, options = attention_configurations.cached_arguments(name, dtype)
            yield name, dtype, functools.partial(attention_cached, *args, **options, target=target)
    for name in attention_configurations.WRITES:
        for dtype in attention_configurations.DTYPES:
            args, options = attention_configurations.write_arguments(name, dtype)
            yield f"write_{name}", dtype, functools.partial(cache_write, *args, **options)
    for name in vector_quantize_configurations.CASES:
        for dtype in vector_quantize_configurations.DTYPES:
            args, options = vector_quantize_configurations.arguments(name, dtype)
            yield name, dtype, functools.partial(vector_quantize.nearest_code, *args, **options, target=target)
    for name in code_update_configurations.CASES:
        for dtype in code_update_configurations.DTYPES:
            op, args, options = code_update_configurations.arguments(name, dtype)
            yield name, dtype, functools.partial(getattr(code_update, op), *args, **options)
    for name in scalar_quantize_configurations.CASES:
        for dtype in scalar_quantize_configurations.DTYPES:
            op, args, options = scalar_quantize_configurations.arguments(name, dtype)
            yield name, dtype, functools.partial(getattr(scalar_quantize, op), *args, **options)
    for name in gradient_configurations.CASES:
        for dtype in gradient_configurations.DTYPES:
            for op, (args, options) in gradient_configurations.arguments(name, dtype).items():
                yield name, dtype, functools.partial(getattr(gradient_bucket, op), *args, **options)


def compile_launch(launch: Launch, target: str):
    """The compiled kernel for ``sm_XX`` or ``gfxXXX``; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=gpu, options=launch.options)


def triton_rows(targets=TARGETS, cases=None, dtypes=None) -> Iterator[Row]:
    for target in targets:
        for name, launch in triton_launches(cases, dtypes, target).values():
            compiled = compile_launch(launch, target)
            registers, spilled = _amd_usage(compiled) if target.startswith("gfx") else _nvidia_usage(compiled)
            yield Row(name, launch.kernel.__name__, target, registers, spilled, compiled.metadata.shared)


def _amd_usage(compiled) -> tuple[int, int]:
    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))

    # Scalar registers may spill to lanes of vector registers; what hurts is memory, the private segment.
    return field("vgpr_count"), field("private_segment_fixed_size")


def _nvidia_usage(compiled) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def cuobjdump() -> str:
    """The cuobjdump that Triton brings along, or else the one on the PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if not found:
        raise RuntimeError("cuobjdump is neither in the triton package nor on the PATH: no way to read registers")
    return found


# --- CUDA ------------------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """nvcc on the PATH, under CUDA_HOME, or in /usr/local/cuda; None if there is none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    candidate = home / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(candidate) if candidate.exists() else None)


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def cuda_rows(source: Path, nvcc: str, targets=NVIDIA) -> list[Row]:
    """Compile one file for all targets; one row per kernel and target."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-Xcompiler", "-fPIC",
            "-I", str(ROOT / "csrc"), "--threads", "0",
            *(f"-gencode=arch=compute_{t[3:]},code={t}" for t in targets),
            "-c", str(source), "-o", str(Path(folder, "out.o")),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr}")
    return _parse_ptxas(source.name, done.stdout + done.stderr)


def _parse_ptxas(source: str, log: str) -> list[Row]:
    rows, spilled, kernel = [], 0, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, target, spilled = entry.group(1), entry.group(2), 0
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spill.group(1)) + int(spill.group(2))
        elif (used := re.search(r"Used (\d+) registers", line)) and kernel:
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append(
                Row(
                    source,
                    _demangled(kernel),
                    target,
                    int(used.group(1)),
                    spilled,
                    int(shared.group(1)) if shared else 0,
                )
            )
            kernel = None
    return rows


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    full = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    short = full.removeprefix("void ").replace("(anonymous namespace)::", "").replace("genfast::", "")
    return re.split(r"\((?:StepArgs|double|Selection|TensorList|Wire|Sums)", short)[0]


# --- report ----------------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few configurations instead of all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target (may be repeated)")
    parser.add_argument("--skip", action="append", choices=("triton", "cuda"), default=[], help="leave a part out")
    options = parser.parse_args(argv)
    targets = tuple(options.target or TARGETS)
    rows: list[Row] = []

    def show(found):
        for row in found:
            rows.append(row)
            names = f"{row.source:42} {row.kernel[:60]:60} {row.target:7}"
            print(f"{names} {row.registers:5d} {row.spilled:6d} {row.shared:7d}", flush=True)

    print(f"{'configuration or file':42} {'kernel':60} {'target':7} {'regs':>5} {'spills':>6} {'shared':>7}")
    if "triton" not in options.skip:
        names = (
            QUICK_CASES + QUICK_TOKEN_CASES + QUICK_HEAD_CASES + QUICK_ATTENTION_CASES + QUICK_CODE_CASES
            + QUICK_BUCKET_CASES
        )  # fmt: skip
        quick = (names, (*QUICK_DTYPES, "bf16"))
        show(triton_rows(targets, *(quick if options.quick else ())))
    if "cuda" not in options.skip:
        nvcc, wanted = find_nvcc(), [t for t in targets if t in NVIDIA]
        if nvcc is None:
            print("csrc/cuda is left out: nvcc is neither on the PATH, nor under CUDA_HOME, nor in /usr/local/cuda")
        elif wanted:
            for source in cuda_sources():
                show(cuda_rows(source, nvcc, wanted))
    spilling = sum(row.spilled > 0 for row in rows)
    print(f"{len(rows)} kernels compiled, {spilling} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
