"""What the classes of this package share: how the peer reads a tensor, and which dtypes run fused."""

from __future__ import annotations

import torch
from torch import Tensor

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channel_last(t: Tensor, move: bool) -> Tensor:
    """[B, N, C] of [B, N, C], or with ``move`` of [B, C, ...]: a view of what is contiguous."""
    return t.movedim(1, -1).flatten(1, -2) if move else t


def restored(t: Tensor, shape: torch.Size, move: bool) -> Tensor:
    """[B, N, C] as it came, or with ``move`` [B, C, ...], of a tensor that had that shape."""
    return t.unflatten(1, shape[2:]).movedim(-1, 1) if move else t
