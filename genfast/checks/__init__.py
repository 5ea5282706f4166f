"""Kernels against their references, on the user's own machine: what ``genfast verify`` runs and the tests build on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import TextIO

import torch

from genfast import backends
from genfast._registry import export
from genfast.backends import parts as parts_of


@export("package")
def verify(
    families: Iterable[str] | None = None,
    *,
    backends: Iterable[str] | None = None,
    quick: bool = False,
    file: TextIO | None = None,
) -> bool:
    """Run every family's kernels against its float64 reference on this machine, and print a verdict per case.

    An error is allowed to be twice that of the plain PyTorch implementation in the same dtypes, plus one rounding of
    the largest result. Random words and normals must agree to the bit.

    Args:
        families: names such as ``"sampler_step"``; all by default.
        backends: of ``cpu``, ``triton``, ``cuda``; all that run here by default. ``cpu`` is checked once per
            instruction set that the machine has; ``triton`` needs a GPU or ``TRITON_INTERPRET=1``.
        quick: a subset of the cases.
        file: where to print, standard output by default.

    Returns:
        True if every case passed, and there was one: a machine on which no fused backend runs has verified nothing.

    Raises:
        ValueError: an unknown family or backend.
        BackendUnavailable: a backend was named that cannot run here.
    """
    file = file or sys.stdout
    places = list(_places(None if backends is None else list(backends)))
    wanted = list(families) if families is not None else list(_known_families())
    for family in wanted:
        if family not in _known_families():
            raise ValueError(f"families must be among {', '.join(_known_families())}; got {family!r}")
    header = f"{'family':<14} {'backend':<12} {'case':<46} {'error':>10} {'allowed':>10}  verdict"
    print(header, "-" * len(header), sep="\n", file=file)
    failed = total = 0
    for family in wanted:
        modules = [importlib.import_module(f"genfast.checks.{part}") for part in parts_of(family)]
        for label, context, device in places:
            with context():
                for module, case in ((m, c) for m in modules for c in m.cases(quick=quick)):
                    error, allowed = module.check(case, device)
                    passed = error <= allowed
                    total, failed = total + 1, failed + (not passed)
                    verdict = "ok" if passed else "FAILED"
                    print(
                        f"{family:<14} {label:<12} {case.name:<46} {error:10.2e} {allowed:10.2e}  {verdict}", file=file
                    )
    if not places:
        print("no fused backend runs on this machine; `genfast doctor` says why", file=file)
    print(f"{total} cases, {failed} failed", file=file)
    return total > 0 and failed == 0


def _known_families() -> tuple[str, ...]:
    return backends.FAMILIES


def _places(names: list[str] | None):
    """(label, context manager, device) of every backend to check."""
    for name in names or []:
        backends.checked_name(name, "backends")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name in ("cpu", "triton", "cuda"):
            if names is not None and name not in names:
                continue
            if backends.missing(name, device) is not None:
                continue
            if name == "cpu":
                for isa in backends.machine_isas():
                    yield f"cpu[{isa}]", lambda isa=isa: backends.instruction_set(isa), device
            else:
                yield f"{name}", lambda name=name: backends.backend(name), device
    for name in names or []:
        if all(backends.missing(name, d) for d in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))):
            raise backends.BackendUnavailable(f"backend {name!r} was asked for, but {backends.missing(name, 'cpu')}")


def compare(got: torch.Tensor, oracle: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """Largest error of ``got`` and what is allowed: twice that of ``plain``, plus one rounding; NaN must match NaN.

    In float64 the oracle is no better than what it judges, so a few roundings of each are allowed instead.
    """
    eps = torch.finfo(got.dtype).eps * (8 if got.dtype == torch.float64 else 1)
    odd = ~torch.isfinite(oracle)
    if odd.any():
        same = torch.equal(got[odd].double().nan_to_num(), oracle[odd].nan_to_num())
        if not same or not torch.equal(got.isnan(), oracle.isnan()):
            return float("inf"), 0.0
    if odd.all():
        return 0.0, 0.0
    got, oracle, plain = got[~odd].double(), oracle[~odd], plain[~odd].double()
    error = (got - oracle).abs().max().item()
    # NaN compares false with everything, so a NaN of ours must not pass for a small error.
    error = float("inf") if error != error else error
    return error, 2 * (plain - oracle).abs().nan_to_num().max().item() + eps * oracle.abs().max().item()
