"""Whole sampling loops of ``sampler_step``'s family, beside diffusers and the published arithmetic in eager PyTorch."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import genfast
from benchmarks import peers, published
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from benchmarks.sampler_step import LARGE, SMALL, backend_name
from benchmarks.timing import Run

SEED = 7


@dataclass(frozen=True)
class Loop:
    """One sampler as genfast, diffusers and the published arithmetic know it."""

    sampler: str
    """Name for ``genfast.Sampler``."""
    scheduler: str
    """Class in diffusers."""
    module: str
    """Where that class lives."""
    spacing: str
    """Of the timesteps."""
    published: Callable[..., Tensor]
    tensors: int
    """How many tensors a step reads and writes at the least; 0 where that depends on the step."""
    bar: float | None = None
    """The ratio required on the CPU at the large shape."""
    options: dict = field(default_factory=dict)
    """Of the scheduler."""
    clip: float | None = None
    noisy: bool = False

    @property
    def name(self) -> str:
        return f"{self.sampler} loop{' clipped' if self.clip else ''}"


LOOPS = (
    Loop("ddim", "DDIMScheduler", "ddim", "leading", published.ddim_loop, 3, 6, dict(clip_sample=False)),
    Loop("ddim", "DDIMScheduler", "ddim", "leading", published.ddim_loop, 3, clip=1.0),
    Loop("unipc", "UniPCMultistepScheduler", "unipc_multistep", "linspace", published.unipc_loop, 0, 10),
    Loop("dpmpp_2m", "DPMSolverMultistepScheduler", "dpmsolver_multistep", "linspace", published.dpmpp_2m_loop, 5, 6),
    Loop("ddpm", "DDPMScheduler", "ddpm", "leading", published.ddpm_loop, 3, 7, dict(clip_sample=False), noisy=True),
    Loop("ddpm", "DDPMScheduler", "ddpm", "leading", published.ddpm_loop, 3, clip=1.0, noisy=True),
    Loop("euler", "EulerDiscreteScheduler", "euler_discrete", "leading", published.euler_loop, 3),
)


def plans(settings: Settings) -> list[Plan]:
    """The loops at the large and the small shape."""
    device, steps = settings.device, 6 if settings.quick else 20
    found = [
        Plan(f"{loop.name} {size}", functools.partial(loop_case, device, loop, shape, steps))
        for size, shape in (("large", LARGE), ("small", SMALL))
        for loop in LOOPS
    ]
    return found


def stand_in(shape: tuple[int, ...], calls: int, device: torch.device):
    """``state(i)`` and ``model(i, k)``: what loop i starts from, and what its k-th model call returns."""
    tensors = pool(shape, torch.float32, device, least=calls + 1)
    return (lambda i: tensors[i * (calls + 1)]), (lambda i, k: tensors[i * (calls + 1) + 1 + k])


def loop_case(device: torch.device, loop: Loop, shape: tuple[int, ...], steps: int) -> Case:
    """A whole loop beside diffusers' scheduler class, and beside the published arithmetic with Python floats."""
    state, model = stand_in(shape, steps, device)
    sampler = our_sampler(loop, steps, device)
    levels = published.linear_levels([int(t) for t in sampler.timesteps])

    def noise(k):
        return genfast.randn(*shape, seed=SEED, stream=k, device=device)

    def by_hand(dtype, draw):
        extra = {"noise": draw} if loop.noisy else {}
        if loop.clip is not None:
            extra["clip"] = loop.clip

        def run(i):
            return loop.published(state(i).to(dtype), lambda k: model(i, k).to(dtype), levels, **extra)

        return run

    in_float32 = by_hand(torch.float32, lambda k: torch.randn(shape, device=device))
    bars = ()
    if loop.bar is not None and shape == LARGE and device.type == "cpu":
        bars = (Bar("ratio", at_least=loop.bar),)
    size = state(0).numel() * 4
    return Case(
        f"{loop.name}, {steps} steps",
        shape,
        "fp32",
        run=our_run(sampler, state, model, loop.noisy),
        exact=lambda: by_hand(torch.float64, lambda k: noise(k).double())(0),
        peers=[
            diffusers_peer(loop, steps, device, state, model, noise, sampler.timesteps, bars),
            Peer(
                "eager PyTorch",
                torch.__version__,
                in_float32,
                check=lambda: by_hand(torch.float32, noise)(0),
            ),
        ],
        bytes=loop.tensors * steps * size if shape == LARGE else 0,
        output_bytes=size,
        backend=backend_name(device),
        note="noise by Philox in the kernel; the peers draw torch.randn, and genfast's noise for the errors"
        if loop.noisy
        else "",
    )


