"""DistributedDataParallel with its gradients on the wire in a format of your choice, and one rank that hangs.

torchrun --nproc-per-node 2 examples/with_ddp.py [--wire int8] [--without-ddp | --sharded] [--hang]

The ranks fit a small network to a function, and print the loss and the norm of the last gradients. With
--hang, rank 1 hangs in the middle: rank 0 ends with an error that says so, and torchrun ends rank 1.
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genfast

TIMEOUT = 5.0


def batch(rank: int, step: int):
    """Every rank's own part of a step's points."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, x.sin().sum(1, keepdim=True)


def with_ddp(net, options):
    ddp = DistributedDataParallel(net)
    state = genfast.HookState(net, options.wire, max_norm=1.0, timeout=TIMEOUT)
    ddp.register_comm_hook(state, genfast.comm_hook)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.003, fused=True)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        finished = state.finish()
        finished.apply_to(optimizer)  # clips, and skips gradients that are not finite, without another pass
        optimizer.step()
        return finished

    return ddp, step


def without_ddp(net, options):
    reducer = genfast.GradientReducer(net, options.wire, max_norm=1.0, timeout=TIMEOUT)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.003, fused=True)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        finished = reducer.finish()
        finished.apply_to(optimizer)
        optimizer.step()
        return finished

    return net, step


def sharded(net, options):
    optimizer = genfast.ShardedReducer(
        net, torch.optim.AdamW, wire=options.wire, max_norm=1.0, timeout=TIMEOUT, lr=0.003, fused=True
    )

    def step(loss):
        loss.backward()
        return optimizer.step()

    return net, step


def parsed(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--wire", default="int8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--without-ddp", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--hang", action="store_true")
    return parser.parse_args(argv)


def fit(options) -> tuple[float, float]:
    torch.manual_seed(0)  # the same network on all ranks
    net = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
    make = sharded if options.sharded else without_ddp if options.without_ddp else with_ddp
    model, step = make(net, options)
    for k in range(options.steps):
        if options.hang and k == options.steps // 2 and dist.get_rank() == 1:
            time.sleep(3600)
        x, y = batch(dist.get_rank(), k)
        loss = (model(x) - y).square().mean()
        finished = step(loss)
        if not finished.finite:
            print("not finite:", finished.bad_parameters())
    if dist.get_rank() == 0:
        print(f"{make.__name__}, wire {options.wire}: loss {loss:.4f}, norm of the gradients {finished.norm:.4f}")
    return loss.item(), finished.norm.item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    fit(parsed())
    dist.destroy_process_group()
