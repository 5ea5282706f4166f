"""Which code runs an op: the choice of backend, the native modules, and the reasons when something is missing.

Each backend offers a family as a module with one function per op, all of the same signature:

========== ============================================ =======================================================
backend    module                                       runs on
========== ============================================ =======================================================
reference  ``genfast.reference.FAMILY``                 any device, plain PyTorch
cpu        ``genfast.native.FAMILY`` over ``_cpu_*``    CPU tensors
triton     ``genfast.kernels.FAMILY``                   CUDA tensors; CPU tensors under ``TRITON_INTERPRET=1``
cuda       ``genfast.native.FAMILY`` over ``_cuda``     CUDA tensors
========== ============================================ =======================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from genfast import profiling
from genfast._registry import export

BACKENDS = ("reference", "cpu", "triton", "cuda")
ISAS = ("base", "avx2", "avx512", "avx512bf16", "amx")
"""Instruction sets with a native module of their own, weakest first."""
BEST_ISA = "avx512bf16"
"""The best one that is used without being ordered: ``amx`` has run on a stand-in for the tile unit only."""

FAMILIES = ("sampler_step", "token_sampling", "attention", "vector_quantize", "gradient_bucket")

PARTS = {
    "token_sampling": ("token_sampling", "token_transfer", "token_masking", "token_transition", "token_head"),
    "attention": ("attention", "attention_cached"),
    "vector_quantize": ("vector_quantize", "code_update", "residual_quantize", "scalar_quantize"),
}
"""The files in which a family of several ops is written, in every layer; by default one of the family's own name."""

# The order in which CUDA tensors are offered to the GPU backends, per family. The design asks for a measurement
# before `cuda` comes first; no GPU has been at hand for these families yet, so Triton leads.
# A family without `cuda` in its line has no CUDA C++ kernels.
CUDA_ORDER = {
    "sampler_step": ("triton", "cuda"),
    "token_sampling": ("triton",),
    "attention": ("triton",),
    "vector_quantize": ("triton",),
    "gradient_bucket": ("triton", "cuda"),
}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("genfast_backend", default=None)
_environment: str | None = os.environ.get("GENFAST_BACKEND")  # read once: a look-up per call costs as much as a step


_isa_override: str | None = None


@export("package")
class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run here; the message says why and what to do."""


@export("package")
@contextlib.contextmanager
def backend(name: str):
    """Run every op inside the ``with`` block on one backend: ``reference``, ``cpu``, ``triton`` or ``cuda``.

    The choice is an order: an op that cannot honour it raises instead of falling back. ``GENFAST_BACKEND`` sets the
    same for a whole process.

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: (from the op) the backend is not built, or does not run on the tensors' device.
    """
    token = _override.set(checked_name(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


def checked_name(name: str, source: str) -> str:
    """``name`` if it is a backend; ``source`` is the argument that the error names."""
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def override() -> str | None:
    """The backend ordered by ``with genfast.backend(...)`` or ``GENFAST_BACKEND``, or None."""
    name = _override.get()
    if name is None and _environment is not None:
        name = checked_name(_environment, "GENFAST_BACKEND")
    return name


def choose(family: str, op: str, device: torch.device) -> tuple[str, Callable]:
    """The backend for an op on a device and the function that runs it."""
    return _choose(family, op, device.type, override())


@functools.cache
def _choose(family: str, op: str, device: str, ordered: str | None) -> tuple[str, Callable]:
    if ordered is not None:
        why = missing(ordered, device)
        if ordered == "cuda" and ordered not in CUDA_ORDER[family]:
            why = f"the family {family} has no CUDA C++ kernels (its GPU kernels are Triton's)"
        function = None if why else _function(ordered, family, op)
        if function is None:
            raise BackendUnavailable(f"backend {ordered!r} was asked for, but {why or f'it has no {op}'}")
        return ordered, function
    wanted = {"cpu": ("cpu",), "cuda": CUDA_ORDER[family]}.get(device, ())
    reasons = []
    for name in wanted:
        why = missing(name, device)
        function = _function(name, family, op) if why is None else None
        if function is not None:
            return name, function
        reasons.append(f"{name}: {why or f'it has no {op}'}")
    detail = "; ".join(reasons) if reasons else f"no fused backend runs on {device} tensors"
    warnings.warn(f"genfast runs {family} through plain PyTorch ({detail}). `genfast doctor` says more.", stacklevel=5)
    return "reference", _function("reference", family, op)


def has_fused(family: str, device: str) -> bool:
    """Whether :func:`choose` would find more than plain PyTorch; True where a backend was ordered."""
    wanted = {"cpu": ("cpu",), "cuda": CUDA_ORDER[family]}.get(device, ())
    return override() is not None or any(missing(name, device) is None for name in wanted)


class HotPath:
    """The eager hot path of one op on plain CPU tensors: call it, and it runs the op or returns NotImplemented.

    Calling through ``run``, an attribute that is swapped when the choice changes, leaves no look-up on the path. An
    order by ``with genfast.backend(...)`` is read inside the native call.
    """

    def __init__(self, family: str, op: str):
        self._family, self._op = family, op
        self.forget()
        _hot_paths.append(self)

    def forget(self) -> None:
        self.run = self._first

    def _first(self, *arguments):
        # Not at import: the native module must find torch and its OpenMP runtime loaded, and the family importable.
        self.run = _not_implemented
        if not profiling.enabled and _environment in (None, "cpu") and cpu_module() is not None:
            self.run = _function("cpu", self._family, f"{self._op}_direct")
        return self.run(*arguments)


_hot_paths: list[HotPath] = []


def _not_implemented(*_):
    return NotImplemented


def parts(family: str) -> tuple[str, ...]:
    """The names of the files that hold a family's ops."""
    return PARTS.get(family, (family,))


