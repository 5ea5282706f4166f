"""The drop-in schedulers beside the classes of diffusers that they stand in for: ``step`` as a user calls it.

A loop of ``step`` calls, output objects included, on model outputs made beforehand; ``set_timesteps`` and
``scale_model_input`` are outside. The C library is left as it is, for that is how users run: the peers' temporaries
cost page faults at the large shape. One row per scheduler, shape and source of noise; the command ends with the table
sorted by ratio, worst first.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks import dropin_tokens, peers
from benchmarks.harness import Bar, Case, Peer, Plan, Row, Settings
from benchmarks.rotation import pool
from benchmarks.sampler_step import LARGE, SMALL, backend_name

KEEP_FREED_MEMORY = False
"""See :func:`benchmarks.timing.keep_freed_memory`."""

SEED = 7
ULPS = 64
"""How far from the peer's loop ours may end, in units of the last place of its largest number."""


@dataclass(frozen=True)
class Entry:
    """A scheduler, and how a loop of it is run."""

    name: str
    stochastic: bool = False
    small_bar: float | None = None
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    set_up: Callable = lambda scheduler, steps: scheduler.set_timesteps(steps)
    advance: Callable | None = None
    """(scheduler, model output, t, x, options) -> output object; ``step`` by default."""
    seeded: bool = True
    """Whether ours can draw its noise in the kernel."""
    large_steps: int | None = None
    """Fewer steps for one that takes a second each at the large shape."""

    @property
    def label(self) -> str:
        settings = {**self.config, **self.options}
        return " ".join([self.name, *(v if isinstance(v, str) else f"{k}={v}" for k, v in settings.items())])


def _repaint(scheduler, output, t, x, options):
    return scheduler.step(output, t, x, x, _ones(x), **options)


@functools.lru_cache(maxsize=2)
def _mask(shape, device):
    return torch.ones(shape, device=device)


def _ones(x):
    return _mask(tuple(x.shape), x.device)


def _score_sde(scheduler, steps):
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)


ENTRIES = (
    Entry("DDIM", small_bar=5),
    Entry("DDIM", stochastic=True, options={"eta": 1.0}),
    Entry("DDIMInverse"),
    Entry("DDIMParallel"),
    Entry("EulerDiscrete", small_bar=5),
    Entry("HeunDiscrete", small_bar=5),
    Entry("KDPM2Discrete"),
    Entry("LMSDiscrete", small_bar=50),
    Entry("PNDM"),
    Entry("DPMSolverMultistep", small_bar=8),
    Entry("DPMSolverMultistepInverse"),
    Entry("DPMSolverSinglestep"),
    Entry("UniPCMultistep", small_bar=12),
    Entry("DEISMultistep"),
    Entry("EDMEuler"),
    Entry("EDMDPMSolverMultistep"),
    Entry("FlowMatchEulerDiscrete", small_bar=5),
    Entry("FlowMatchHeunDiscrete"),
    Entry("DDPM", stochastic=True),
    Entry("DDPMParallel", stochastic=True),
    Entry("EulerAncestralDiscrete", stochastic=True),
    Entry("KDPM2AncestralDiscrete", stochastic=True),
    Entry("DPMSolverMultistep", stochastic=True, config={"algorithm_type": "sde-dpmsolver++"}),
    # Seeded, or each loop would walk a Brownian path of its own.
    Entry("DPMSolverSDE", stochastic=True, config={"noise_sampler_seed": SEED}, seeded=False, large_steps=2),
    Entry("SASolver", stochastic=True),
    Entry("LCM", stochastic=True),
    Entry("TCD", stochastic=True),
    Entry("CMStochasticIterative", stochastic=True),
    Entry(
        "ScoreSdeVe",
        stochastic=True,
        set_up=_score_sde,
        advance=lambda scheduler, output, t, x, options: scheduler.step_pred(output, t, x, **options),
    ),
    Entry("RePaint", stochastic=True, set_up=lambda s, steps: s.set_timesteps(steps, 1, 1), advance=_repaint),
    Entry("UnCLIP", stochastic=True),
)


