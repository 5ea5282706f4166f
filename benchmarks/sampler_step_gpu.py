"""Cases of ``sampler_step`` that only a GPU has: its bandwidth, its two backends, and a captured loop."""

from __future__ import annotations

import functools
import itertools

import torch

import genfast
from benchmarks import published, timing
from benchmarks.harness import DTYPES, Bar, Case, Peer, Plan, Settings
from benchmarks.sampler_step import LARGE, LEVELS, SMALL, ddim_table, sources
from genfast import backends

HUGE = {"fp32": (32, 16, 512, 512), "bf16": (64, 16, 512, 512)}
"""Shapes of 512 MiB of state."""
GRAPH_STEPS = 50
KINDS = ("DDIM", "DDPM with Philox", "CFG + rescale")


def plans(settings: Settings) -> list[Plan]:
    """The cases to add on a CUDA device."""
    device = settings.device
    found = [Plan("op at 512 MiB", functools.partial(bandwidth_case, device, dtype)) for dtype in HUGE]
    found += [
        Plan("Triton and CUDA", functools.partial(backends_case, device, kind, shape))
        for kind in KINDS
        for shape in (SMALL, LARGE, HUGE["fp32"])
    ]
    return found + [Plan("CUDA graph", functools.partial(graph_case, device, shape)) for shape in (SMALL, LARGE)]


def bandwidth_case(device: torch.device, dtype: str) -> Case:
    """One DDIM step on 512 MiB of state: how much of the bandwidth of a copy, and how many launches."""
    shape = HUGE[dtype]
    state, model, target = sources(shape, dtype, device)
    table = ddim_table(device)

    def ours(i):
        return genfast.sampler_step([state(i), model(i)], table, step=0, out=target(i))

    return Case(
        "op DDIM, 512 MiB of state",
        shape,
        dtype,
        run=ours,
        exact=lambda: published.ddim_step(state(0).double(), model(0).double(), *LEVELS, None),
        copy_dtype=DTYPES[dtype][0],
        peers=[
            Peer(
                "eager PyTorch",
                torch.__version__,
                lambda i: published.ddim_step(state(i), model(i), *LEVELS, None),
            )
        ],
        bytes=3 * state(0).numel() * state(0).element_size(),
        bars=(Bar("floor_percent", at_least=85), Bar("launches", at_most=1), Bar("extra_bytes", at_most=0)),
        backend=backends.choose("sampler_step", "sampler_step", device)[0],
        counts=lambda: {"launches": timing.kernel_launches(lambda: ours(0))},
    )


def backends_case(device: torch.device, kind: str, shape: tuple[int, ...]) -> Case:
    """The same step on Triton (ours) and on CUDA C++ (the peer): a ratio above 1 says that Triton is the faster."""
    state, model, target = sources(shape, "fp32", device)
    a, s, a_next, s_next = LEVELS
    x_weight, eps_weight = a_next / a, s_next - a_next * s / a
    noisy = kind == "DDPM with Philox"
    table = genfast.StepTable([x_weight, eps_weight], noise=0.1 if noisy else None, device=device)

    def step(i):
        options = {"seed": 1} if noisy else {}
        if kind == "CFG + rescale":
            options = {"uncond": model(i, 1), "guidance": 7.5, "guidance_rescale": 0.7}
        return genfast.sampler_step([state(i), model(i)], table, step=0, out=target(i), **options)

    def on(name):
        def run(i):
            with genfast.backend(name):
                return step(i)

        return run

    def exact():
        with genfast.backend("reference"):
            inputs = [state(0).double(), model(0).double()]
            if noisy:
                return genfast.sampler_step(inputs, table, step=0, seed=1)
            if kind == "CFG + rescale":
                uncond = model(0, 1).double()
                return genfast.sampler_step(inputs, table, step=0, uncond=uncond, guidance=7.5, guidance_rescale=0.7)
            return genfast.sampler_step(inputs, table, step=0)

    missing = backends.missing("cuda", "cuda")
    return Case(
        f"Triton and CUDA: {kind}",
        shape,
        "fp32",
        run=on("triton"),
        exact=exact,
        peers=[Peer("genfast[cuda]", genfast.__version__, None if missing else on("cuda"), missing=missing or "")],
        bytes=(4 if kind == "CFG + rescale" else 3) * state(0).numel() * 4 if shape != SMALL else 0,
        backend="triton",
    )


def graph_case(device: torch.device, shape: tuple[int, ...]) -> Case:
    """A DDIM loop of 50 steps as one captured CUDA graph, beside the same loop launched step by step."""
    state, model, _ = sources(shape, "fp32", device)
    levels = published.linear_levels(range(980, -1, -20))
    table = genfast.StepTable(
        [[a1 / a, s1 - a1 * s / a] for (a, s), (a1, s1) in itertools.pairwise(levels)], device=device
    )
    x = torch.empty(shape, device=device)

    def steps():
        for k in range(GRAPH_STEPS):
            genfast.sampler_step([x, model(0, k)], table, step=k, out=x)

    def loop():
        x.copy_(state(0))
        steps()

    graph, _ = timing.captured(loop, device)

    def replay(_):
        graph.replay()
        return x

    def launched(_):
        loop()
        return x

    return Case(
        f"CUDA graph of {GRAPH_STEPS} DDIM steps",
        shape,
        "fp32",
        run=replay,
        exact=lambda: published.ddim_loop(state(0).double(), lambda k: model(0, k).double(), levels),
        peers=[Peer("genfast, step by step", genfast.__version__, launched)],
        bars=(Bar("launches per step", at_most=1), Bar("extra_bytes", at_most=0)),
        backend=backends.choose("sampler_step", "sampler_step", device)[0],
        counts=lambda: {"launches per step": timing.kernel_launches(steps) / GRAPH_STEPS},
        note="captured and launched without a host synchronisation (torch's sync debug mode raises on one)",
    )
