"""``sampler_step`` beside eager PyTorch, torch.compile, diffusers and the bandwidth of a plain copy.

The models are stand-ins that hand out tensors made beforehand, so that the loops time the samplers' share alone; one
case has real convolutions in the loop, to show how little of a large model's time that share is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import genfast
from benchmarks import published
from benchmarks.harness import DTYPES, Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends

SMALL, LARGE = (1, 4, 64, 64), (8, 16, 128, 128)
LEVELS = (0.7, 0.714, 0.8, 0.6)
"""alpha and sigma before and after the single steps; any would do."""
GUIDANCE, RESCALE = 7.5, 0.7
RATIO, MAXIMUM = 0.995, 1.5


def plans(settings: Settings) -> list[Plan]:
    """The cases of the family, for the settings' device."""
    from benchmarks import sampler_step_gpu, sampler_step_loops

    device = settings.device
    found = [
        Plan(f"op DDIM {dtype}", functools.partial(op_case, device, dtype, LARGE))
        for dtype in ("fp32", "bf16", "fp32+bf16")
    ]
    found += [
        Plan("op DDIM small", functools.partial(op_case, device, "fp32", SMALL)),
        Plan("op guided + rescale", functools.partial(guided_case, device, settings.quick)),
        Plan("op thresholded", functools.partial(thresholded_case, device)),
    ]
    if not settings.quick:
        found.append(Plan("op under torch.compile", functools.partial(compiled_case, device)))
    found += sampler_step_loops.plans(settings)
    if device.type == "cuda":
        found += sampler_step_gpu.plans(settings)
    return found


def backend_name(device: torch.device) -> str:
    """The backend that runs the family on a device, with the instruction set of the CPU's."""
    name = backends.choose("sampler_step", "sampler_step", device)[0]
    return f"{name} {backends.cpu_isa()}" if name == "cpu" else name


def ddim_table(device: torch.device, to_x0: bool = False) -> genfast.StepTable:
    """The one step that the op cases take: plain coefficients, or by way of x0."""
    a, s, a_next, s_next = LEVELS
    if to_x0:
        return genfast.StepTable([0.0, s_next], x0=a_next, to_x0=[1 / a, -s / a], device=device)
    return genfast.StepTable([a_next / a, s_next - a_next * s / a], device=device)


def sources(shape: tuple[int, ...], dtype: str, device: torch.device):
    """``state(i)``, ``model(i, k)`` and ``target(i)``: what call i reads (k: which model output) and writes."""
    state_dtype, model_dtype = DTYPES[dtype]
    states, targets = pool(shape, state_dtype, device), pool(shape, state_dtype, device, seed=1)
    models = states if model_dtype == state_dtype else pool(shape, model_dtype, device)

    def state(i):
        return states[3 * i]

    def model(i, k=0):
        return models[3 * i + 1 + k]

    return state, model, targets.__getitem__


def op_case(device: torch.device, dtype: str, shape: tuple[int, ...]) -> Case:
    """One DDIM step, two inputs and one output, through the whole Python call."""
    state, model, target = sources(shape, dtype, device)
    table = ddim_table(device)
    large = shape == LARGE
    size = state(0).numel() * state(0).element_size()
    x, eps = state(0), model(0)

    def into(i):
        return genfast.sampler_step([state(i), model(i)], table, step=0, out=target(i))

    def eager(i):
        return published.ddim_step(state(i), model(i), *LEVELS, None)

    # At microseconds a call, a rotation would be a good part of what is timed; the small tensors are in cache anyway.
    def small(_):
        return genfast.sampler_step([x, eps], table, step=0)

    def small_eager(_):
        return published.ddim_step(x, eps, *LEVELS, None)

    on_cpu = device.type == "cpu"
    bars = [Bar("extra_bytes", at_most=0)]
    peer_bars = ()
    if large and dtype == "fp32" and on_cpu:
        bars.append(Bar("floor_percent", at_least=75))
    if not large and on_cpu:
        bars.append(Bar("our_us", at_most=8))
        peer_bars = (Bar("ratio", at_least=5),)
    return Case(
        "op DDIM" if large else "op DDIM, whole Python call",
        shape,
        dtype,
        run=into if large else small,
        exact=lambda: published.ddim_step(x.double(), eps.double(), *LEVELS, None),
        copy_dtype=DTYPES[dtype][0],
        peers=[Peer("eager PyTorch", torch.__version__, eager if large else small_eager, bars=peer_bars)],
        bytes=2 * size + eps.numel() * eps.element_size() if large else 0,
        output_bytes=0 if large else size,
        bars=tuple(bars),
        backend=backend_name(device),
        note="ours writes into out=, the peer allocates" if large else "",
    )