def plans(settings: Settings) -> list[Plan]:
    """Every scheduler at both shapes; stochastic ones with the peer's generator and with in-kernel noise."""
    steps = 4 if settings.quick else 20
    found = []
    for shape, size in ((SMALL, "small"), (LARGE, "large")):
        for entry in ENTRIES:
            for seeded in (False, True) if entry.stochastic and entry.seeded else (False,):
                noise = " seed" if seeded else " generator" if entry.stochastic else ""
                name = f"{entry.label}{noise} {size}"
                count = steps if shape == SMALL else entry.large_steps or steps
                found.append(Plan(name, functools.partial(case, settings.device, entry, shape, count, seeded)))
    return [*found, *dropin_tokens.plans(settings)]


class Loop:
    """A loop of steps of one class; ``prepare`` makes a scheduler per timed call, outside the timing."""

    def __init__(self, module, entry: Entry, device, shape, steps: int, seeded: bool):
        self.make = getattr(module, f"{entry.name}Scheduler")
        self.entry, self.device, self.steps, self.seeded = entry, device, steps, seeded
        # Small tensors come out of the model's cache; a rotation would make them come from memory.
        tensors = pool(shape, torch.float32, device, least=8)
        self.tensors = tensors.tensors[:4] if shape == SMALL else tensors.tensors
        self.ready: list = []
        self.used = 0

    def prepare(self, first: int, count: int) -> None:
        self.ready, self.used = [], 0
        for i in range(first, first + count):
            scheduler = self.make(**self.entry.config)
            self.entry.set_up(scheduler, self.steps)
            timesteps = list(scheduler.timesteps)
            tensors = [self.tensors[(i * 41 + k) % len(self.tensors)] for k in range(len(timesteps) + 1)]
            x, outputs = tensors[0], tensors[1:]
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, timesteps[0])
            options = dict(self.entry.options)
            if self.seeded:
                options["seed"] = SEED
            elif self.entry.stochastic and self.entry.seeded:
                options["generator"] = torch.Generator().manual_seed(SEED)
            self.ready.append((scheduler, timesteps, x, outputs, options))

    def __call__(self, i: int):
        if self.used == len(self.ready):
            self.prepare(i, 1)
        # Used up, but not freed before the next preparation: that would be timed.
        scheduler, timesteps, x, outputs, options = self.ready[self.used]
        self.used += 1
        advance = self.entry.advance
        if advance is None:
            step = scheduler.step
            for t, output in zip(timesteps, outputs):
                x = step(output, t, x, **options).prev_sample
        else:
            for t, output in zip(timesteps, outputs):
                x = advance(scheduler, output, t, x, options).prev_sample
        return x


def case(device: torch.device, entry: Entry, shape, steps: int, seeded: bool) -> Case:
    """One scheduler, ours beside theirs."""
    small = shape == SMALL
    if small:
        bar = entry.small_bar
    else:
        bar = (5 if seeded else 1.3) if entry.stochastic else 5
    bars = (Bar("ratio", at_least=bar),) if bar is not None and device.type == "cpu" else ()
    try:
        diffusers = peers.package("diffusers")
    except peers.Missing as missing:
        raise RuntimeError(str(missing)) from None  # without it there is nothing to stand in for
    import genfast.dropin.diffusers as ours

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    mine = Loop(ours, entry, device, shape, steps, seeded)
    theirs = Loop(diffusers, entry, device, shape, steps, False)
    noise = (" seed" if seeded else " generator") if entry.stochastic else ""

    def exact():
        # In-kernel noise is another draw: then ours is judged by the tests alone.
        return (mine if seeded else theirs)(0)

    return Case(
        f"{entry.label}{noise}",
        shape,
        "fp32",
        run=mine,
        exact=exact,
        peers=[Peer("diffusers", peers.version("diffusers"), theirs, check=exact, bars=bars)],
        backend=backend_name(device),
        allowed=ULPS * torch.finfo(torch.float32).eps,
        note=f"{steps} steps, times of a whole loop",
    )


def closing(rows: Sequence[Row]) -> str:
    """All schedulers, worst first: microseconds a step of the peer and of ours."""
    measured = sorted((row for row in rows if row.ratio is not None), key=lambda row: row.ratio)
    lines = [f"{'scheduler':42} {'shape':13} {'peer ms':>9} {'our ms':>9} {'ratio':>7}  bar"]
    for row in measured:
        verdict = {True: "met", False: "MISSED", None: ""}[row.bar_met]
        lines.append(
            f"{row.case:42} {row.shape:13} {row.peer_ms:9.4g} {row.our_ms:9.4g} {row.ratio:7.3g}  {row.bar} {verdict}"
        )
    return "\n".join(["every scheduler, worst first (times of a whole loop)", *lines])
