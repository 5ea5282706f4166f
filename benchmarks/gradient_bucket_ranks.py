"""Two ranks on this machine that train by turns: DDP alone, DDP with a hook of ours, and our reducer.

They are processes of one thread each, joined by Gloo over the loopback interface, and do what their parent tells them
through pipes. A step begins on both at once, and takes as long as the slower one says.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import genfast

RANKS, BATCH, MAX_NORM = 2, 4, 1.0
DDP, DDP_VIEW = "DDP default + clip_grad_norm_", "DDP gradient_as_bucket_view + clip_grad_norm_"


class Layers(nn.Module):
    """``count`` square layers with biases: two tensors each."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Variant:
    """A model and one way to reduce and clip its gradients.

    A hook runs under ``gradient_as_bucket_view``, where DDP keeps no second copy of the gradients. Ours hands the
    clip coefficient to a fused optimizer, which applies it in its step; that step is outside what is timed, for all.
    """

    def __init__(self, name: str, layers: int, width: int):
        torch.manual_seed(0)
        self.state = None
        self.module = self.model = Layers(layers, width)
        for layer in self.module.layers:
            nn.init.orthogonal_(layer.weight)
        kind, _, wire = name.partition(" ")
        if kind == "reducer":
            self.state = genfast.GradientReducer(self.module, wire, timeout=60)
        else:
            self.model = DistributedDataParallel(self.module, gradient_as_bucket_view=name != DDP)
        if kind == "hook":
            self.state = genfast.HookState(self.module, wire, timeout=60)
            self.model.register_comm_hook(self.state, genfast.comm_hook)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0, fused=True)

    def step(self, x: Tensor) -> float:
        """Of training; returns the seconds of its backward pass with the reduction, and of clipping."""
        if self.module.layers[0].weight.grad is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        loss = self.model(x)
        dist.barrier()
        start = time.perf_counter()
        loss.backward()
        if self.state is None:
            nn.utils.clip_grad_norm_(self.module.parameters(), MAX_NORM)
        else:
            self.state.finish(max_norm=MAX_NORM).apply_to(self.optimizer)
        return time.perf_counter() - start

    def gradients(self, x: Tensor) -> bytes:
        """Of a step, flat, before they are clipped."""
        self.optimizer.zero_grad()
        self.model(x).backward()
        if self.state is not None:
            self.state.finish()
        return torch.cat([p.grad.flatten() for p in self.module.parameters()]).numpy().tobytes()

    def own_gradients(self, x: Tensor) -> bytes:
        """Of this rank alone."""
        found = torch.autograd.grad(self.module(x), list(self.module.parameters()))
        return torch.cat([g.flatten() for g in found]).numpy().tobytes()


def rank_main(rank: int, port: int, layers: int, width: int, orders) -> None:
    """What a rank does until the pipe ends: ``(method, variant)`` in, its result or error out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    x = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(rank))
    variants: dict[str, Variant] = {}
    while True:
        try:
            method, name = orders.recv()
        except EOFError:
            os._exit(0)  # without waiting for the other rank
        try:
            if name not in variants:
                variants[name] = Variant(name, layers, width)
            orders.send((getattr(variants[name], method)(x), None))
        except Exception as error:
            orders.send((None, f"rank {rank}: {type(error).__name__}: {error}"))


class Ranks:
    """The processes, from here."""

    def __init__(self, layers: int, width: int):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        before = {k: os.environ.get(k) for k in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")}
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        self.pipes = []
        try:
            for rank in range(RANKS):
                here, there = context.Pipe()
                context.Process(target=rank_main, args=(rank, port, layers, width, there), daemon=True).start()
                there.close()
                self.pipes.append(here)
        finally:
            for k, v in before.items():
                os.environ.pop(k) if v is None else os.environ.update({k: v})

    def tell(self, method: str, name: str) -> list:
        """Both ranks' results."""
        for pipe in self.pipes:
            pipe.send((method, name))
        answers = [pipe.recv() for pipe in self.pipes]
        errors = [error for _, error in answers if error is not None]
        if errors:
            raise RuntimeError("; ".join(errors))
        return [result for result, _ in answers]

    def exact(self) -> Tensor:
        """The mean of the ranks' gradients, in float64."""
        return torch.stack([flat(g).double() for g in self.tell("own_gradients", DDP)]).mean(0)


class Step:
    """Steps of a variant, for ``benchmarks.timing``. As a call it returns the gradients of one, before clipping."""

    def __init__(self, ranks: Ranks, name: str):
        self.ranks, self.name = ranks, name

    def __call__(self, i: int) -> Tensor:
        mine, other = self.ranks.tell("gradients", self.name)
        if mine != other:
            raise RuntimeError(f"{self.name}: the ranks have different gradients")
        return flat(mine)

    def seconds(self, i: int) -> float:
        return max(self.ranks.tell("step", self.name))


def flat(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
