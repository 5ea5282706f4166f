"""Cases of ``quantize`` with its gradients, and of ``ema_update_``: layouts, dtypes, absent codes, dead codes.

The codes are given, so that a case is about what follows the lookup; ``checks/vector_quantize.py`` is about that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genfast import checks
from genfast.backends import backend
from genfast.ops.code_update import code_sums, ema_update_, quantize

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class UpdateCase:
    """``rows`` vectors of ``size`` numbers in each of ``groups``, ``codes`` codes."""

    rows: int
    codes: int
    size: int
    groups: int = 1
    dtype: torch.dtype = F32
    layout: str = "last"
    """Or ``"first"`` (channels), ``"strided"`` (no neighbours at all)."""
    skewed: bool = False
    """Whether one code has nearly all vectors."""
    masked: bool = False
    """Whether some vectors have no code."""

    def vectors(self, device) -> tuple[Tensor, Tensor, int]:
        """(z, indices, dim)"""
        generator = torch.Generator().manual_seed(self.rows + self.codes + self.size)
        z = torch.randn(self.rows, self.groups * self.size, generator=generator).to(self.dtype)
        indices = torch.randint(0, self.codes, (self.rows, self.groups), generator=generator)
        if self.skewed:
            indices[torch.rand(self.rows, generator=generator) < 0.9] = self.codes // 2
        if self.masked:
            indices[torch.rand(indices.shape, generator=generator) < 0.3] = -1
        z, indices = z.to(device), indices.to(device)
        if self.groups == 1:
            indices = indices[:, 0]
        if self.layout == "first":
            return z.T.contiguous()[None], indices[None], 1
        if self.layout == "strided":
            wide = z.new_full((self.rows, 2, z.shape[1], 3), torch.nan)
            wide[:, 0, :, 1] = z
            return wide[:, 0, :, 1], indices, -1
        return z, indices, -1

    def state(self, device) -> list[Tensor]:
        """[codebook, cluster_size, embed_avg]"""
        generator = torch.Generator().manual_seed(self.codes)
        shape = (self.groups, self.codes, self.size) if self.groups > 1 else (self.codes, self.size)
        made = torch.randn(shape, generator=generator), 4 * torch.rand(shape[:-1], generator=generator)
        return [t.to(device) for t in (*made, torch.randn(shape, generator=generator))]

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        extra = [f"G={self.groups}"] * (self.groups > 1) + [self.layout] * (self.layout != "last")
        extra += ["skewed"] * self.skewed + ["without codes"] * self.masked
        return " ".join([self.op, f"{self.rows}x{self.codes}x{self.size}", dtype, *self.options_named(), *extra])


@dataclass(frozen=True)
class QuantizeCase(UpdateCase):
    gradient: str = "straight_through"
    zeros: bool = False
    codes_dtype: torch.dtype = F32
    op = "quantize"

    def options_named(self):
        return [self.gradient, *(["zeros"] * self.zeros), *(["other dtype"] * (self.codes_dtype != self.dtype))]

    def run(self, device, wide: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """What must be equal, and what must be near."""
        z, indices, dim = self.vectors(device)
        codebook = self.state(device)[0].to(self.codes_dtype)
        if wide:
            z, codebook = z.double(), codebook.to(self.dtype).double()
        z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
        found = quantize(
            z, codebook, dim=dim, indices=indices, gradient=self.gradient, commitment_weight=0.5, codebook_weight=2.0,
            without_code="zeros" if self.zeros else "input",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(z.shape, generator=generator).to(device, self.dtype).to(z.dtype)
        ((found.z_q * weights).sum() + 3 * z.numel() * found.loss).backward()
        return [found.usage, found.z_q.detach().to(self.dtype)], [
            found.loss.detach(), found.commitment_loss.detach(), found.codebook_loss.detach(), found.perplexity,
            z.grad, codebook.grad,
        ]  # fmt: skip


@dataclass(frozen=True)
class AverageCase(UpdateCase):
    metric: str = "l2"
    threshold: float = 0.0
    decay: float = 0.8
    ranks: bool = False
    """Whether the sums are made as for several ranks."""
    op = "ema"

    def options_named(self):
        dead = [f"dead<{self.threshold:g}"] * (self.threshold > 0)
        return [self.metric, f"decay={self.decay:g}", *dead, *(["by ranks"] * self.ranks)]

    def run(self, device, wide: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        z, indices, dim = self.vectors(device)
        state = self.state(device)
        if wide:
            z, state = z.double(), [t.double() for t in state]
        ema_update_(
            *state, z, indices, dim=dim, metric=self.metric, decay=self.decay, threshold=self.threshold, seed=5,
            stream=3, offset=2,
        )  # fmt: skip
        if not self.ranks:
            return [], state
        rows = z.view(1, self.rows, self.groups, self.size)
        found = indices.view(1, self.rows, self.groups)
        draw = (None, 5, 3, 2)
        return [], [*state, *code_sums(rows, found, self.codes, self.metric == "cosine", True, draw, None)]


def cases(quick: bool = False) -> list[UpdateCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found: list[UpdateCase] = []
    for gradient in ("straight_through", "rotation", "none"):
        for zeros in (False, True):
            found += [
                QuantizeCase(70, 30, 19, gradient=gradient, zeros=zeros, masked=True),
                QuantizeCase(70, 30, 48, 2, gradient=gradient, zeros=zeros, masked=True, layout="first"),
            ]
        found += [
            QuantizeCase(50, 20, 24, dtype=BF16, gradient=gradient, layout="first"),
            QuantizeCase(50, 20, 24, dtype=F16, codes_dtype=F16, gradient=gradient, skewed=True),
            QuantizeCase(33, 9, 7, 3, gradient=gradient, layout="strided"),
        ]
    found += [
        QuantizeCase(1, 1, 1),
        QuantizeCase(0, 5, 4),
        QuantizeCase(300, 1, 5, skewed=True),
        QuantizeCase(40, 11, 600, gradient="rotation"),
        QuantizeCase(40, 11, 33, dtype=BF16, codes_dtype=BF16, masked=True),
        QuantizeCase(40, 11, 16, codes_dtype=F16, masked=True, layout="first"),
    ]
    for metric in ("l2", "cosine"):
        for threshold in (0.0, 2.0):
            found += [
                AverageCase(90, 40, 21, metric=metric, threshold=threshold, masked=True),
                AverageCase(70, 30, 16, 3, metric=metric, threshold=threshold, layout="first", dtype=BF16),
                AverageCase(9, 40, 8, metric=metric, threshold=threshold, decay=0.3),
                AverageCase(400, 20, 8, metric=metric, threshold=threshold, skewed=True, masked=True),
            ]
    found += [
        AverageCase(90, 40, 21, threshold=1.5, masked=True, ranks=True),
        AverageCase(90, 40, 21, 2, metric="cosine", threshold=1.5, dtype=F16, ranks=True),
        AverageCase(40, 11, 600, decay=0.99),
        AverageCase(33, 9, 7, 3, layout="strided"),
        AverageCase(0, 5, 4, threshold=9.0),
    ]
    return found[::3] if quick else found


def check(case: UpdateCase, device) -> tuple[float, float]:
    """The error that exceeds what is allowed the most, and that; infinity where whole numbers or codes differ."""
    same, near = case.run(device)
    with backend("reference"):
        plain_same, plain = case.run(device)
        _, oracle = case.run(device, wide=True)
    if not all(map(torch.equal, same, plain_same)):
        return float("inf"), 0.0
    pairs = [checks.compare(*t) for t in zip(near, oracle, plain) if t[0].numel()]
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-300), default=(0.0, 0.0))
