"""Calls of ``select_transfer`` and ``commit_`` that every backend must answer as the reference does."""

import torch

import genfast

N = torch.tensor([0, 3, 100, 2])
SELECT = (
    dict(),
    dict(n=N),
    dict(n=0, strategy="threshold", threshold=0.5),
    dict(strategy="threshold", threshold=0.5, strict=True, start=2, end=30),
    dict(strategy="factor", factor=0.8),
    dict(n=N, strategy="factor", factor=0.8, accept_last=True),
    dict(n=0, strategy="entropy_bound", bound=1.5),
    dict(n=0, strategy="entropy_bound", bound=1.5, inclusive=True),
    dict(n=N, strategy="hierarchy", threshold=0.9, low_threshold=0.3, start=torch.tensor([0, 1, 2, 3])),
    dict(n=N, strategy="sequential"),
    dict(n=N, strategy="random", seed=3),
    dict(n=N, temperature=0.5, seed=torch.tensor([1, 2, 3, 4]), stream=7),
    dict(n=2, temperature=0.5, seed=-5, end=torch.tensor([0, 4, 300, 99])),
)
LENGTHS = (1, 5, 37, 300)


def differing(device: str, place) -> list:
    """The calls whose result on a backend, ordered by the context manager ``place``, is not the reference's."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        for kind in ("plain", "ties", "odd"):
            confidence = torch.rand(4, length, generator=draw)
            if kind == "ties":
                confidence = (confidence * 8).round() / 8
            elif kind == "odd" and length > 5:
                confidence[0, 2], confidence[1], confidence[2, 3] = torch.nan, -torch.inf, torch.inf
            mask = torch.rand(4, length, generator=draw) < 0.7
            mask[3] = False
            for options in SELECT:
                given = -confidence.nan_to_num(0, 1, 0) if "bound" in options else confidence
                options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
                call = (given.to(device), mask.to(device))
                with genfast.backend("reference"):
                    expected = genfast.select_transfer(*call, **options)
                with place():
                    got = genfast.select_transfer(*call, **options)
                if not torch.equal(got, expected):
                    found.append((length, kind, options))
            x = torch.where(mask, 99, torch.randint(0, 5, mask.shape, generator=draw))
            tokens = torch.randint(0, 6, mask.shape, generator=draw).to(device)
            selected = (mask & (torch.rand(mask.shape, generator=draw) < 0.6)).to(device)
            for eos_id in (None, 3):
                first, second = x.to(device, copy=True), x.to(device, copy=True)
                with genfast.backend("reference"):
                    expected = genfast.commit_(first, tokens, selected, mask_id=99, eos_id=eos_id)
                with place():
                    got = genfast.commit_(second, tokens, selected, mask_id=99, eos_id=eos_id)
                if not (torch.equal(first, second) and all(map(torch.equal, got, expected))):
                    found.append((length, "commit", eos_id))
    return found
