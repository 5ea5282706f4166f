"""The physical floor of a bandwidth-bound case: the bytes it must move, at the bandwidth of the best plain copy here.

The copies run in turn with the case itself, on rotated buffers of the case's own size, so that both see the same
memory, the same neighbours and the same clock. The faster of torch's and genfast's copy sets the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import genfast
from benchmarks.rotation import pool


@dataclass(frozen=True)
class Copies:
    """Plain copies of one buffer size, by name; each moves ``bytes`` (a read and a write)."""

    runs: dict[str, Callable[[int], object]]
    bytes: int


def copies(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Copies:
    """The candidates for the fastest copy of a tensor of this shape."""
    sources, targets = pool(shape, dtype, device), pool(shape, dtype, device, seed=1)
    one = genfast.StepTable([1.0], device=device)

    def by_torch(i):
        targets[i].copy_(sources[i])

    def by_genfast(i):
        genfast.sampler_step([sources[i]], one, out=targets[i])

    size = sources[0].numel() * sources[0].element_size()
    return Copies({"torch copy_": by_torch, "genfast copy": by_genfast}, 2 * size)
