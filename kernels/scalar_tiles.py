"""What the kernels of ``scalar_quantize`` share: where a program's rows are.

A program has a tile of rows of one batch entry and group, and takes their numbers one dimension after the other: with
channels first these are neighbours in memory, with channels last the lines that the first dimension has brought serve
the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 128
EXACT = {"num_warps": 4, "enable_fp_fusion": False}


def programs_of(z: Tensor) -> int:
    """One per tile, of z [B, S, G, D]."""
    return z.shape[0] * triton.cdiv(z.shape[1], TILE) * z.shape[2]


@triton.jit
def place(length, groups, TILE: tl.constexpr):
    """(batch entry, positions in it [TILE], group) of a program."""
    tiles = tl.cdiv(length, TILE)
    t = tl.program_id(0)  # divided in 32 bits: there are no more programs, and 64 would be a call, with a stack
    tile = t // groups
    position = (tile % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    return (tile // tiles).to(tl.int64), position, (t % groups).to(tl.int64)


@triton.jit
def offset(place, strides):
    return place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]
