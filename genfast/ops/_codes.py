"""What the ops of vector quantisation share: how vectors and codebooks are passed, and their checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

VECTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_CODES = 2**31 - 1


def check_vectors(name: str, t) -> None:
    """A dense floating tensor of a dtype that the family takes."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in VECTOR_DTYPES or t.layout is not torch.strided:
        raise TypeError(f"{name} must be dense float32, bfloat16, float16 or float64; got {t.dtype}, {t.layout}")


def checked_codebook(codebook, device, name: str = "codebook") -> Tensor:
    """As [G, K, D]."""
    check_vectors(name, codebook)
    if codebook.dim() not in (2, 3) or 0 in codebook.shape:
        raise ValueError(f"{name} is {list(codebook.shape)}; expected [K, D] or [G, K, D], none of them 0")
    if codebook.shape[-2] > MOST_CODES:
        raise ValueError(f"{name} has {codebook.shape[-2]} codes; at most {MOST_CODES}")
    if codebook.device != device:
        raise ValueError(f"{name} is on {codebook.device}; expected {device}, as z")
    return codebook if codebook.dim() == 3 else codebook[None]


def checked_dim(z: Tensor, dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or not -z.dim() <= dim < z.dim():
        raise ValueError(f"dim must be a dimension of z, which has {z.dim()}; got {dim!r}")
    return dim % z.dim()


def grouped(z: Tensor, dim: int, groups: int) -> Tensor:
    """[B, S, G, D] of a tensor whose dimension ``dim`` holds G D numbers: a view wherever strides can say it, as for
    channel-last [B, L, C] and for channel-first [B, C, H, W]."""
    rows = z.movedim(dim, -1)
    lead = rows.shape[:-1]
    first = lead[0] if len(lead) > 1 else 1
    rows = rows.reshape(first, math.prod(lead[1:] if len(lead) > 1 else lead), rows.shape[-1])
    return rows.unflatten(-1, (groups, -1)) if rows.shape[-1] else rows[..., None]


def checked_rows(z, codebook, dim: int) -> tuple[Tensor, Tensor, int]:
    """(z as [B, S, G, D], codebook as [G, K, D], dim counted from the front)."""
    check_vectors("z", z)
    if z.dim() == 0:
        raise ValueError("z is a single number; expected at least one dimension")
    codebook = checked_codebook(codebook, z.device)
    dim = checked_dim(z, dim)
    groups, _, size = codebook.shape
    if z.shape[dim] != groups * size:
        expected = f"{groups} groups of {size}" if groups > 1 else f"{size}"
        raise ValueError(f"z is {list(z.shape)}; expected {expected} in dimension {dim}, as codebook has")
    return grouped(z, dim, groups), codebook, dim
