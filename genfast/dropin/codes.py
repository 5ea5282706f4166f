"""The lookup that the drop-ins of vector quantisers share."""

from __future__ import annotations

from torch import Tensor

from genfast.ops.vector_quantize import nearest_code


def nearest(z: Tensor, codebook: Tensor, *, dim: int = -1, metric: str = "l2") -> Tensor:
    """:func:`nearest_code` for a peer that knows no index -1: a vector that is not finite gets code 0, which is what an
    argmax or argmin over a row of NaN gives."""
    return nearest_code(z, codebook, dim=dim, metric=metric, nonfinite="index").clamp_min_(0)