def our_sampler(loop: Loop, steps: int, device: torch.device):
    stride = 1000 // steps
    if loop.spacing == "leading":
        timesteps = [stride * k for k in range(steps)][::-1]
    else:
        import numpy as np

        timesteps = np.linspace(0, 999, steps + 1).round()[::-1][:-1].astype(int).tolist()
    levels = published.linear_levels(timesteps)
    rows, before = [], None
    for (a, s), (a1, s1) in itertools.pairwise(levels):
        if loop.sampler == "ddim":
            rows.append(([0, s1], dict(x0=a1, to_x0=[1 / a, -s / a])))
        elif loop.sampler == "euler":
            rows.append(([1, s1 / a1 - s / a], {}))
        elif loop.sampler == "ddpm":
            al = (a / a1) ** 2
            rows.append(
                (
                    [al**0.5 * s1**2 / s**2, 0],
                    dict(x0=a1 * (1 - al) / s**2, to_x0=[1 / a, -s / a], noise=((1 - al) * s1**2 / s**2) ** 0.5),
                )
            )
        elif loop.sampler == "dpmpp_2m":
            import math

            lam = math.log(a / s)
            h = math.inf if s1 == 0 else math.log(a1 / s1) - lam
            g = -a1 * math.expm1(-h)
            w = 0 if before is None or s1 == 0 else h / (lam - before) / 2
            before = lam
            rows.append(([s1 / s, 0, -g * w], dict(x0=g * (1 + w), second_x0=1.0, to_x0=[1 / a, -s / a])))
        else:
            raise NotImplementedError(loop.sampler)
    parts = {k: [r[1][k] for r in rows] for k in rows[0][1]}
    table = genfast.StepTable([r[0] for r in rows], device=device, **parts)
    if loop.clip is None and loop.sampler == "ddim":
        table = genfast.StepTable(
            [[a1 / a, s1 - a1 * s / a] for (a, s), (a1, s1) in itertools.pairwise(levels)], device=device
        )
    return types.SimpleNamespace(timesteps=timesteps, table=table, clip=loop.clip, noisy=loop.noisy)


def our_run(sampler, state, model, noisy: bool) -> Run:
    def run(i):
        x = state(i)
        table = sampler.table
        opts = {}
        if sampler.clip:
            opts["clip"] = sampler.clip
        if sampler.noisy:
            opts["seed"] = SEED
        y, prev = None, x
        for k in range(table.rows):
            if table.has_second:
                x, prev = genfast.sampler_step([x, model(i, k), prev], table, step=k)
            else:
                x = y = genfast.sampler_step([x, model(i, k)], table, step=k, out=y, **opts)
        return x

    return run


def diffusers_peer(loop: Loop, steps: int, device: torch.device, state, model, noise, timesteps, bars) -> Peer:
    """The loop through diffusers' class, with its own timesteps set beforehand: only ``step`` is timed.

    Raises:
        ValueError: the scheduler's timesteps are not ours, so that the two would not do the same work.
    """
    name = f"diffusers {loop.scheduler}"
    try:
        module = peers.package("diffusers", f"diffusers.schedulers.scheduling_{loop.module}")
    except peers.Missing as missing:
        return Peer(name, missing=str(missing), bars=bars)
    prepared = getattr(module, loop.scheduler)(timestep_spacing=loop.spacing, **loop.options)
    prepared.set_timesteps(steps, device=device)
    theirs, ours = ([int(t) for t in given] for given in (prepared.timesteps, timesteps))
    if theirs != ours:
        raise ValueError(f"{loop.scheduler} steps through {theirs}, genfast through {ours}")

    def run(i):
        # A scheduler keeps state from step to step; a shallow copy is the cheapest fresh one.
        scheduler = copy.copy(prepared)
        if hasattr(prepared, "model_outputs"):
            scheduler.model_outputs = list(prepared.model_outputs)
        x = state(i)
        for k, t in enumerate(prepared.timesteps):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(model(i, k), t, x, return_dict=False)[0]
        return x

    def with_our_noise():
        draws = map(noise, range(steps))
        with replaced(module, "randn_tensor", lambda *_, **__: next(draws)):
            return run(0)

    return Peer(name, peers.version("diffusers"), run, check=with_our_noise if loop.noisy else None, bars=bars)


@contextlib.contextmanager
def replaced(module, name: str, value):
    """``module.name`` is ``value`` inside the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
