"""Cases of ``select_transfer`` and ``commit_``: every strategy on rows of every odd kind; results must be equal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from genfast.backends import backend
from genfast.ops.token_transfer import commit_, select_transfer

MASK_ID = 99
N = (0, 3, 100, 2)
"""Per row; tuples in options stand for tensors."""


@dataclass(frozen=True)
class TransferCase:
    """One call of ``select_transfer`` on 4 rows, or, with ``commit``, one of ``commit_``."""

    length: int
    kind: str
    """``plain``, ``ties``, or ``odd``: with NaN and infinities."""
    options: dict = field(default_factory=dict)
    commit: bool = False

    @property
    def name(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{'commit_' if self.commit else 'select_transfer'} 4x{self.length} {self.kind} {options}".rstrip()

    def run(self, device) -> list[torch.Tensor]:
        """All that the call returns or writes."""
        draw = torch.Generator().manual_seed(self.length)
        confidence = torch.rand(4, self.length, generator=draw)
        if self.kind == "ties":
            confidence = (confidence * 8).round() / 8
        elif self.kind == "odd" and self.length > 5:
            confidence[0, 2], confidence[1], confidence[2, 3] = torch.nan, -torch.inf, torch.inf
        mask = torch.rand(4, self.length, generator=draw) < 0.7
        mask[3] = False
        if self.commit:
            x = torch.where(mask, MASK_ID, torch.randint(0, 5, mask.shape, generator=draw)).to(device)
            tokens = torch.randint(0, 6, mask.shape, generator=draw).to(device)
            selected = (mask & (torch.rand(mask.shape, generator=draw) < 0.6)).to(device)
            return [*commit_(x, tokens, selected, mask_id=MASK_ID, **self.options), x]
        if "bound" in self.options:
            confidence = -confidence.nan_to_num(0, 1, 0)
        options = {k: torch.tensor(v, device=device) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return [select_transfer(confidence.to(device), mask.to(device), **options)]


_SELECT = (
    dict(),
    dict(n=N),
    dict(n=0, strategy="threshold", threshold=0.5),
    dict(strategy="threshold", threshold=0.5, strict=True, start=2, end=30),
    dict(n=0, strategy="threshold", threshold=0.9, slack=0.1),
    dict(n=N, strategy="threshold", threshold=0.99, slack=0.0, strict=True, end=(300, 20, 5, 9)),
    dict(n=0, strategy="threshold", threshold=2.0, slack=1e-5, start=1),
    dict(strategy="factor", factor=0.8),
    dict(n=N, strategy="factor", factor=0.8, accept_last=True),
    dict(n=0, strategy="entropy_bound", bound=1.5),
    dict(n=0, strategy="entropy_bound", bound=1.5, inclusive=True),
    dict(n=N, strategy="hierarchy", threshold=0.9, low_threshold=0.3, start=(0, 1, 2, 3)),
    dict(n=N, strategy="sequential"),
    dict(n=N, strategy="random", seed=3),
    dict(n=N, temperature=0.5, seed=(1, 2, 3, 4), stream=7),
    dict(n=2, temperature=0.5, seed=-5, end=(0, 4, 300, 99)),
)


def cases(quick: bool = False) -> list[TransferCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = []
    for length in (1, 5, 37, 300):
        for kind in ("plain", "ties", "odd"):
            found += [TransferCase(length, kind, options) for options in _SELECT]
            found += [TransferCase(length, kind, options, commit=True) for options in ({}, dict(eos_id=3))]
    return found[::3] if quick else found


def check(case: TransferCase, device) -> tuple[float, float]:
    """0 where all is equal to what the reference does, otherwise infinity; and what is allowed."""
    got = case.run(device)
    with backend("reference"):
        expected = case.run(device)
    return 0.0 if all(map(torch.equal, got, expected)) else float("inf"), 0.0
