"""Cases of ``fsq_quantize``, ``lfq_quantize`` and ``bsq_quantize``: forms, layouts, dtypes, losses and gradients.

The oracle is the op in float64, which is the reference. Indices must be equal: a number's level does not depend on the
precision of the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genfast.backends import backend
from genfast.checks import compare
from genfast.ops.scalar_quantize import bsq_quantize, fsq_quantize, lfq_quantize

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NOTHING = 1e-20
"""An error that is always allowed: probabilities below e^-60 may be 0."""
EPSILON = torch.finfo(F32).eps
LAYOUTS = ("last", "first", "wide", "single")
"""Channels last, first (an image), last of a longer row of NaN, and of many batches of one row each."""


@dataclass(frozen=True)
class ScalarCase:
    """One call: ``rows`` rows of ``groups`` of ``size`` numbers, or for FSQ of as many as ``levels``."""

    op: str
    rows: int
    size: int = 0
    levels: tuple[int, ...] = ()
    groups: int | None = None
    dtype: torch.dtype = F32
    layout: str = "last"
    spread: float = 1.0
    """Of z."""
    options: dict = field(default_factory=dict)
    """``noise`` and ``mask`` being True stand for tensors."""
    losses: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        shape = f"{self.rows}x{'/'.join(map(str, self.levels)) or self.size}"
        extra = [f"G={self.groups}"] * (self.groups is not None) + [self.layout] * (self.layout != "last")
        extra += [f"spread={self.spread}"] * (self.spread != 1) + ["losses"] * self.losses
        return " ".join([self.op, shape, dtype, *extra, *(f"{k}={v}" for k, v in self.options.items())])

    def tensor(self, device, seed: int) -> Tensor:
        """Normal numbers of z's shape and layout."""
        width = (len(self.levels) or self.size) * (self.groups or 1)
        t = torch.randn(self.rows, width, generator=torch.Generator().manual_seed(seed + self.rows + width))
        t = (t * self.spread).to(device, self.dtype)
        if self.layout == "first":
            return t.T.reshape(1, width, self.rows, 1).expand(2, -1, -1, -1).contiguous()
        if self.layout == "wide":
            return torch.nn.functional.pad(t, (0, 5), value=torch.nan)[:, :width]
        return t[:, None] if self.layout == "single" else t

    def run(self, z: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(indices, [codes, losses ..., gradient of z])."""
        z = z.detach().requires_grad_()
        dim = 1 if self.layout == "first" else -1
        options = dict(self.options, dim=dim, groups=self.groups)
        generator = torch.Generator().manual_seed(7)
        if options.get("noise"):
            noise = torch.rand(z.shape, generator=generator) - 0.5
            options["noise"] = torch.where(torch.rand(z.shape, generator=generator) < 0.5, noise, 0.0).to(z.device)
        if options.get("mask"):
            shape = z.movedim(dim, -1).shape[:-1]
            options["mask"] = (torch.rand(shape, generator=generator) < 0.7).to(z.device)
        if self.op == "fsq":
            codes, indices = fsq_quantize(z, self.levels, **options)
            found = [codes]
        else:
            quantize = lfq_quantize if self.op == "lfq" else bsq_quantize
            codes, indices, *rest = quantize(z, return_losses=self.losses, **options)
            found = [codes, *(rest[0] if rest else ())]
        loss = (codes * weights.to(codes.dtype)).sum()
        for k, value in enumerate(found[1:5]):
            loss = loss + value * (0.7 + 0.4 * k) * self.rows
        if len(found) > 5:
            steps = torch.arange(found[5].numel(), device=z.device).view_as(found[5])
            loss = loss + (found[5] * (0.1 * steps).sin().to(found[5].dtype)).sum() * self.rows
        return indices, [*(t.detach() for t in found), torch.autograd.grad(loss, z)[0]]


LEVELS = ((8, 8, 8, 5, 5, 5), (3,), (4, 7, 100), (8, 6, 5), (7, 5, 5, 5, 5))


def cases(quick: bool = False) -> list[ScalarCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = [
        ScalarCase("fsq", 130, levels=levels, options=dict(symmetric=symmetric, clamp=clamp))
        for levels in LEVELS
        for symmetric in (False, True)
        for clamp in (False, True)
    ]
    found += [
        ScalarCase("fsq", 70, levels=(2, 2, 9), options=dict(symmetric=True, noise=True), dtype=d) for d in (F32, BF16)
    ]
    found += [
        ScalarCase("fsq", 70, levels=(8, 5, 6), groups=groups, layout=layout, dtype=dtype)
        for layout in LAYOUTS
        for groups, dtype in ((None, F32), (3, F32), (1, BF16), (2, F16))
    ]
    for op in ("lfq", "bsq"):
        found += [ScalarCase(op, 130, size) for size in (1, 18, 62)]
        found += [ScalarCase(op, 130, size, losses=True) for size in (1, 2, 3, 5, 8, 10)]
        for options in (
            dict(inv_temperature=1.0),
            dict(least_probability=1e-5),
            dict(least_probability=1e-3, inv_temperature=2.0),
            dict(entropy_bits=3, diversity_gamma=0.3),
            dict(entropy_bits=4, least_probability=1e-2, inv_temperature=0.7, scale=0.5),
            dict(mask=True, least_probability=1e-5, scale=1.5),
        ):
            found += [ScalarCase(op, 200, 12, options=options, losses=True)]
        found += [
            ScalarCase(op, 70, 6, groups=groups, layout=layout, dtype=dtype, losses=True, options=dict(mask=True))
            for layout in LAYOUTS
            for groups, dtype in ((None, F32), (3, F32), (1, BF16), (2, F16))
        ]
        found += [ScalarCase(op, 33, 10, spread=1e-3, losses=True), ScalarCase(op, 33, 10, spread=30.0, losses=True)]
    return found[::3] if quick else found


def check(case: ScalarCase, device) -> tuple[float, float]:
    """Error and what is allowed, of the result that comes nearest to its bound or exceeds it most."""
    z, weights = case.tensor(device, 0), case.tensor(device, 1)
    indices, got = case.run(z, weights)
    expected, oracle = case.run(z.double(), weights)
    with backend("reference"):
        _, plain = case.run(z, weights)
    if not torch.equal(indices, expected):
        return float("inf"), 0.0
    found = [compare(*three) for three in zip(got, oracle, plain, strict=True)]
    # Three roundings for means: they do not average out what an exponential's roundings have in common.
    extra = [0.0 if o.dim() else 2 * EPSILON * abs(o.item()) for o in oracle]
    found = [(error, allowed + more) for (error, allowed), more in zip(found, extra, strict=True)]
    error, allowed = max(found, key=lambda pair: pair[0] / (pair[1] + NOTHING), default=(0.0, 0.0))
    return error, allowed + NOTHING
