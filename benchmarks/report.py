"""What the command leaves behind: a table, one line per family, a JSON file and a plot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import genfast
from benchmarks.harness import Row, Settings
from genfast import backends

COLUMNS = (
    ("case", 36),
    ("shape", 12),
    ("dtype", 9),
    ("backend", 9),
    ("peer", 44),
    ("peer ms", 9),
    ("our ms", 9),
    ("ratio", 7),
    ("floor ms", 8),
    ("% floor", 7),
    ("our err", 8),
    ("peer err", 8),
    ("our MiB", 7),
    ("peer MiB", 8),
    ("bar", 25),
    ("met", 3),
)
LEFT = {"case", "shape", "dtype", "backend", "peer", "bar", "met"}


def header() -> str:
    """The table's first two lines."""
    line = "  ".join(f"{name:{'<' if name in LEFT else '>'}{width}}" for name, width in COLUMNS)
    return f"{line}\n{'-' * len(line)}"


def line(row: Row) -> str:
    """One row of the table."""
    if row.failed:
        return f"{row.case:<{COLUMNS[0][1]}}  FAILED: {row.failed}"
    cells = {
        "case": row.case,
        "shape": row.shape,
        "dtype": row.dtype,
        "backend": row.backend,
        "peer": f"{row.peer} {row.peer_version}".strip() if not row.missing else f"{row.peer}: {row.missing}",
        "peer ms": _number(row.peer_ms, ".4g"),
        "our ms": _number(row.our_ms, ".4g"),
        "ratio": _number(row.ratio, ".3g"),
        "floor ms": _number(row.floor_ms, ".4g"),
        "% floor": _number(row.floor_percent, ".0f"),
        "our err": _number(row.our_error, ".1e"),
        "peer err": _number(row.peer_error, ".1e"),
        "our MiB": _number(_mib(row.our_peak_bytes), ".4g"),
        "peer MiB": _number(_mib(row.peer_peak_bytes), ".4g"),
        "bar": row.bar or "-",
        "met": verdict(row),
    }
    return "  ".join(f"{cells[name]:{'<' if name in LEFT else '>'}{width}}" for name, width in COLUMNS)


def verdict(row: Row) -> str:
    """``yes``, ``NO`` or ``?`` (not judged) for the bar, with a mark where our error is too large."""
    words = {True: "yes", False: "NO", None: "?" if row.bar else "-"}[row.bar_met]
    return f"{words} (ERROR)" if row.accurate is False else words


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be said about single cases, each remark once with the cases that it is about."""
    found: dict[str, list[str]] = {}
    for row in rows:
        counts = ", ".join(f"{name} {value:.4g}" for name, value in row.counts.items())
        text = "; ".join(part for part in (row.note, counts) if part)
        cases = found.setdefault(text, [])
        if row.case not in cases:
            cases.append(row.case)
    return [f"  {'; '.join(cases)}: {text}" for text, cases in found.items() if text]


def summary(family: str, rows: Sequence[Row], seconds: float) -> str:
    """One line: how many bars are met, which are not, the typical ratio, errors, missing peers, failures."""
    barred = [row for row in rows if row.bar]
    met = [row for row in barred if row.bar_met]
    missed = [f"{row.case} {row.shape} {row.dtype} vs {row.peer}" for row in barred if row.bar_met is False]
    unjudged = [row for row in barred if row.bar_met is None]
    ratios = [row.ratio for row in rows if row.ratio is not None]
    parts = [f"{len(rows)} rows", f"{len(met)} of {len(barred)} bars met"]
    if missed:
        parts.append("MISSED: " + "; ".join(missed))
    if unjudged:
        parts.append(f"{len(unjudged)} not judged")
    if ratios:
        parts.append(f"median ratio {float(np.median(ratios)):.3g}x")
    wrong = [row.case for row in rows if row.accurate is False]
    parts.append("ERROR TOO LARGE: " + "; ".join(wrong) if wrong else "errors within bounds")
    missing = sorted({row.missing for row in rows if row.missing})
    if missing:
        parts.append("missing peers: " + "; ".join(missing))
    failed = [row.case for row in rows if row.failed]
    if failed:
        parts.append("FAILED: " + "; ".join(failed))
    return f"{family}: {', '.join(parts)}, {seconds:.0f} s"


def passed(rows: Sequence[Row], settings: Settings) -> bool:
    """Whether the command succeeds: every case ran, no error too large, and (not under --quick) no bar missed."""
    good = not any(row.failed or row.accurate is False for row in rows)
    # A quick run measures too little to judge a bar by.
    return good and (settings.quick or not any(row.bar_met is False for row in rows))


def environment(settings: Settings) -> dict:
    """Machine, driver and versions: what a figure means nothing without."""
    found = {
        "genfast": genfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instruction_set": backends.cpu_isa(),
        "device": settings.device.type,
        "quick": settings.quick,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    for package in ("triton", "diffusers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if settings.device.type == "cuda":
        properties = torch.cuda.get_device_properties(settings.device)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def load() -> float | None:
    """Processes that wanted to run in the last minute, per core; None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def write_json(
    path: Path, rows: Sequence[Row], settings: Settings, summaries: Sequence[str], load_before: float | None
) -> None:
    """All rows with the environment: {"environment": {...}, "rows": [...], "summaries": [...]}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment(settings) | {"load_per_core_before": load_before},
        "rows": [row.to_json() for row in rows],
        "summaries": list(summaries),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, family: str, rows: Sequence[Row], settings: Settings) -> str:
    """Draw the ratios as bars, with the required ratio marked; the sentence to print about it."""
    drawn = [row for row in rows if row.ratio is not None]
    if not drawn:
        return f"no plot of {family}: no peer was measured"
    try:
        import matplotlib
    except ImportError:
        return f"no plot of {family}: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.34 * len(drawn)), layout="constrained")
    places = np.arange(len(drawn))[::-1]
    colours = ["tab:red" if row.bar_met is False else "tab:blue" if row.bar else "tab:gray" for row in drawn]
    axes.barh(places, [row.ratio for row in drawn], color=colours, height=0.7)
    for place, row in zip(places, drawn):
        required = required_ratio(row)
        if required is not None:
            axes.plot([required] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        axes.text(row.ratio, place, f" {row.ratio:.3g}x", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [f"{row.case} {row.shape} {row.dtype}\nvs {row.peer}" for row in drawn], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("peer's time / genfast's time (log scale; black mark: required; gray: no requirement)")
    facts = environment(settings)
    machine = facts.get("gpu") or facts["processor"]
    quick = ", quick" if settings.quick else ""
    axes.set_title(f"{family} on {machine}, {facts['threads']} threads, torch {facts['torch']}{quick}", fontsize=9)
    axes.margins(x=0.12, y=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"plot of {family}: {path}"


def required_ratio(row: Row) -> float | None:
    """The ratio in the row's bar, if it has one."""
    for part in row.bar.split(", "):
        if part.startswith(">=") and part.endswith("x"):
            return float(part[2:-1])
    return None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
