"""What torchrun starts on every rank: one training per method; rank 0 writes the curves down."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from genfast.demo.data import Digits, load_digits
from genfast.demo.ddp import BUILT_IN, METHODS, SINGLE
from genfast.demo.ddp.train import Curve, denoiser, train
from genfast.distributed import HookState, comm_hook
from genfast.gradient_wire import BucketLayout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    digits, rank = load_digits(), dist.get_rank()
    curves = {}
    for method in arguments.methods:
        if method != SINGLE:
            curves[method] = _reduced(method, digits, arguments.steps, arguments.seed)
        elif rank == 0:
            curves[method] = train(denoiser(arguments.seed), digits, arguments.steps, arguments.seed)
        dist.barrier()
    if rank == 0:
        arguments.out.write_text(json.dumps({name: dataclasses.asdict(curve) for name, curve in curves.items()}))
    dist.destroy_process_group()


def _reduced(method: str, digits: Digits, steps: int, seed: int) -> Curve:
    """Under DDP, with its own all-reduce or with our hook."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    net = denoiser(seed)
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
    state, buckets = None, {}
    if method != BUILT_IN:
        state = HookState(net, method)

        # Without annotations, which DDP would compare, as strings, with its own.
        def hook(state, bucket):
            buckets[bucket.index()] = bucket.buffer().numel()
            return comm_hook(state, bucket)

        ddp.register_comm_hook(state, hook)

    def mean(losses: list[float]) -> list[float]:
        t = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(t)
        return (t / ranks).tolist()

    curve = train(ddp, digits, steps, seed, rank, ranks, mean)
    curve.same_bits = _same_bits(net)
    if state is None:
        # A ring: n - 1 parts there, n - 1 parts back.
        curve.sent_bytes = 2 * (ranks - 1) * 4 * sum(p.numel() for p in net.parameters()) // ranks
    else:
        layouts = [BucketLayout([numel], ranks, method) for numel in buckets.values()]
        curve.sent_bytes = sum(2 * (ranks - 1) * layout.chunk_bytes for layout in layouts)
        state.close()
    return curve


def _same_bits(net: torch.nn.Module) -> bool:
    digest = hashlib.sha256()
    for p in net.parameters():
        digest.update(p.detach().numpy())
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest.hexdigest())
    return len(set(found)) == 1


if __name__ == "__main__":
    main()
