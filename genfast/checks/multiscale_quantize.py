"""Cases of ``multiscale_residual_quantize``, which ``checks/residual_quantize.py`` runs: every code must be the nearest
to what the scales before have left, and the sum near to that of the codes in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.backends import backend
from genfast.ops.multiscale_quantize import MultiscaleQuantized, multiscale_residual_quantize
from genfast.ops.vector_quantize import nearest_code
from genfast.reference.multiscale_quantize import bicubic, resized


class Mixing:
    """A function of maps that is no identity, and remembers what it gave."""

    def __init__(self):
        self.given: list[Tensor] = []

    def __call__(self, codes: Tensor) -> Tensor:
        mixed = mix(codes)
        self.given.append(mixed)
        return mixed


def mix(codes: Tensor) -> Tensor:
    return 0.75 * codes + 0.25 * codes.roll(1, 1)


@dataclass(frozen=True)
class MultiscaleCase:
    """One call of ``multiscale_residual_quantize`` on [batch, size, *scales[-1]]."""

    batch: int
    codes: int
    size: int
    scales: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    metric: str = "l2"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        scales = ",".join(f"{h}x{w}" for h, w in self.scales)
        return f"multiscale {self.batch}x{self.codes}x{self.size} {scales} {dtype} {self.metric}"

    def arguments(self, device) -> tuple[Tensor, Tensor]:
        """(z, codebook)"""
        generator = torch.Generator().manual_seed(self.codes + self.size)
        z = torch.randn(self.batch, self.size, *self.scales[-1], generator=generator)
        codebook = torch.randn(self.codes, self.size, generator=generator)
        return z.to(device, self.dtype), codebook.to(device)

    def run(self, device) -> tuple[MultiscaleQuantized, list[Tensor]]:
        """What is returned, and what each scale added."""
        phi = Mixing()
        z, codebook = self.arguments(device)
        return multiscale_residual_quantize(z, codebook, self.scales, phi=phi, metric=self.metric), phi.given

    def check(self, device) -> tuple[float, float]:
        """(error, what it may be); an infinite error where an index or a count is wrong."""
        out, given = self.run(device)
        z, codebook = self.arguments(device)
        left, total, largest = z.float(), torch.zeros(z.shape, dtype=torch.float64, device=z.device), 0.0
        for scale, index, added, count in zip(self.scales, out.indices, given, out.usage):
            rows = F.interpolate(left, size=scale, mode="area") if scale != self.scales[-1] else left
            with backend("reference"):
                expected = nearest_code(rows, codebook, dim=1, metric=self.metric)
            if not torch.equal(index, expected) or not torch.equal(count, _counts(index, self.codes)):
                return float("inf"), 0.0
            total += mix(resized(codebook[index].movedim(-1, 1), z.shape[2:], bicubic))
            largest = max(largest, float(total.abs().max()))
            left = left - added
        error = float((out.z_q.double() - total).abs().max())
        rounding = torch.finfo(torch.float32).eps * 4 * len(self.scales) + torch.finfo(self.dtype).eps / 2
        return error, rounding * largest


def _counts(index: Tensor, codes: int) -> Tensor:
    return torch.bincount(index.flatten(), minlength=codes)


def cases() -> list[MultiscaleCase]:
    """A few, cheap enough to run always."""
    return [
        MultiscaleCase(2, 100, 8, ((1, 1), (2, 2), (3, 3), (5, 5), (8, 8))),
        MultiscaleCase(2, 300, 32, ((1, 1), (2, 3), (4, 7)), torch.bfloat16, "cosine"),
        MultiscaleCase(1, 20, 5, ((6, 4), (6, 5)), torch.float16),
    ]
