"""Cases of ``nearest_code``: every metric, layout and dtype on codes of every odd kind; indices must be equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genfast.backends import backend
from genfast.ops.vector_quantize import nearest_code

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class CodeCase:
    """One call of ``nearest_code``: ``rows`` vectors of ``size`` numbers in each of ``groups``, ``codes`` codes."""

    rows: int
    codes: int
    size: int
    kind: str = "normal"
    """Or ``"duplicates"``, ``"zero"``, ``"offset"`` (all numbers near 10^4), ``"equal"`` (vectors that are codes),
    ``"nonfinite"`` (some vectors and codes)."""
    metric: str = "l2"
    dtype: torch.dtype = F32
    codes_dtype: torch.dtype | None = None
    groups: int = 1
    k: int | None = None
    channel_first: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        extra = [f"G={self.groups}"] * (self.groups > 1) + [f"k={self.k}"] * (self.k is not None)
        extra += ["channel first"] * self.channel_first + ["other dtype"] * (self.codes_dtype is not None)
        return " ".join(["codes", f"{self.rows}x{self.codes}x{self.size}", dtype, self.metric, self.kind, *extra])

    def arguments(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, codebook)"""
        generator = torch.Generator().manual_seed(self.rows + self.codes + self.size)
        codebook = torch.randn(self.groups, self.codes, self.size, generator=generator)
        z = torch.randn(self.rows, self.groups, self.size, generator=generator)
        if self.kind == "duplicates":
            codebook = codebook[:, torch.randint(0, max(self.codes // 3, 1), (self.codes,), generator=generator)]
        elif self.kind == "zero":
            codebook = codebook * 0
        elif self.kind == "offset":
            codebook, z = codebook + 1e4, z + 1e4
        codebook = codebook.to(self.codes_dtype or self.dtype)
        if self.kind == "equal":
            chosen = torch.randint(0, self.codes, (self.rows,), generator=generator)
            z = codebook[:, chosen].transpose(0, 1).float()
        if self.kind == "nonfinite":
            z[:: max(self.rows // 3, 1), 0, self.size // 2] = torch.nan
            z[1::7, 0, 0] = torch.inf
            codebook[:, ::5, 0] = torch.nan
            codebook[:, 1::5, -1] = -torch.inf
        z = z.to(self.dtype).flatten(1)
        if self.channel_first:
            z = z.T.contiguous().view(1, z.shape[1], -1)
        return z.to(device), (codebook if self.groups > 1 else codebook[0]).to(device)

    def run(self, device, precision: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
        """(indices, distances)"""
        return nearest_code(
            *self.arguments(device), metric=self.metric, dim=1 if self.channel_first else -1, k=self.k,
            precision=precision, nonfinite="index", return_distances=True,
        )  # fmt: skip


KINDS = ("normal", "duplicates", "zero", "offset", "equal", "nonfinite")


def cases(quick: bool = False) -> list[CodeCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = [CodeCase(37, 300, size, kind) for size in (1, 8, 64) for kind in KINDS]
    found += [CodeCase(37, 300, 33, kind, metric) for kind in KINDS for metric in ("cosine", "dot")]
    found += [CodeCase(37, 300, 33, kind, dtype=dtype) for kind in KINDS for dtype in (BF16, F16)]
    found += [
        CodeCase(1, 1, 5),
        CodeCase(0, 7, 5),
        CodeCase(130, 1025, 256),
        CodeCase(70, 515, 96, metric="cosine", dtype=BF16, codes_dtype=F32),
        CodeCase(33, 130, 16, groups=3),
        CodeCase(33, 130, 16, groups=3, k=4, channel_first=True),
        CodeCase(65, 600, 24, "duplicates", k=16),
        CodeCase(65, 600, 24, "nonfinite", k=5, metric="dot"),
        CodeCase(65, 9, 24, "nonfinite", k=9),
        CodeCase(100, 700, 8, channel_first=True),
    ]
    return found[::3] if quick else found


def check(case: CodeCase, device) -> tuple[float, float]:
    """0 where the indices are the reference's and the distances agree to float32, otherwise infinity."""
    index, distance = case.run(device)
    with backend("reference"):
        expected, exact = case.run(device)
    close = torch.allclose(distance.double(), exact.double(), rtol=2e-7, atol=1e-30, equal_nan=True)
    return 0.0 if torch.equal(index, expected) and close else float("inf"), 0.0
