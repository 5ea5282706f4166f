"""Whole sampling loops of ``sampler_step``'s family, beside diffusers and the published arithmetic in eager PyTorch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
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
    """How many tensors a step reads and writes at the least."""
    bar: float | None = None
    """The ratio required on the CPU at the large shape."""
    options: dict = field(default_factory=dict)
    """Of the scheduler."""
    step_options: dict = field(default_factory=dict)
    """Of the scheduler's ``step``."""
    clip: float | None = None
    noisy: bool = False
    exploding: bool = False
    """Whether diffusers' state is x0 + sigma eps where ours is alpha (x0 + sigma eps)."""

    @property
    def name(self) -> str:
        return f"{self.sampler} loop{' clipped' if self.clip else ''}"


TIMESTEPS = {
    "leading": lambda steps: [k * (1000 // steps) for k in reversed(range(steps))],
    "linspace": lambda steps: [int(t) for t in np.linspace(0, 999, steps + 1).round()[:0:-1]],
}
"""The timesteps of 1000 that diffusers takes under a spacing; its multistep classes leave out linspace's last one."""

UNCLIPPED, EPS_FROM_CLIPPED = dict(clip_sample=False), dict(use_clipped_model_output=True)
LOOPS = (
    Loop("ddim", "DDIMScheduler", "ddim", "leading", published.ddim_loop, 3, 6, UNCLIPPED),
    Loop("ddim", "DDIMScheduler", "ddim", "leading", published.ddim_loop, 3, step_options=EPS_FROM_CLIPPED, clip=1.0),
    Loop("unipc", "UniPCMultistepScheduler", "unipc_multistep", "linspace", published.unipc_loop, 6, 10),
    Loop("dpmpp_2m", "DPMSolverMultistepScheduler", "dpmsolver_multistep", "linspace", published.dpmpp_2m_loop, 5, 6),
    Loop("ddpm", "DDPMScheduler", "ddpm", "leading", published.ddpm_loop, 3, 7, UNCLIPPED, noisy=True),
    Loop("ddpm", "DDPMScheduler", "ddpm", "leading", published.ddpm_loop, 3, clip=1.0, noisy=True),
    Loop("euler", "EulerDiscreteScheduler", "euler_discrete", "leading", published.euler_loop, 3, exploding=True),
)


def plans(settings: Settings) -> list[Plan]:
    """The loops at the large and the small shape, EDM's Heun, and one with convolutions in it."""
    device, steps = settings.device, 4 if settings.quick else 20
    found = [
        Plan(f"{loop.name} {size}", functools.partial(loop_case, device, loop, shape, steps))
        for size, shape in (("large", LARGE), ("small", SMALL))
        for loop in LOOPS
        if shape == LARGE or loop.clip is None
    ]
    found += [
        Plan(f"heun loop {size}", functools.partial(edm_case, device, shape, steps))
        for size, shape in (("large", LARGE), ("small", SMALL))
    ]
    return [*found, Plan("ddim loop with a model", functools.partial(model_case, device, 2 if settings.quick else 4))]


class StandIn:
    """``feed(i)``: what loop i starts from and what each model call returns, ``calls + 1`` tensors.

    Lists made beforehand, so that handing them out costs next to nothing.
    """

    def __init__(self, shape: tuple[int, ...], calls: int, device: torch.device):
        tensors = pool(shape, torch.float32, device, least=calls + 1).tensors
        self.lists = [tensors[k : k + calls + 1] for k in range(0, len(tensors) - calls, calls + 1)]

    def __call__(self, i: int) -> list[Tensor]:
        return self.lists[i % len(self.lists)]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in float64."""
    return [tensor.double() for tensor in tensors]


def loop_case(device: torch.device, loop: Loop, shape: tuple[int, ...], steps: int) -> Case:
    """A whole loop beside diffusers' scheduler class, and beside the published arithmetic with Python floats."""
    feed = StandIn(shape, steps, device)
    timesteps = TIMESTEPS[loop.spacing](steps)
    levels = published.linear_levels(timesteps)

    def noise(k):
        return genfast.randn(*shape, seed=SEED, stream=k, device=device)

    def by_hand(tensors, draw):
        x, *outputs = tensors
        extra = {"noise": draw} if loop.noisy else {}
        if loop.clip is not None:
            extra["clip"] = loop.clip
        return loop.published(x, outputs.__getitem__, levels, **extra)

    sampler = genfast.Sampler(loop.sampler, "linear", timesteps=timesteps)
    options = {} if loop.clip is None else {"clip": loop.clip}
    if loop.noisy:
        options["seed"] = SEED
    bars = ()
    if loop.bar is not None and shape == LARGE and device.type == "cpu":
        bars = (Bar("ratio", at_least=loop.bar),)
    size = feed(0)[0].numel() * 4
    return Case(
        f"{loop.name}, {steps} steps",
        shape,
        "fp32",
        run=our_run(sampler, feed, levels[0][0] if loop.exploding else 1.0, **options),
        exact=lambda: by_hand(doubled(feed(0)), lambda k: noise(k).double()),
        peers=[
            diffusers_peer(loop, timesteps, device, feed, noise, bars),
            Peer(
                "eager PyTorch",
                torch.__version__,
                lambda i: by_hand(feed(i), lambda k: torch.randn(shape, device=device)),
                check=lambda: by_hand(feed(0), noise),
            ),
        ],
        bytes=loop.tensors * steps * size if shape == LARGE else 0,
        output_bytes=size,
        backend=backend_name(device),
        note="noise by Philox in the kernel; the peers draw torch.randn, and take genfast's noise for the errors"
        if loop.noisy
        else "",
    )


def our_run(sampler: genfast.Sampler, feed: StandIn, scale: float = 1.0, **options) -> Run:
    """The loop through the public sampler, from ``scale`` times what ``feed`` gives."""
    first = [scale * lists[0] for lists in feed.lists] if scale != 1.0 else [lists[0] for lists in feed.lists]

    def run(i):
        outputs = iter(feed(i)[1:])
        return sampler(lambda x, t: next(outputs), first[i % len(first)], **options)

    return run


def diffusers_peer(loop: Loop, timesteps: list[int], device: torch.device, feed, noise, bars) -> Peer:
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
    prepared.set_timesteps(len(timesteps), device=device)
    theirs = [int(t) for t in prepared.timesteps]
    if theirs != timesteps:
        raise ValueError(f"{loop.scheduler} steps through {theirs}, genfast through {timesteps}")

    def run(i):
        # A scheduler keeps state from step to step; a shallow copy is the cheapest fresh one.
        scheduler = copy.copy(prepared)
        if hasattr(prepared, "model_outputs"):
            scheduler.model_outputs = list(prepared.model_outputs)
        x, *outputs = feed(i)
        for t, output in zip(prepared.timesteps, outputs):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False, **loop.step_options)[0]
        return x

    def with_our_noise():
        draws = map(noise, range(len(timesteps)))
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


def edm_case(device: torch.device, shape: tuple[int, ...], steps: int) -> Case:
    """EDM's Heun loop and preconditioning, beside the same in eager PyTorch (in float32, as ours)."""
    feed = StandIn(shape, 2 * steps - 1, device)
    sampler = genfast.Sampler("heun", "edm", steps, spacing="karras", prediction="edm")
    sigmas = published.edm_sigmas(steps)

    def by_hand(tensors):
        x, *outputs = tensors
        return published.edm_heun_loop(x, lambda k, _: outputs[k], sigmas)

    return Case(
        f"heun loop (EDM), {steps} steps",
        shape,
        "fp32",
        run=our_run(sampler, feed),
        exact=lambda: by_hand(doubled(feed(0))),
        peers=[Peer("eager PyTorch", torch.__version__, lambda i: by_hand(feed(i)))],
        output_bytes=feed(0)[0].numel() * 4,
        backend=backend_name(device),
    )


def model_case(device: torch.device, steps: int) -> Case:
    """A DDIM loop whose model computes: three convolutions, small beside any model that is used in earnest."""
    width, channels = 64, LARGE[1]
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(channels, width, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(width, width, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(width, channels, 3, padding=1),
    ).to(device)
    timesteps = TIMESTEPS["leading"](steps)
    levels = published.linear_levels(timesteps)
    sampler = genfast.Sampler("ddim", "linear", timesteps=timesteps)
    states = StandIn(LARGE, 0, device)

    def by_hand(x, model):
        for k in range(steps):
            x = published.ddim_step(x, model(x), *levels[k], *levels[k + 1], None)
        return x

    return Case(
        f"ddim loop with a model, {steps} steps",
        LARGE,
        "fp32",
        run=lambda i: sampler(lambda x, t: model(x), states(i)[0]),
        exact=lambda: by_hand(states(0)[0].double(), copy.deepcopy(model).double()),
        peers=[Peer("eager PyTorch", torch.__version__, lambda i: by_hand(states(i)[0], model))],
        output_bytes=states(0)[0].numel() * 4,
        backend=backend_name(device),
        note="end to end: even three small convolutions take most of the time, so the gain is about nothing",
    )
