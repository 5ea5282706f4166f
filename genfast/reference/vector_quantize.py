"""What the op ``nearest_code`` computes, in plain PyTorch: the specification.

A code's score for a row is, in float64 and summed from the first dimension to the last,

* ``"l2"``: sum_d (z_d - e_d)^2,
* ``"dot"``: - sum_d z_d e_d,
* ``"cosine"``: - sum_d z_d e_d / max(sqrt(sum_d e_d^2), 1e-12); the row's own length does not change the order.

The nearest code has the smallest score, of equal ones the lowest index. A code that is not finite is never chosen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

METRICS = ("l2", "cosine", "dot")
SHORTEST = 1e-12
"""What a length is at least, where it divides."""
_CHUNK = 1 << 22


def root(x: Tensor) -> Tensor:
    """The square root, rounded as IEEE asks: on the CPU torch may use MKL's, whose last bit is not always right."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def scores(z: Tensor, codes: Tensor, metric: str) -> Tensor:
    """float64 [N, K] of rows [N, D] and codes [K, D]."""
    z, codes = z.double(), codes.double()
    total = torch.zeros(len(z), len(codes), dtype=torch.float64, device=z.device)
    squares = torch.zeros(len(codes), dtype=torch.float64, device=z.device)
    for d in range(z.shape[1]):
        if metric == "l2":
            total += (z[:, d, None] - codes[:, d]).square()
        else:
            total -= z[:, d, None] * codes[:, d]
            squares += codes[:, d].square()
    if metric == "cosine":
        total /= root(squares).clamp_min(SHORTEST)
    return total.masked_fill(~codes.isfinite().all(1), torch.inf)


def nearest_code(z: Tensor, codebook: Tensor, *, metric, exact, indices, distances) -> None:
    """z [B, S, G, D] and codebook [G, K, D] to indices int64 [B, S, G, k] and distances float32 alike, or None.

    A row that is not finite has -1 and NaN; places for which no finite code is left have -1 and infinity. The distance
    is the score of ``"l2"``, the inner product of ``"dot"``, the cosine of ``"cosine"`` (larger is nearer in the last
    two). ``exact`` False allows what the op's docstring says; this is exact always.
    """
    k = indices.shape[-1]
    step = max(_CHUNK // codebook.shape[1], 1)
    for g, codes in enumerate(codebook):
        for b in range(z.shape[0]):
            for first in range(0, z.shape[1], step):
                rows = z[b, first : first + step, g]
                value, index = scores(rows, codes, metric).sort(dim=1, stable=True)
                value, index = value[:, :k], index[:, :k]
                bad = ~rows.isfinite().all(1, keepdim=True)
                index = index.masked_fill(bad | (value == torch.inf), -1)
                value = value.masked_fill(bad, torch.nan)
                indices[b, first : first + step, g] = index
                if distances is None:
                    continue
                if metric == "cosine":
                    value = value / rows.double().square().sum(1, keepdim=True).sqrt().clamp_min(SHORTEST)
                distances[b, first : first + step, g] = (value if metric == "l2" else -value).to(distances.dtype)
