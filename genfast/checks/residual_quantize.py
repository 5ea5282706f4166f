"""Cases of ``residual_quantize``: indices and sums must be equal, bit for bit. And of its kin of several scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genfast.backends import backend
from genfast.checks import multiscale_quantize
from genfast.checks.multiscale_quantize import MultiscaleCase
from genfast.ops.residual_quantize import residual_quantize


@dataclass(frozen=True)
class ResidualCase:
    """One call of ``residual_quantize``: ``rows`` vectors of ``size`` numbers in each of ``groups``."""

    rows: int
    stages: int
    codes: int
    size: int
    dtype: torch.dtype = torch.float32
    metric: str = "l2"
    groups: int = 1
    channel_first: bool = False
    nonfinite: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        extra = [f"G={self.groups}"] * (self.groups > 1) + ["channel first"] * self.channel_first
        extra += ["not finite"] * self.nonfinite
        return " ".join(["residual", f"{self.rows}x{self.stages}x{self.codes}x{self.size}", dtype, self.metric, *extra])

    def arguments(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, codebooks), the codes of later stages smaller."""
        generator = torch.Generator().manual_seed(self.rows + self.codes + self.size)
        shrink = 0.7 ** torch.arange(self.stages)[:, None, None]
        codebooks = torch.randn(self.groups, self.stages, self.codes, self.size, generator=generator) * shrink
        z = torch.randn(self.rows, self.groups * self.size, generator=generator)
        if self.nonfinite:
            z[::3, 0] = torch.nan
            codebooks[:, 1, ::2] = torch.inf
        if self.channel_first:
            z = z.T.contiguous()[None]
        codebooks = codebooks.to(self.dtype)
        return z.to(device, self.dtype), (codebooks if self.groups > 1 else codebooks[0]).to(device)

    def run(self, device, precision: str = "exact") -> tuple[torch.Tensor, ...]:
        """(indices, z_q, errors)"""
        return residual_quantize(
            *self.arguments(device), dim=1 if self.channel_first else -1, metric=self.metric, precision=precision,
            nonfinite="index", return_errors=True,
        )  # fmt: skip


def cases(quick: bool = False) -> list[ResidualCase | MultiscaleCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    half = torch.bfloat16
    found = [
        ResidualCase(37, 4, 100, 24),
        ResidualCase(37, 4, 100, 24, half),
        ResidualCase(37, 3, 100, 24, torch.float16, "dot"),
        ResidualCase(200, 3, 300, 8, metric="cosine"),
        ResidualCase(33, 2, 64, 20, groups=3),
        ResidualCase(33, 3, 64, 20, half, groups=2, channel_first=True),
        ResidualCase(50, 8, 500, 64, channel_first=True),
        ResidualCase(30, 3, 70, 12, nonfinite=True),
        ResidualCase(1, 1, 1, 1),
        ResidualCase(0, 2, 5, 3),
        *multiscale_quantize.cases(),
    ]
    return found[::3] if quick else found


def check(case: ResidualCase | MultiscaleCase, device) -> tuple[float, float]:
    """0 where indices and sums are the reference's and the errors agree to float32, otherwise infinity."""
    if isinstance(case, MultiscaleCase):
        return case.check(device)
    index, z_q, errors = case.run(device)
    with backend("reference"):
        expected, total, exact = case.run(device)
    same = torch.equal(index, expected) and torch.equal(z_q.isnan(), total.isnan())
    same = same and torch.equal(z_q.nan_to_num(), total.nan_to_num())
    close = torch.allclose(errors, exact, rtol=2e-7, atol=0, equal_nan=True)
    return 0.0 if same and close else float("inf"), 0.0
