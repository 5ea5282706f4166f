"""Residual quantisation with the Triton kernels of ``nearest_code``; the subtraction between them is PyTorch's.

``genfast.reference.residual_quantize`` is the specification. One residual is kept, in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.kernels.vector_quantize import nearest_code


def residual_quantize(z: Tensor, codebooks: list[Tensor], *, metric, exact, indices, z_q, errors) -> None:
    """As the reference, for every dtype but float64."""
    residual = z.to(torch.float32, copy=True)
    total = z_q.zero_() if z_q.dtype == torch.float32 else torch.zeros_like(residual)
    group = torch.arange(len(codebooks[0]), device=z.device)
    for q, codebook in enumerate(codebooks):
        nearest_code(residual, codebook, metric=metric, exact=exact, indices=indices[q][..., None], distances=None)
        code = codebook[group, indices[q].clamp_min(0)].float()
        code = code.masked_fill(indices[q][..., None] < 0, torch.nan)
        residual -= code
        total += code
        if errors is not None:
            errors[q] = residual.double().square().sum(-1)
    if total is not z_q:
        z_q.copy_(total)
