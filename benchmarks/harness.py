"""What a benchmark case is, and how it becomes rows: measured in turn with its peers, judged against its bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.floor import copies
from benchmarks.timing import Run


@dataclass(frozen=True)
class Settings:
    """One run of the command: the device, and how long a case may take."""

    device: torch.device
    quick: bool = False

    @property
    def seconds(self) -> float:
        return 0.3 if self.quick else 2.5

    @property
    def least_rounds(self) -> int:
        return 3 if self.quick else 5

    most_rounds: int = 400


@dataclass(frozen=True)
class Bar:
    """A figure that a case has to reach: ``at_least`` or ``at_most`` of a quantity of its row."""

    quantity: str
    """``ratio``, ``floor_percent``, ``our_us``, ``extra_bytes`` (our peak memory beyond the outputs), or one of the
    case's ``counts``."""
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        text, unit = {
            "ratio": ("", "x"),
            "floor_percent": ("floor ", "%"),
            "our_us": ("", " us"),
            "extra_bytes": ("extra ", " B"),
        }.get(self.quantity, (f"{self.quantity} ", ""))
        if self.at_least is not None:
            return f"{text}>={self.at_least:g}{unit}"
        return f"{text}<={self.at_most:g}{unit}"

    def met(self, value: float | None) -> bool | None:
        """Whether ``value`` reaches the bar; None if there is no value to judge."""
        if value is None:
            return None
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


@dataclass(frozen=True)
class Peer:
    """Another implementation of the same case.

    ``run`` takes the same numbers as ours (see :data:`benchmarks.timing.Run`). ``missing`` says why there is none.
    """

    name: str
    version: str = ""
    run: Run | None = None
    check: Callable[[], Tensor] | None = None
    """What to compare with the exact result, where ``run(0)`` draws random numbers of its own."""
    bars: tuple[Bar, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Case:
    """One comparison: our call, the peers' calls, and what is known about the best possible."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    run: Run
    exact: Callable[[], Tensor]
    """The result of call number 0 in float64."""
    copy_dtype: torch.dtype = torch.float32
    """Of the copies that set the floor."""
    copy_shape: tuple[int, ...] | None = None
    """Of one such copy; that of the case by default."""
    peers: Sequence[Peer] = ()
    bytes: int = 0
    """What one call must read and write at the least; 0 where nobody has counted it."""
    output_bytes: int = 0
    bars: tuple[Bar, ...] = ()
    backend: str = ""
    note: str = ""
    allowed: float | None = None
    """The relative error that ours may have; by default :func:`allowed_error` of the peers'."""
    counts: Callable[[], dict[str, float]] | None = None
    """Further figures about our call, for the report (launches, replay time, ...)."""


@dataclass
class Row:
    """One line of the report: one case against one peer (or against none)."""

    family: str
    case: str
    shape: str
    dtype: str
    backend: str
    peer: str
    peer_version: str
    peer_ms: float | None = None
    our_ms: float | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    floor_ms: float | None = None
    floor_percent: float | None = None
    copy_gb_per_s: float | None = None
    our_error: float | None = None
    peer_error: float | None = None
    accurate: bool | None = None
    our_peak_bytes: int | None = None
    peer_peak_bytes: int | None = None
    rounds: int = 0
    bar: str = ""
    bar_met: bool | None = None
    missing: str = ""
    failed: str = ""
    note: str = ""
    counts: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A case that is built when its turn comes, so that one case's tensors are not held during the next."""

    name: str
    build: Callable[[], Case]


def rows(family: str, plans: Sequence[Plan], settings: Settings) -> Iterator[Row]:
    """Measure the cases one after the other. A case that raises gives a row that says so."""
    for plan in plans:
        try:
            case = plan.build()
            yield from measure(family, case, settings)
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            yield Row(family, plan.name, "", "", "", "", "", failed=message)


def measure(family: str, case: Case, settings: Settings) -> list[Row]:
    """The rows of one case: one per peer that could be run or is missing, or a single one without peers."""
    device = settings.device
    present = [peer for peer in case.peers if peer.run is not None]

    exact = case.exact().double()
    our_error = relative_error(case.run(0), exact)
    peer_errors = [relative_error(peer.check() if peer.check else peer.run(0), exact) for peer in present]
    our_peak = timing.peak_bytes(lambda: case.run(0), device)
    peer_peaks = [timing.peak_bytes(lambda p=peer: p.run(0), device) for peer in present]
    counts = case.counts() if case.counts else {}

    plain = copies(case.copy_shape or case.shape, case.copy_dtype, device) if case.bytes else None
    runs = [case.run, *(peer.run for peer in present), *(plain.runs.values() if plain else ())]
    times, _ = timing.interleave(
        runs, device, seconds=settings.seconds, least=settings.least_rounds, most=settings.most_rounds
    )
    ours = times[0]
    common = dict(
        our_ms=float(np.median(ours)) * 1e3,
        our_error=our_error,
        our_peak_bytes=our_peak,
        rounds=times.shape[1],
        note=case.note,
        counts=counts,
    )
    if plain:
        fastest = min(times[1 + len(present) :], key=np.median)
        floor = fastest * (case.bytes / plain.bytes)
        common.update(
            floor_ms=float(np.median(floor)) * 1e3,
            floor_percent=timing.paired_ratio(floor, ours)[0] * 100,
            copy_gb_per_s=plain.bytes / float(np.median(fastest)) / 1e9,
        )

    head = (family, case.name, "x".join(map(str, case.shape)), case.dtype, case.backend)
    # Ours has a bar of its own (floor, microseconds, memory): it stands in the first row, whatever the peer.
    own_bars = case.bars
    found = []
    for peer in case.peers or [Peer("-")]:
        row = Row(*head, peer.name, peer.version, missing=peer.missing, **common)
        if peer.run is not None:
            k = present.index(peer)
            row.peer_ms = float(np.median(times[1 + k])) * 1e3
            row.ratio, *quartiles = timing.paired_ratio(times[1 + k], ours)
            row.ratio_quartiles = tuple(quartiles)
            row.peer_error, row.peer_peak_bytes = peer_errors[k], peer_peaks[k]
            row.accurate = our_error <= (case.allowed or allowed_error(max(peer_errors), case.dtype))
        judge(row, (*peer.bars, *own_bars), case.output_bytes)
        own_bars = ()
        found.append(row)
    return found


def judge(row: Row, bars: Sequence[Bar], output_bytes: int = 0) -> None:
    """Fill in ``bar`` and ``bar_met``: met if every bar is, None if there is none or one cannot be judged."""
    values = {
        "ratio": row.ratio,
        "floor_percent": row.floor_percent,
        "our_us": None if row.our_ms is None else row.our_ms * 1e3,
        "extra_bytes": None if row.our_peak_bytes is None else max(0, row.our_peak_bytes - output_bytes),
        **row.counts,
    }
    row.bar = ", ".join(map(str, bars))
    verdicts = [bar.met(values[bar.quantity]) for bar in bars]
    if verdicts:
        row.bar_met = False if False in verdicts else None if None in verdicts else True


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the exact result; infinite if something is NaN."""
    scale = max(float(exact.abs().max()), torch.finfo(torch.float64).tiny)
    error = float((result.double() - exact).abs().max()) / scale
    return error if error == error else float("inf")


def allowed_error(peer_error: float, dtype: str) -> float:
    """Twice the peer's error, plus one rounding of the largest result in the dtype of the result."""
    return 2 * peer_error + torch.finfo(DTYPES[dtype][0]).eps


DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32+bf16": (torch.float32, torch.bfloat16),
}
"""Name of a case's dtype: (of the state and the result, of the model's output)."""