def _function(name: str, family: str, op: str) -> Callable | None:
    """An op of a family on a backend, in whichever of the family's files it is; None if the backend lacks it."""
    found = (getattr(_module(name, part), op, None) for part in parts(family))
    return next((function for function in found if function is not None), None)


def _module(name: str, family: str):
    """The functions of a part of a family on a backend; None if the backend has no file of it."""
    module = f"genfast.{'kernels' if name == 'triton' else name}.{family}"
    if name in ("reference", "triton"):
        return importlib.import_module(module) if importlib.util.find_spec(module) else None
    native = cpu_module() if name == "cpu" else cuda_module()
    return importlib.import_module(f"genfast.native.{family}").bind(native, _override)


def missing(name: str, device: str) -> str | None:
    """Why a backend cannot run on a kind of device, as the end of a sentence; None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if device != "cpu":
            return f"it runs on cpu tensors only, not {device}"
        return None if cpu_module() else cpu_missing()
    if name == "cuda":
        if device != "cuda":
            return f"it runs on cuda tensors only, not {device}"
        return None if cuda_module() else cuda_missing()
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (`pip install triton`)"
    if device == "cuda" or (device == "cpu" and interpreting()):
        return None
    if device == "cpu":
        return "Triton kernels run on cpu tensors only in its interpreter (set TRITON_INTERPRET=1 before starting)"
    return f"it runs on cuda tensors only, not {device}"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def build_info() -> dict:
    """What ``setup.py`` wrote about the build: modules built, compilers, flags, and why a module was left out."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def native_module(name: str):
    """A native module by its short name (``cpu_avx2``, ``cuda``), or None if it was not built."""
    if importlib.util.find_spec(f"genfast._{name}") is None:
        return None
    return importlib.import_module(f"genfast._{name}")


@functools.cache
def machine_isas() -> tuple[str, ...]:
    """The instruction sets of this machine that have a built module, weakest first."""
    base = native_module("cpu_base")
    if base is None:
        return ()
    supported = set(base.supported_isas())
    return tuple(isa for isa in ISAS if isa in supported and native_module(f"cpu_{isa}") is not None)


@functools.cache
def cpu_isa() -> str | None:
    """The instruction set in use: the best one here, capped by ``GENFAST_ISA``; None without a native module."""
    if _isa_override is not None:
        return _isa_override
    cap = os.environ.get("GENFAST_ISA", BEST_ISA)
    if cap not in ISAS:
        raise ValueError(f"GENFAST_ISA must be one of {', '.join(ISAS)}; got {cap!r}")
    usable = [isa for isa in machine_isas() if ISAS.index(isa) <= ISAS.index(cap)]
    return usable[-1] if usable else None


@contextlib.contextmanager
def instruction_set(isa: str):
    """Run CPU kernels of one instruction set inside the block: for tests and ``genfast verify``, not for threads."""
    global _isa_override
    if isa not in machine_isas():
        raise BackendUnavailable(
            f"instruction set {isa!r} was asked for; here are {', '.join(machine_isas()) or 'none'}"
        )
    before, _isa_override = _isa_override, isa
    _forget_choices()
    try:
        yield
    finally:
        _isa_override = before
        _forget_choices()


def cpu_module():
    """The native CPU module in use, or None."""
    isa = cpu_isa()
    return native_module(f"cpu_{isa}") if isa else None


def cuda_module():
    """The native CUDA module, or None."""
    return native_module("cuda")


def cpu_missing() -> str:
    why = build_info().get("missing", {}).get("cpu", "this copy of genfast was never built")
    return f"the native module is not built: {why} (reinstall with a C++ compiler on the PATH)"


def cuda_missing() -> str:
    why = build_info().get("missing", {}).get("cuda", "this copy of genfast was never built")
    return f"the CUDA module is not built: {why} (reinstall with nvcc on the PATH)"


def reset() -> None:
    """Forget cached choices, after the environment or the built modules have changed (tests use this)."""
    global _environment
    _environment = os.environ.get("GENFAST_BACKEND")
    for cached in (build_info, native_module, machine_isas):
        cached.cache_clear()
    _forget_choices()


def _forget_choices() -> None:
    """Resolve again at the next call: after another instruction set, environment or profiling setting."""
    for cached in (_choose, cpu_isa):
        cached.cache_clear()
    for path in _hot_paths:
        path.forget()


profiling.on_change = _forget_choices