def guided_case(device: torch.device, quick: bool) -> Case:
    """Guidance, its rescaling by standard deviations, and a DDIM step."""
    state, model, _ = sources(LARGE, "fp32", device)
    table = ddim_table(device)

    def ours(i):
        return genfast.sampler_step(
            [state(i), model(i)], table, step=0, uncond=model(i, 1), guidance=GUIDANCE, guidance_rescale=RESCALE
        )

    def step(x, cond, uncond):
        return published.guided_ddim_step(x, cond, uncond, GUIDANCE, RESCALE, LEVELS)

    def eager(i):
        return step(state(i), model(i), model(i, 1))

    bars = (lambda limit: (Bar("ratio", at_least=limit),)) if device.type == "cpu" else lambda _: ()
    peers = [Peer("eager PyTorch", torch.__version__, eager, bars=bars(5))]
    note = ""
    if quick:
        note = "torch.compile is left out of a quick run: its compilation takes longer"
    else:
        compiled = torch.compile(step, fullgraph=True, dynamic=False)

        def by_inductor(i):
            return compiled(state(i), model(i), model(i, 1))

        peers.append(Peer("torch.compile", torch.__version__, by_inductor, bars=bars(1.5)))
        note = "torch.compile gets the coefficients as constants, which is its best case"
    size = state(0).numel() * 4
    return Case(
        "CFG + rescale + DDIM step",
        LARGE,
        "fp32",
        run=ours,
        exact=lambda: step(state(0).double(), model(0).double(), model(0, 1).double()),
        peers=peers,
        # The statistics need a sample's model outputs before its first result; a second reading can find them in a
        # cache, so the floor counts one.
        bytes=4 * size,
        output_bytes=size,
        bars=(Bar("extra_bytes", at_most=0),) if device.type == "cpu" else (),
        backend=backend_name(device),
        note=note,
    )


def thresholded_case(device: torch.device) -> Case:
    """Dynamic thresholding by the exact quantile, then a DDIM step."""
    state, model, _ = sources(LARGE, "fp32", device)
    table = ddim_table(device, to_x0=True)

    def ours(i):
        return genfast.sampler_step([state(i), model(i)], table, step=0, threshold=(RATIO, MAXIMUM))

    def eager(i):
        return published.thresholded_ddim_step(state(i), model(i), LEVELS, RATIO, MAXIMUM)

    return Case(
        "dynamic thresholding + DDIM step",
        LARGE,
        "fp32",
        run=ours,
        exact=lambda: published.thresholded_ddim_step(state(0).double(), model(0).double(), LEVELS, RATIO, MAXIMUM),
        peers=[Peer("eager, torch.quantile", torch.__version__, eager)],
        output_bytes=state(0).numel() * 4,
        backend=backend_name(device),
    )


def compiled_case(device: torch.device) -> Case:
    """The op called inside a compiled function, and the same function with PyTorch's own operations."""
    state, model, _ = sources(LARGE, "fp32", device)
    table = ddim_table(device)

    @functools.partial(torch.compile, fullgraph=True, dynamic=False)
    def with_op(x: Tensor, eps: Tensor) -> Tensor:
        return torch.tanh(genfast.sampler_step([x, eps], table, step=0))

    @functools.partial(torch.compile, fullgraph=True, dynamic=False)
    def without(x: Tensor, eps: Tensor) -> Tensor:
        return torch.tanh(published.ddim_step(x, eps, *LEVELS, None))

    return Case(
        "op inside torch.compile",
        LARGE,
        "fp32",
        run=lambda i: with_op(state(i), model(i)),
        exact=lambda: published.ddim_step(state(0).double(), model(0).double(), *LEVELS, None).tanh(),
        peers=[Peer("torch.compile", torch.__version__, lambda i: without(state(i), model(i)))],
        output_bytes=state(0).numel() * 4,
        backend=backend_name(device),
        note="both end in tanh, which inductor fuses with its own step but not with an opaque op",
    )
