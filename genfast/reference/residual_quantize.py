"""What the op ``residual_quantize`` computes, in plain PyTorch: the specification.

With r_0 = z, stage q takes the code e_q of its codebook that is nearest to r_q (``nearest_code``), and r_{q+1} = r_q -
e_q. The result is e_0 + e_1 + ..., added in this order. All of it is float32 (float64 of float64), and rounded to the
dtype of z at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference.vector_quantize import nearest_code


def residual_quantize(z: Tensor, codebooks: list[Tensor], *, metric, exact, indices, z_q, errors) -> None:
    """z [B, S, G, D] and Q codebooks [G, K, D] to indices int64 [Q, B, S, G], z_q like z, and |r_{q+1}|^2 as errors
    [Q, B, S, G], or None.

    A row that is not finite has -1, and NaN in the other two.
    """
    dtype = torch.float64 if torch.float64 in (z.dtype, *(t.dtype for t in codebooks)) else torch.float32
    residual, total = z.to(dtype), torch.zeros(z.shape, dtype=dtype, device=z.device)
    for q, codebook in enumerate(codebooks):
        nearest_code(residual, codebook, metric=metric, exact=exact, indices=indices[q][..., None], distances=None)
        group = torch.arange(len(codebook), device=z.device)
        code = codebook[group, indices[q].clamp_min(0)].to(dtype)
        code = code.masked_fill(indices[q][..., None] < 0, torch.nan)
        residual, total = residual - code, total + code
        if errors is not None:
            errors[q] = residual.double().square().sum(-1).to(errors.dtype)
    z_q.copy_(total)
