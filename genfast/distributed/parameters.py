"""The parameters whose gradients are reduced: their names, what is refused, and whether all ranks have the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

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

    def compare(self, store, rank: int, members: list[int], options: str) -> None:
        """Refuse, on all ranks, lists that are not the same on all ranks. Rank 0's is the measure.

        Raises:
            ValueError: with the first difference; the same text on every rank.
        """
        mine = [*self.lines(), options]
        digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
        if rank == members[0]:
            store.multi_set(["lines", "digest"], [json.dumps(mine), digest])
        expected = digest if store.get("digest").decode() == digest else json.loads(store.get("lines"))
        store.set(f"said/{rank}", "" if expected == digest else _difference(rank, mine, members[0], expected))
        if rank == members[0]:
            said = [store.get(f"said/{r}").decode() for r in members]
            store.set("verdict", next(filter(None, said), ""))
        verdict = store.get("verdict").decode()
        if verdict:
            raise ValueError(verdict)


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
