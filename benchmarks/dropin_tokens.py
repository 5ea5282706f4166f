"""The drop-in schedulers of tokens beside the classes of diffusers: one ``step``, output object included.

Greedy steps take what they draw all the same from a generator, in both. Steps that draw tokens take them from a seed in
ours and from a generator in the peer's: other numbers, so that ours are compared with the reference's, to which they
must be equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

import genfast
from benchmarks import peers
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from benchmarks.sampler_step import backend_name

SEED, STEPS = 7, 8


@dataclass(frozen=True)
class Entry:
    """A scheduler and one step of it."""

    name: str
    shape: tuple[int, ...]
    """Of the logits, [B, L, V]; transposed for a scheduler that takes classes second."""
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    dtype: str = "bf16"
    masked: bool = False
    draws: bool = False
    classes_second: bool = False
    bar: float | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {'seed' if self.draws else 'greedy'}"


LLADA = (2, 32, 126464)
ENTRIES = (
    Entry("BlockRefinement", LLADA, options=dict(mask_token_id=126336), masked=True, bar=2),
    Entry(
        "BlockRefinement",
        LLADA,
        options=dict(mask_token_id=126336, temperature=0.7),
        masked=True,
        draws=True,
        bar=10,
    ),
    Entry("DiscreteDDIM", LLADA, bar=2),
    Entry("EntropyBound", LLADA, draws=True, bar=3),
    Entry("Amused", (2, 256, 8192), dict(mask_token_id=8255), dtype="fp32", masked=True, draws=True, bar=5),
    Entry(
        "VQDiffusion", (1, 1024, 4096), dict(num_vec_classes=4097), dtype="fp32", draws=True, classes_second=True, bar=5
    ),
)


def plans(settings: Settings) -> list[Plan]:
    """Every entry; small vocabularies in a quick run."""
    return [
        Plan(f"tokens {entry.label}", functools.partial(case, settings.device, entry, settings.quick))
        for entry in ENTRIES
    ]


def case(device: torch.device, entry: Entry, quick: bool) -> Case:
    """One scheduler, ours beside theirs."""
    try:
        diffusers = peers.package("diffusers")
    except peers.Missing as missing:
        raise RuntimeError(str(missing)) from None
    import genfast.dropin.diffusers as ours

    shape = (entry.shape[0], 16, entry.shape[2]) if quick else entry.shape
    dtype = torch.bfloat16 if entry.dtype == "bf16" else torch.float32
    logits = pool(shape, dtype, device, least=2)
    if entry.masked:
        mask = entry.options.get("mask_token_id", entry.config.get("mask_token_id"))
        sample = torch.full(shape[:2], mask, device=device)
    else:
        sample = torch.randint(0, shape[2], shape[:2], generator=torch.Generator().manual_seed(0)).to(device)

    def stepping(module, source):
        scheduler = getattr(module, f"{entry.name}Scheduler")(**entry.config)
        scheduler.set_timesteps(STEPS)
        timestep = scheduler.timesteps[2]

        def run(i):
            output = logits[i]
            if entry.classes_second:
                output = output.transpose(1, 2)
            return scheduler.step(output, timestep, sample, **entry.options, **source()).prev_sample

        return run

    def generator():
        return {"generator": torch.Generator(device).manual_seed(SEED)}

    mine = stepping(ours, (lambda: {"seed": SEED}) if entry.draws else generator)
    theirs = stepping(diffusers, generator)

    def exact():
        with genfast.backend("reference"):
            return mine(0)

    bars = (Bar("ratio", at_least=entry.bar),) if entry.bar and device.type == "cpu" else ()
    return Case(
        f"{entry.label} step",
        shape,
        entry.dtype,
        run=mine,
        exact=exact,
        peers=[Peer("diffusers", peers.version("diffusers"), theirs, check=exact, bars=bars)],
        backend=backend_name(device),
        allowed=1e-12,  # equal, that is
    )
