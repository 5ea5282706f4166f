"""What ``multiscale_residual_quantize`` computes, in plain PyTorch: the specification.

With r_0 = z and f_0 = 0, scale s of S takes for every place of A_s r_s (r_s averaged down to the scale's size) the
nearest code of the codebook (``nearest_code``), a map c_s, and

    f_{s+1} = f_s + phi_s(B_s c_s),  r_{s+1} = r_s - phi_s(B_s c_s),

B_s being bicubic interpolation to z's size. Each loss is the mean over scales of mean (z - f_{s+1})^2. A transformer
that writes scale s + 1 is given A_{s+1} f_{s+1}.

Along a line of n numbers that becomes one of m, A's number i is the mean of those from floor(i n / m) to
ceil((i + 1) n / m), without the last. B's number i lies at x = (i + 1/2) n / m - 1/2 and is the sum of the four numbers
around x, at distances d weighted with w(d) = (a + 2) d^3 - (a + 3) d^2 + 1 up to 1, a d^3 - 5 a d^2 + 8 a d - 4 a up to
2, a = -3/4; beyond its ends the line has its end's number (Keys 1981).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.reference.vector_quantize import nearest_code


def place_of(position: float, functions: int) -> int:
    """Which of ``functions`` belongs to a scale at ``position``, s / (S - 1): the one whose tick is nearest, of two the
    first. Ticks are the middles of equal parts of [0, 1], but of four VAR's, evenly from 1/12 to 11/12."""
    first = 1 / (3 if functions == 4 else 2) / functions
    last = 1 - first
    step = (last - first) / max(functions - 1, 1)
    ticks = [i * step + first for i in range(functions - 1)] + [last]
    return min(range(functions), key=lambda i: abs(ticks[i] - position))


def averaging(n: int, m: int) -> Tensor:
    """float64 [m, n]: A."""
    found = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        first, end = i * n // m, -(-(i + 1) * n // m)
        found[i, first:end] = 1 / (end - first)
    return found


def bicubic(n: int, m: int) -> Tensor:
    """float64 [m, n]: B."""
    a = -0.75
    found = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        x = (i + 0.5) * n / m - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - j)
            inner = ((a + 2) * d - (a + 3)) * d * d + 1
            outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            found[i, min(max(j, 0), n - 1)] += inner if d <= 1 else outer
    return found


def resized(t: Tensor, size: tuple[int, int], matrix) -> Tensor:
    """float64 [B, C, *size] of a map [B, C, h, w], with one of the two above."""
    rows, columns = (matrix(n, m).to(t.device) for n, m in zip(t.shape[2:], size))
    return rows @ t.double() @ columns.T


def multiscale_residual_quantize(z: Tensor, codebook: Tensor, scales, *, phi, metric) -> tuple[list[Tensor], Tensor]:
    """float64 z [B, C, H, W] and codebook [K, C], scales as pairs, phi a list of functions, one for each scale, to
    (indices int64 [B, h, w] of each scale, f after each scale [S, B, C, H, W])."""
    left, total = z.double(), torch.zeros_like(z, dtype=torch.float64)
    indices, partial = [], []
    for scale, function in zip(scales, phi):
        rows = resized(left, scale, averaging).movedim(1, -1)
        index = torch.empty(rows.shape[:-1], dtype=torch.int64, device=z.device)
        nearest_code(
            rows.flatten(1, 2)[:, :, None], codebook.double()[None], metric=metric, exact=True,
            indices=index.view(len(z), -1, 1, 1), distances=None,
        )  # fmt: skip
        added = function(resized(codebook.double()[index].movedim(-1, 1), z.shape[2:], bicubic))
        left, total = left - added, total + added
        indices.append(index)
        partial.append(total)
    return indices, torch.stack(partial)
