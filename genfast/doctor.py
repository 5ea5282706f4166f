"""What ``genfast doctor`` prints: which backends are there, which instruction set was chosen, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator

import torch

from genfast import backends

OPTIONAL = {
    "triton": "the Triton backend",
    "nvtx": "ranges under nsys",
    "tqdm": "progress bars of the samplers",
    "scipy": "the beta spacing of the samplers",
    "sklearn": "the demo",
    "PIL": "the demo's pictures",
    "diffusers": "benchmarks and tests against it",
    "matplotlib": "plots of the benchmarks",
}
VARIABLES = {
    "GENFAST_BACKEND": f"one of {', '.join(backends.BACKENDS)}: run everything there",
    "GENFAST_ISA": f"one of {', '.join(backends.ISAS)}: the best instruction set that the CPU backend may use",
}


def report() -> Iterator[str]:
    """The lines of the report."""
    from genfast import __version__

    yield f"genfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {sys.platform}"
    yield f"installed in {os.path.dirname(__file__)}"
    yield ""
    yield "CPU"
    here = backends.machine_isas()
    chosen = backends.cpu_isa()
    if chosen is None:
        yield f"  not available: {backends.cpu_missing()}"
    else:
        cap = os.environ.get("GENFAST_ISA")
        why = f"capped by GENFAST_ISA={cap}" if cap else "the best that this machine and this build share"
        yield f"  instruction set {chosen}: {why} (here: {', '.join(here)})"
        threads = backends.cpu_module().openmp()
        if threads:
            yield f"  threads {threads}, through torch's own OpenMP runtime; torch.set_num_threads governs them"
        else:
            yield "  threads 1: no OpenMP runtime was found in the process"
    for isa in backends.ISAS:
        if isa not in here:
            yield f"  {isa}: {_why_no_isa(isa)}"
    yield ""
    yield "CUDA"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            name, capability = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
            yield f"  device {i}: {name}, compute capability {capability[0]}.{capability[1]}"
    else:
        yield "  no device that torch can use"
    built = backends.cuda_module() is not None
    yield f"  module {'built' if built else 'missing: ' + backends.cuda_missing()}"
    yield ""
    yield "Backends, in the order in which they are tried"
    for device in ("cpu", "cuda"):
        for family in backends.FAMILIES:
            yield f"  {device} tensors, {family}:"
            order = ("cpu", "triton") if device == "cpu" else backends.CUDA_ORDER[family]
            for name in (*order, "reference"):
                why = backends.missing(name, device)
                if device == "cuda" and not torch.cuda.is_available():
                    why = why or "there is no CUDA device"
                yield f"    {name:<10} {'yes' if why is None else 'no: ' + why}"
    yield ""
    yield "Environment"
    for name, meaning in VARIABLES.items():
        yield f"  {name}={os.environ.get(name, '(not set)')}  ({meaning})"
    yield ""
    yield "Optional"
    for name, purpose in OPTIONAL.items():
        yield f"  {name:<11} {_version(name):<12} {purpose}"
    yield f"  {'nsys':<11} {'yes' if shutil.which('nsys') else 'no':<12} genfast profile, on NVIDIA GPUs"
    info = backends.build_info()
    if info.get("compiler"):
        yield ""
        yield f"Built by {info['compiler']}"
        for name, flags in info.get("flags", {}).items():
            yield f"  {name}: {flags}"


def _why_no_isa(isa: str) -> str:
    base = backends.native_module("cpu_base")
    if backends.native_module(f"cpu_{isa}") is None:
        reason = backends.build_info().get("missing", {}).get(f"cpu_{isa}")
        return f"module not built: {reason}" if reason else "no kernel of this version needs a module of its own"
    return "not on this machine" if base and isa not in base.supported_isas() else "not used"


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "no"
    distribution = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "yes"
