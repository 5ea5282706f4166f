"""Random tensors in rotation, so that a bandwidth-bound case finds none of its inputs in a cache."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

MOST_BYTES = 2**30
MOST_TENSORS = 128


@functools.cache
def last_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache before memory; 64 MiB where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 0))
    return max(sizes) or 2**26


class Pool:
    """Tensors of one shape with standard normal values, handed out in turn: ``pool[i]`` is one of ``len(pool)``.

    Together they are twice the last cache, within 1 GiB and 128 tensors, and at least ``least`` of them.
    """

    def __init__(self, shape, dtype: torch.dtype, device: torch.device, *, seed: int, least: int = 4):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        size = base.numel() * base.element_size()
        wanted = -(-min(2 * last_cache_bytes(device), MOST_BYTES) // size)
        self.tensors: list[Tensor] = [base]
        for i in range(1, max(least, min(wanted, MOST_TENSORS))):
            # Rolled by a prime: other values everywhere for the price of a copy.
            self.tensors.append(base.flatten().roll(7919 * i).view(shape))

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, i: int) -> Tensor:
        return self.tensors[i % len(self.tensors)]


@functools.lru_cache(maxsize=12)
def pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0, least: int = 4) -> Pool:
    """The pool with these properties, shared by the cases that ask for the same."""
    return Pool(shape, dtype, device, seed=seed, least=least)
