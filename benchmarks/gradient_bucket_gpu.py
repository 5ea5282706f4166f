"""Cases of ``gradient_bucket`` that only a GPU has: its bandwidth, its two backends, and a step of DDP over NCCL.

Eight ranks are played by one GPU: their chunks are buffers, and only the links between them are missing.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

import genfast
from benchmarks import timing
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from genfast import BucketLayout, backends, pack_gradients, reduce_chunks, unpack_gradients

RANKS = 8
SIZES = (2_000_000, 1_000, 1_000_000, 1_000) * 62
"""Of 186 million values in 248 tensors, as weights and biases follow one another: far more than a cache holds."""
WIRES = ("bf16", "int8", "fp8_e4m3")


def plans(settings: Settings) -> list[Plan]:
    """The cases to add on a CUDA device."""
    device = settings.device
    cases = {"pack": pack_case, "reduce": reduce_case, "unpack": unpack_case, "DDP over NCCL": ddp_case}
    return [
        Plan(f"{name} {wire}", functools.partial(case, device, wire)) for name, case in cases.items() for wire in WIRES
    ]


def bucket(device: torch.device, wire: str) -> tuple[BucketLayout, list[torch.Tensor]]:
    """A layout, and float32 gradients for it."""
    flat = torch.randn(sum(SIZES), generator=torch.Generator(device).manual_seed(0), device=device)
    return BucketLayout(SIZES, RANKS, wire), list(flat.split(SIZES))


def op_case(device: torch.device, name: str, wire: str, call, bytes: int) -> Case:
    """An op on Triton (ours) and on CUDA C++ (the peer); ``call`` returns what is compared with the reference.

    Each is replayed from a CUDA graph, since the bar is about the kernels; what Python takes to launch them is a count.
    """

    def on(backend):
        with genfast.backend(backend):
            return call()

    def replayed(backend):
        graph, result = timing.captured(lambda: on(backend), device)

        def run(_):
            graph.replay()
            return result

        return run

    def host_us():
        begin = time.perf_counter()
        on("triton")
        return (time.perf_counter() - begin) * 1e6

    missing = backends.missing("cuda", "cuda")
    return Case(
        f"{name}, {RANKS} ranks as buffers",
        (sum(SIZES),),
        wire,
        run=replayed("triton"),
        exact=lambda: on("reference").double(),
        peers=[
            Peer("genfast[cuda]", genfast.__version__, None if missing else replayed("cuda"), missing=missing or "")
        ],
        bytes=bytes,
        bars=(Bar("floor_percent", at_least=80),),
        backend="triton",
        allowed=1e-12,
        counts=lambda: {
            "launches": timing.kernel_launches(lambda: on("triton")),
            "host_us": statistics.median(host_us() for _ in range(9)),
        },
        note="replayed from CUDA graphs; Triton writes its table of tensors each time, and keeps it otherwise",
    )


def pack_case(device: torch.device, wire: str) -> Case:
    """Gradients into the bucket."""
    layout, gradients = bucket(device, wire)
    out = torch.empty(layout.shape, dtype=torch.uint8, device=device)
    size = 4 * layout.numel + out.numel()
    return op_case(device, "pack", wire, lambda: pack_gradients(gradients, layout, out=out).wire, size)


def reduce_case(device: torch.device, wire: str) -> Case:
    """One rank's chunk from all ranks, averaged and encoded again."""
    layout, gradients = bucket(device, wire)
    received = pack_gradients(gradients, layout).wire
    out = torch.empty(layout.chunk_bytes, dtype=torch.uint8, device=device)
    size = received.numel() + out.numel()
    return op_case(device, "reduce", wire, lambda: reduce_chunks(received, layout, scale=1 / RANKS, out=out), size)


def unpack_case(device: torch.device, wire: str) -> Case:
    """The reduced bucket into the gradients, with their norms."""
    layout, gradients = bucket(device, wire)
    reduced = pack_gradients(gradients, layout).wire
    size = reduced.numel() + 4 * layout.numel
    return op_case(device, "unpack", wire, lambda: unpack_gradients(reduced, layout, gradients).square_norm, size)


@torch.enable_grad()
def ddp_case(device: torch.device, wire: str) -> Case:
    """Backward of a model in DDP, and the norm of its gradients, on a group of one rank: what the hook costs."""
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():
        file = os.path.join(tempfile.mkdtemp(), "store")
        dist.init_process_group("nccl", init_method=f"file://{file}", rank=0, world_size=1)
    torch.manual_seed(0)
    layers = itertools.chain.from_iterable((nn.Linear(2048, 2048), nn.GELU()) for _ in range(12))
    plain = nn.Sequential(*layers).to(device)
    x = torch.randn(1024, 2048, device=device)
    default = DistributedDataParallel(copy.deepcopy(plain))
    hooked = DistributedDataParallel(plain)
    state = genfast.HookState(hooked, wire=wire, max_norm=1.0)
    hooked.register_comm_hook(state, genfast.comm_hook)

    @torch.enable_grad()
    def backward(model):
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    def ours(_):
        backward(hooked)
        return state.finish().norm

    def eager(_):
        backward(default)
        return nn.utils.clip_grad_norm_(default.parameters(), 1.0)

    return Case(
        "DDP on one rank over NCCL, backward and norm",
        (12, 2048, 2048),
        wire,
        run=ours,
        exact=lambda: eager(0).double(),
        peers=[Peer("DDP + clip_grad_norm_", torch.__version__, eager)],
        backend=backends.choose("gradient_bucket", "pack_gradients", device)[0],
        allowed=0.05,
        note="the allowed error is the wire's rounding; no bar: a single rank sends nothing",
    )
