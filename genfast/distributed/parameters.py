"""The parameters whose gradients are reduced: their names, what is refused, and whether all ranks have the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genfast.distributed.failures import Watch, named
from genfast.ops.gradient_bucket import DTYPES


class ParameterList:
    """Names and parameters that require gradients, each parameter once, in one order.

    Raises:
        TypeError: a parameter that cannot travel: of another dtype, or one whose gradient is sparse.
        ValueError: none requires a gradient, or they are on several devices.
    """

    def __init__(self, source: nn.Module | Iterable[tuple[str, Tensor]]):
        sparse = set()
        if isinstance(source, nn.Module):
            source = _unwrapped(source)
            embeddings = (m for m in source.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
            sparse = {id(m.weight) for m in embeddings if m.sparse}
            source = source.named_parameters()
        found: dict[int, tuple[str, Tensor]] = {}
        for name, p in source:
            if p.requires_grad:
                found.setdefault(id(p), (name.replace("_orig_mod.", ""), p))
        if not found:
            raise ValueError("module_or_named_parameters has no parameter that requires a gradient")
        self.names, self.parameters = zip(*found.values())
        self.index = {key: k for k, key in enumerate(found)}
        for name, p in found.values():
            if id(p) in sparse:
                raise TypeError(f"{name} has sparse gradients (sparse=True), which cannot be reduced in buckets")
            if p.dtype not in DTYPES:
                raise TypeError(f"{name} is {p.dtype}; gradients travel from float32, bfloat16 and float16")
            if p.device != self.device:
                raise ValueError(f"{name} is on {p.device}; expected {self.device}, as {self.names[0]}")

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def indices(self, parameters: Iterable[Tensor]) -> tuple[int, ...]:
        """Where parameters are in the list.

        Raises:
            ValueError: one of them is not in it.
        """
        found = tuple(self.index.get(id(p), -1) for p in parameters)
        if -1 in found:
            shape = list(parameters[found.index(-1)].shape)
            raise ValueError(f"a parameter of shape {shape} is not among those that were given at construction")
        return found

    def lines(self) -> list[str]:
        """One per parameter, as they are compared between ranks."""
        pairs = zip(self.names, self.parameters)
        return [f"{name} {list(p.shape)} {str(p.dtype).removeprefix('torch.')}" for name, p in pairs]

    def compare(self, watch: Watch, options: str) -> None:
        """Refuse, on all ranks, lists that are not the same on all ranks. The first rank's is the measure.

        Raises:
            ValueError: with the first difference; the same text on every rank.
            RankFailure: a rank did not come.
        """
        mine = [*self.lines(), options]
        digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
        first, *others = watch.members
        if watch.rank == first:
            watch.tell(lines=json.dumps(mine), digest=digest)
            keys = [f"said/{r}" for r in others]
            said = watch.read(keys)
            if said is None:
                absent = [r for r, there in zip(others, watch.there(keys)) if not there]
                message = f"{named(absent)} did not make {options.split(',')[0]} in {watch.timeout:g} s"
                raise watch.end("RankFailure", absent, message)
            if any(said):
                raise watch.end("ValueError", [], next(filter(None, said)))
            watch.tell(agreed="")
        else:
            expected = watch.read(["digest"])
            if expected is None:
                raise watch.failure("the list of parameters", f"rank {first} did not make its own")
            difference = ""
            if expected != [digest]:
                (lines,) = watch.read(["lines"])
                difference = _difference(watch.rank, mine, first, json.loads(lines))
            watch.tell(**{f"said/{watch.rank}": difference})
            if watch.read(["agreed"]) is None:
                raise watch.failure("the list of parameters", f"rank {first} said nothing of it")


def _difference(rank: int, mine: list[str], first: int, expected: list[str]) -> str:
    for k, (a, b) in enumerate(zip(mine[:-1], expected[:-1])):
        if a != b:
            return f"the ranks have different parameters: number {k} is {a} on rank {rank}, and {b} on rank {first}"
    if len(mine) != len(expected):
        longer, where = (mine, rank) if len(mine) > len(expected) else (expected, first)
        k = min(len(mine), len(expected)) - 1
        which = f"number {k}, {longer[k]}, is on rank {where} only (of {rank}, {first})"
        return f"the ranks have different parameters: {which}"
    return f"the ranks have different options: {mine[-1]} on rank {rank}, and {expected[-1]} on rank {first}"


def _unwrapped(module: nn.Module) -> nn.Module:
    """What DistributedDataParallel and torch.compile are wrapped around."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module
