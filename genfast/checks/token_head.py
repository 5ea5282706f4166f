"""Cases of ``lm_head_sample``: hidden states and weights whose logits every backend computes exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from genfast.backends import backend
from genfast.ops.token_head import lm_head_partials, lm_head_sample, merge_head_partials
from genfast.ops.token_sampling import TokenSample

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDINGS = 4e-6
"""Of a float32 softmax, as in ``checks/token_sampling.py``."""


@dataclass(frozen=True)
class HeadCase:
    """One call of ``lm_head_sample``. ``tensors`` are made to fit: ``bias``, ``rows``, ``row_ids``, ``seeds``,
    ``temperatures``."""

    shape: tuple[int, ...]
    """Of hidden."""
    size: int
    options: dict = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    dtype: torch.dtype = F32
    odd: bool = False
    """Whether some rows lead to nothing but -inf, to NaN, to +inf."""
    strided: bool = False
    cuts: tuple[int, ...] = ()
    """Where the vocabulary is cut into ranks."""

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        options = [f"{k}={v}" for k, v in self.options.items() if k != "statistics"]
        extra = ["odd rows"] * self.odd + ["strided"] * self.strided + [f"cut at {c}" for c in self.cuts]
        return " ".join(["x".join(map(str, self.shape)), f"V={self.size}", dtype, *options, *self.tensors, *extra])

    def arguments(self, device="cpu") -> tuple[torch.Tensor, torch.Tensor, dict]:
        generator = torch.Generator().manual_seed(len(self.name))
        depth = self.shape[-1]

        def whole(*shape, most=2):
            return torch.randint(-most, most + 1, shape, generator=generator).float()

        hidden, weight = whole(*self.shape) / 8, whole(self.size, depth)
        if self.odd:
            flat = hidden.view(-1, depth)
            weight[:, 0] = 1
            weight[self.size // 3, 1] = torch.inf
            flat[:, 1] = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, 0.0]).repeat(len(flat))[: len(flat)]
            flat[0, 0], flat[1, 0], flat[2, 0] = -torch.inf, torch.nan, torch.inf
        hidden, weight = hidden.to(device, self.dtype), weight.to(device, self.dtype)
        if self.strided:
            # What lies between the rows must not be read.
            wide = torch.full((self.size, depth + 3), torch.nan, device=device, dtype=self.dtype)
            wide[:, :depth] = weight
            weight = wide[:, :depth]
            hidden = torch.stack([hidden, torch.full_like(hidden, torch.nan)], dim=-2)[..., 0, :]
        count = hidden.numel() // depth
        made = dict(
            bias=lambda: (whole(self.size, most=8) / 8).to(device, self.dtype),
            rows=lambda: torch.arange(count - 1, -1, -2, device=device),
            row_ids=lambda: torch.arange(count, device=device) * 2**32 + 2**32 - 5,
            seeds=lambda: torch.arange(self.shape[0], device=device) - 2,
            temperatures=lambda: torch.tensor([0.0, 1.0, 0.3, 5.0], device=device).repeat(count)[:count],
        )
        options = {"temperature": 1.0, **self.options}
        names = dict(seeds="seed", temperatures="temperature")
        options.update((names.get(k, k), made[k]()) for k in self.tensors)
        options.setdefault("seed", 7)
        return hidden, weight, options


_SMALL = (2, 4, 24)
_OPTIONS = (
    dict(temperature=0.0, statistics=("logsumexp",)),
    dict(temperature=0.0, confidence=None),
    dict(),
    dict(temperature=0.3, statistics=("logsumexp",)),
    dict(temperature=30.0, confidence="tempered"),
    dict(temperature=1e-12),
    dict(temperature=0.0, confidence="tempered", suppress_confidence=[1, 2]),
    dict(suppress=[5, 0, 776], suppress_confidence=[3, 4, 700], statistics=("logsumexp",)),
    dict(suppress_confidence=list(range(512)), confidence="tempered", temperature=0.7),
    dict(mask_id=700, stream=-1, offset=2**32 - 1),
    dict(softcap=2.0),
)


def cases(quick: bool = False) -> list[HeadCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = [HeadCase(_SMALL, 777, options) for options in _OPTIONS]
    found += [HeadCase(_SMALL, 777, options, odd=True) for options in _OPTIONS]
    found += [HeadCase(_SMALL, 777, {}, ("bias",), dtype, odd=True) for dtype in (BF16, F16)]
    found += [
        HeadCase(_SMALL, 777, {}, ("temperatures", "seeds")),
        HeadCase(_SMALL, 777, dict(confidence="tempered"), ("temperatures", "row_ids", "bias")),
        HeadCase(_SMALL, 777, dict(suppress=list(range(512)), softcap=3.0), ("rows", "bias")),
        HeadCase((7,), 33),
        HeadCase((3, 1), 1),
        HeadCase((0, 4, 9), 20),
        HeadCase((5, 33), 1025, dict(temperature=2.0), dtype=BF16, strided=True),
        HeadCase((5, 33), 1025, dict(temperature=2.0), ("bias",), dtype=F16, strided=True),
        HeadCase((5, 33), 1025, dict(temperature=2.0), strided=True),
        HeadCase((19, 70), 600, dict(temperature=0.5, statistics=("logsumexp",)), dtype=BF16),
        HeadCase((67, 300), 520, dtype=BF16),
        HeadCase((35, 600), 512, dtype=F32),
        HeadCase((130, 2, 34), 100, dict(temperature=0.0), dtype=BF16),
        HeadCase((2, 3, 16), 1600, dict(mask_id=3), ("bias",), cuts=(512, 1536)),
        HeadCase((2, 3, 16), 1600, dict(temperature=0.0, suppress_confidence=[1, 1599]), cuts=(700, 1000), dtype=BF16),
    ]
    return found[::3] if quick else found


def sample(case: HeadCase, device) -> TokenSample:
    """The case's call: whole, or cut into ranks."""
    hidden, weight, options = case.arguments(device)
    if not case.cuts:
        return lm_head_sample(hidden, weight, **options)
    bias = options.pop("bias", None)
    ends = (0, *case.cuts, case.size)
    return merge_head_partials(
        [
            lm_head_partials(
                hidden, weight[a:b], first=a, bias=None if bias is None else bias[a:b], **options
            )
            for a, b in pairwise(ends)
        ]
    )  # fmt: skip


def check(case: HeadCase, device) -> tuple[float, float]:
    """Largest difference of a figure from the reference's, infinite if a token differs; and what is allowed."""
    got = sample(case, device)
    with backend("reference"):
        expected = sample(case, device)
    if not torch.equal(got.tokens, expected.tokens):
        return float("inf"), 0.0
    error = 0.0
    for a, b in zip(got[1:], expected[1:]):
        if (a is None) != (b is None):
            return float("inf"), 0.0
        if a is None or not a.numel():
            continue
        if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
            return float("inf"), 0.0
        good = a.isfinite()
        if good.any():
            error = max(error, ((a - b).abs()[good] / b.abs()[good].clamp_min(1)).max().item())
    return error, ROUNDINGS
