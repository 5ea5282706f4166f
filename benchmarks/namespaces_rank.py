"""One rank of ``benchmarks.namespaces``: DDP by itself and with a hook of ours, in turn, on the same gradients."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import genfast
from genfast.gradient_wire import BucketLayout

LAYERS, BATCH = 24, 4
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
TORCH_HOOK = "torch_fp16"
"""PyTorch's fp16_compress_hook, beside the wires of ours."""


class Stack(nn.Module):
    """Square layers without biases: many values, and few operations for each."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


class Variant:
    """A model under DDP, alone or with a hook."""

    def __init__(self, wire: str | None, width: int, bucket_mb: float | None):
        torch.manual_seed(0)
        self.wire, self.module = wire, Stack(width)
        options = {} if bucket_mb is None else {"bucket_cap_mb": bucket_mb}
        self.ddp = DistributedDataParallel(self.module, **options)
        self.state, self.buckets = None, {}
        if wire == TORCH_HOOK:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            self.ddp.register_comm_hook(None, fp16_compress_hook)
        elif wire is not None:
            self.state = genfast.HookState(self.module, wire, timeout=60)
            self.ddp.register_comm_hook(self.state, self._hook)

    # Without annotations, which DDP would compare, as strings, with its own.
    def _hook(self, state, bucket):
        self.buckets[bucket.index()] = bucket.buffer().numel()
        return genfast.comm_hook(state, bucket)

    def step(self, x: Tensor) -> tuple[float, int]:
        """Seconds of a backward pass with its reduction, and bytes that this host has sent in it."""
        self.ddp.zero_grad()
        loss = self.ddp(x)
        dist.barrier()
        sent, start = int(SENT.read_text()), time.perf_counter()
        loss.backward()
        return time.perf_counter() - start, int(SENT.read_text()) - sent

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters()]

    def close(self) -> None:
        if self.state is not None:
            self.state.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("rank", "hosts", "width", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--address")
    parser.add_argument("--wires", nargs="*")
    parser.add_argument("--bucket-mb", type=float)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{options.address}:29400", rank=options.rank, world_size=options.hosts,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = measure(options)
    if options.rank == 0:
        options.out.write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(options) -> dict:
    """What rank 0 writes down."""
    inputs = [
        torch.randn(BATCH, options.width, generator=torch.Generator().manual_seed(r)) for r in range(options.hosts)
    ]
    mine = inputs[options.rank]
    plain = Variant(None, options.width, None)
    exact = exact_gradients(plain.module, inputs)
    backward = [backward_alone(plain, mine) for _ in range(3)]
    report = {
        "hosts": options.hosts,
        "parameters": sum(p.numel() for p in plain.module.parameters()),
        "backward_s": worst(statistics.median(backward)),
        "latency_s": worst(latency()),
        "variants": {},
    }
    first = {"ddp": look(plain, mine, exact)}
    plain.step(mine)
    times: dict[str, list] = {"ddp": []}
    for wire in options.wires:
        ours = Variant(wire, options.width, options.bucket_mb)
        first[wire] = look(ours, mine, exact)
        ours.step(mine)  # DDP has put the parameters into other buckets
        times[wire] = []
        for _ in range(options.rounds):
            theirs = plain.step(mine)
            times["ddp"].append(theirs)
            times[wire].append((*ours.step(mine), theirs[0]))
        report["variants"][wire] = {
            **summary(times[wire]), **first[wire], "bitwise_after": same_everywhere(ours.gradients()),
            "buckets": list(ours.buckets.values()),
        }  # fmt: skip
        if wire != TORCH_HOOK:
            report["variants"][wire]["work"] = work(list(ours.buckets.values()), options.hosts, wire)
        ours.close()
        del ours
    report["variants"]["ddp"] = {**summary(times["ddp"]), **first["ddp"]}
    return report


def summary(steps: list[tuple]) -> dict:
    """Seconds of each step where it took longest, most bytes that a host sent, and the ratio to DDP's in pairs."""
    seconds = [worst(s[0]) for s in steps]
    found = {"step_s": statistics.median(seconds), "steps_s": seconds, "sent_bytes": worst(max(s[1] for s in steps))}
    if len(steps[0]) == 3:
        found["ratio"] = statistics.median(worst(s[2]) / t for s, t in zip(steps, seconds))
    return found


def look(variant: Variant, x: Tensor, exact: list[Tensor]) -> dict:
    """A first step, without feedback of errors yet: are all ranks' bits the same, and how far from float64?"""
    variant.step(x)
    difference = sum((g.double() - e).square().sum() for g, e in zip(variant.gradients(), exact))
    size = sum(e.square().sum() for e in exact)
    return {"bitwise": same_everywhere(variant.gradients()), "error": worst((difference / size).sqrt().item())}


def exact_gradients(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The mean over all ranks in float64, of gradients that each rank makes in float32."""
    parameters = list(module.parameters())
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for x in inputs:
        for t, g in zip(total, torch.autograd.grad(module(x), parameters)):
            t += g / len(inputs)
    return total


def backward_alone(variant: Variant, x: Tensor) -> float:
    """Seconds of a backward pass without a reduction, on all hosts at a time."""
    variant.module.zero_grad()
    loss = variant.module(x)
    dist.barrier()
    start = time.perf_counter()
    torch.autograd.grad(loss, list(variant.module.parameters()))
    return time.perf_counter() - start


def latency() -> float:
    """Seconds of an all-to-all and an all-gather of next to nothing."""
    ranks = dist.get_world_size()
    a, b = torch.zeros(2, 16 * ranks, dtype=torch.uint8)

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def both():
        dist.all_to_all_single(a, b)
        gather(a, b[:16])

    return timed(both, 20)


def work(buckets: list[int], ranks: int, wire: str) -> dict:
    """Seconds of the kernels over all buckets, on all hosts at a time."""
    each = [bucket_work(BucketLayout([numel], ranks, wire)) for numel in buckets]
    return {name: worst(sum(w[k] for w in each)) for k, name in enumerate(("pack_s", "reduce_s", "unpack_s"))}


def bucket_work(layout: BucketLayout) -> tuple[float, float, float]:
    gradients = [torch.randn(layout.numel)]
    feedback, sum_feedback = (torch.zeros(n) if layout.quantised else None for n in (layout.numel, layout.chunk))
    sent = genfast.pack_gradients(gradients, layout, residual=feedback).wire
    received = sent.clone()
    dist.barrier()
    return (
        timed(lambda: genfast.pack_gradients(gradients, layout, residual=feedback, out=sent), 3),
        timed(lambda: genfast.reduce_chunks(received, layout, scale=0.5, residual=sum_feedback, out=sent[0]), 3),
        timed(lambda: genfast.unpack_gradients(sent, layout, gradients), 3),
    )


def timed(function, times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def worst(value: float) -> float:
    """The largest of all ranks."""
    t = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def same_everywhere(tensors: list[Tensor]) -> bool:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.numpy())
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest.hexdigest())
    return len(set(found)) == 1


def _end_with_the_starter() -> None:
    sys.stdin.read()  # a pipe, which ends when the starter does, however that comes
    os._exit(1)


if __name__ == "__main__":
    main()
