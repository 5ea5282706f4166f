"""``python -m benchmarks [FAMILY ...] [--device cpu|cuda] [--json FILE] [--plot FILE] [--quick] [--only TEXT]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks import report, timing
from benchmarks.harness import Row, Settings, rows
from genfast import backends

FAMILIES = ("dropin", *backends.FAMILIES)
"""The drop-ins come first: what they are measured under cannot be restored after the ops have changed it."""

BUSY = 0.3
"""Load per core before the start from which the report warns: parallel code waits for its slowest thread."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; the exit code is 0 if all ran, all errors were in bounds and (full runs) all bars met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="genfast side by side with its peers and the physical floor"
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the environment to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="of the ratios (default: build/bench_FAMILY.png)")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that all runs, and fails for no bar")
    parser.add_argument("--only", metavar="TEXT", help="only the cases with TEXT in their name")
    options = parser.parse_args(arguments)
    for family in options.families:
        if family not in FAMILIES:
            parser.error(f"FAMILY must be one of {', '.join(FAMILIES)}; got {family!r}")
    families = [family for family in FAMILIES if not options.families or family in options.families]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no GPU here")
    settings = Settings(torch.device(options.device), options.quick)

    load = report.load()
    everything: list[Row] = []
    summaries, messages = [], []
    print(report.header(), flush=True)
    for family in families:
        begin = time.perf_counter()
        module = importlib.import_module(f"benchmarks.{family}")
        if getattr(module, "KEEP_FREED_MEMORY", True):
            timing.keep_freed_memory()
        plans = module.plans(settings)
        chosen = [plan for plan in plans if options.only is None or options.only in plan.name]
        if not chosen:
            names = ", ".join(dict.fromkeys(plan.name for plan in plans))
            parser.error(f"--only {options.only!r} leaves no case of {family}, which has: {names}")
        measured: list[Row] = []
        with torch.no_grad():
            for row in rows(family, chosen, settings):
                print(report.line(row), flush=True)
                measured.append(row)
        if hasattr(module, "closing"):
            messages.append(module.closing(measured))
        summaries.append(report.summary(family, measured, time.perf_counter() - begin))
        messages.append(report.plot(plot_path(options.plot, family, len(families)), family, measured, settings))
        everything += measured
    print(*(["notes", *report.notes(everything)] if report.notes(everything) else []), *messages, sep="\n")
    if load is not None and load > BUSY:
        print(f"other work kept the machine busy before the start (load {load:.2f} per core): times mean little")
    if options.json is not None:
        report.write_json(options.json, everything, settings, summaries, load)
        print(f"rows: {options.json}")
    print(*summaries, sep="\n")
    return 0 if report.passed(everything, settings) else 1


def plot_path(given: Path | None, family: str, families: int) -> Path:
    """Where the plot of a family goes: one file each, also when one name was given for several."""
    if given is None:
        return Path("build") / f"bench_{family}.png"
    return given if families == 1 else given.with_name(f"{given.stem}_{family}{given.suffix}")


if __name__ == "__main__":
    sys.exit(main())
