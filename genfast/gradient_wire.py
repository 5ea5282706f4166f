"""How gradients travel: the formats of the wire, and the layout of a bucket in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from genfast._registry import export

BLOCK = 256
"""Values that share a scale on a quantised wire."""
SMALLEST = 2.0**-100
"""A block whose largest value is below this travels as zeros, so that no scale or its inverse leaves float32."""
ALIGNMENT = 16


@dataclass(frozen=True)
class Wire:
    """A format. ``largest`` is the code of a block's largest value; None where values travel without a scale."""

    code: int
    dtype: torch.dtype
    largest: float | None = None


WIRES = {
    "fp32": Wire(0, torch.float32),
    "bf16": Wire(1, torch.bfloat16),
    "fp16": Wire(2, torch.float16),
    "int8": Wire(3, torch.int8, 127.0),
    "fp8_e4m3": Wire(4, torch.float8_e4m3fn, 448.0),
    "fp8_e5m2": Wire(5, torch.float8_e5m2, 57344.0),
}


@export("gradient_bucket")
@dataclass(frozen=True)
class BucketLayout:
    """Where the values of some tensors lie in a bucket that ``ranks`` processes reduce together.

    The tensors follow one another, and zeros fill the end up to ``ranks`` chunks of ``chunk`` values. On the wire a
    bucket is uint8 [ranks, chunk_bytes]: chunk r, which rank r reduces, is the codes of its values, then, on a
    quantised wire, a float32 scale for each 256 of them.

    Args:
        numels: how many values each tensor has.
        ranks: processes that take part.
        wire: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"``, ``"fp8_e4m3"`` or ``"fp8_e5m2"``.

    Raises:
        ValueError: an unknown wire, a negative size, or no rank.
    """

    numels: tuple[int, ...]
    ranks: int
    wire: str

    def __init__(self, numels: Sequence[int], ranks: int, wire: str):
        if wire not in WIRES:
            raise ValueError(f"wire must be one of {', '.join(WIRES)}; got {wire!r}")
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"ranks must be a whole number of at least 1, got {ranks!r}")
        numels = tuple(int(n) for n in numels)
        if any(n < 0 for n in numels):
            raise ValueError(f"numels must not be negative, got {min(numels)}")
        for name, value in (("numels", numels), ("ranks", ranks), ("wire", wire)):
            object.__setattr__(self, name, value)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins."""
        return tuple(accumulate(self.numels, initial=0))[:-1]

    @cached_property
    def numel(self) -> int:
        """Values of all tensors."""
        return sum(self.numels)

    @cached_property
    def chunk(self) -> int:
        """Values of a chunk, a multiple of 256."""
        return -(-self.numel // (self.ranks * BLOCK)) * BLOCK

    @property
    def quantised(self) -> bool:
        """Whether blocks have scales."""
        return WIRES[self.wire].largest is not None

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a chunk's codes; its scales, if it has any, follow."""
        return self.chunk * WIRES[self.wire].dtype.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, a multiple of 16."""
        scales = 4 * (self.chunk // BLOCK) if self.quantised else 0
        return -(-(self.code_bytes + scales) // ALIGNMENT) * ALIGNMENT

    @cached_property
    def native(self) -> tuple[int, ...]:
        """What the native kernels are told of a layout."""
        return self.ranks, self.chunk, self.chunk_bytes, self.code_bytes, self.numel, WIRES[self.wire].code

    @property
    def shape(self) -> tuple[int, int]:
        """Of the bucket on the wire, in bytes."""
        return self.ranks, self.chunk_bytes


def aligned(bucket: torch.Tensor) -> torch.Tensor:
    """The bucket where its codes and scales may be read 16 bytes at a time: itself, or a copy."""
    return bucket.clone() if bucket.data_ptr() % ALIGNMENT else bucket
