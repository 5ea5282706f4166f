"""Cases of ``token_sampling``: every option, alone and combined, on rows of every odd kind."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from genfast.backends import backend
from genfast.ops.token_sampling import TokenSample, sample_tokens

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ALL = ("logsumexp", "entropy", "margin")
ROUNDINGS = 4e-6
"""Of a float32 softmax: the exponent of an entry 20 nats below the largest is itself rounded to 2e-6."""


@dataclass(frozen=True)
class TokenCase:
    """One call of ``sample_tokens``. ``tensors`` are made to fit: ``uncond``, ``noise``, ``rows``, ``row_ids``,
    ``seeds``, ``temperatures``."""

    shape: tuple[int, ...]
    options: dict = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    dtype: torch.dtype = F32
    odd: bool = False
    """Whether some rows are of -inf alone, of one finite entry, with NaN, with +inf, with ties."""
    strided: bool = False
    spread: float = 3.0

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        options = [k if v is True else f"{k}={v}" for k, v in self.options.items() if k != "statistics"]
        extra = ["odd rows"] * self.odd + ["strided"] * self.strided
        return " ".join(["x".join(map(str, self.shape)), dtype, *options, *self.tensors, *extra])

    def arguments(self, device="cpu") -> tuple[torch.Tensor, dict]:
        generator = torch.Generator().manual_seed(len(self.name))
        size = self.shape[-1]

        def normal():
            return torch.randn(self.shape, generator=generator) * self.spread

        logits = normal()
        if self.odd:
            flat = logits.view(-1, size)
            flat[0] = -torch.inf
            flat[1, : size - 1] = -torch.inf
            flat[2, size // 2] = torch.nan
            flat[3, size // 3] = torch.inf
            flat[4] = flat[4].round()
            flat[5, size // 2 :] = -torch.inf
        logits = logits.to(device, self.dtype)
        if self.strided:
            wide = torch.full((*self.shape[:-1], size + 3), torch.nan, device=device, dtype=self.dtype)
            wide[..., :size] = logits
            logits = wide[..., :size]
        count = logits.numel() // size
        made = dict(
            uncond=lambda: normal().to(device, self.dtype),
            noise=lambda: torch.rand(self.shape, generator=generator, dtype=torch.float64).to(device),
            rows=lambda: torch.arange(count - 1, -1, -2, device=device),
            row_ids=lambda: torch.arange(count, device=device) * 2**32 + 2**32 - 5,
            seeds=lambda: torch.arange(self.shape[0], device=device) - 2,
            temperatures=lambda: torch.tensor([0.0, 1.0, 0.3, 5.0], device=device).repeat(count)[:count],
        )
        options = {"temperature": 1.0, **self.options}
        names = dict(seeds="seed", temperatures="temperature")
        options.update((names.get(k, k), made[k]()) for k in self.tensors)
        if options["temperature"] is not None and not {"seed", "noise"} & options.keys():
            options["seed"] = 7
        return logits, options


_ODD = (2, 4, 777)
_OPTIONS = (
    dict(temperature=0.0, statistics=ALL),
    dict(temperature=0.0, confidence=None),
    dict(),
    dict(temperature=0.3, statistics=ALL),
    dict(temperature=30.0, confidence="tempered"),
    dict(temperature=1e-12),
    dict(top_p=0.9, confidence="tempered"),
    dict(top_p=0.9, top_p_crossing=False, confidence="margin"),
    dict(top_p=1e-9, confidence="entropy"),
    dict(top_k=1),
    dict(top_k=7, confidence="entropy", temperature=2.0),
    dict(top_k=4, top_p=0.8, confidence="margin", temperature=1.5),
    dict(temperature=0.0, top_p=0.9, confidence="tempered"),
    dict(temperature=0.0, confidence="margin"),
    dict(suppress=[5, 0, 776], suppress_confidence=[3, 4, 700]),
    dict(suppress_confidence=[1, 2], confidence="tempered", temperature=0.7),
    dict(mask_id=700, shift=True),
    dict(confidence="random"),
    dict(stream=-1, offset=2**32 - 1),
)


def cases(quick: bool = False) -> list[TokenCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = [TokenCase(_ODD, options) for options in _OPTIONS]
    found += [TokenCase(_ODD, options, odd=True) for options in _OPTIONS]
    found += [TokenCase(_ODD, dict(guidance=2.5, top_k=20), ("uncond",), dtype, odd=True) for dtype in (F32, BF16, F16)]
    found += [TokenCase(_ODD, dict(statistics=ALL), (), dtype) for dtype in (BF16, F16)]
    found += [TokenCase(_ODD, dict(top_p=0.7, confidence="tempered"), (), dtype, odd=True) for dtype in (BF16, F16)]
    found += [
        TokenCase(_ODD, {}, ("temperatures", "seeds")),
        TokenCase(_ODD, {}, ("row_ids",)),
        TokenCase(_ODD, dict(shift=True, guidance=0.5), ("rows", "uncond")),
        TokenCase(_ODD, dict(temperature=0.8, top_p=0.9), ("noise",), odd=True),
        TokenCase(_ODD, {}, ("noise", "temperatures")),
        TokenCase((2, 3, 4, 33), dict(statistics=ALL)),
        TokenCase((6, 100)),
        TokenCase((31,), dict(top_k=3)),
        TokenCase((2, 1), dict(statistics=ALL)),
        TokenCase((0, 4, 9)),
        TokenCase((2, 3, 9000), dict(statistics=ALL)),
        TokenCase((1, 2, 9000), dict(top_p=0.99, confidence="tempered"), strided=True),
        TokenCase((2, 3, 4096), dict(suppress=[4095]), dtype=BF16),
        TokenCase(_ODD, dict(top_k=5), strided=True, odd=True, dtype=BF16),
    ]
    return found[::3] if quick else found


def check(case: TokenCase, device) -> tuple[float, float]:
    """Largest difference of a figure from float64, infinite if a token differs; and what is allowed."""
    logits, options = case.arguments(device)
    got = sample_tokens(logits, **options)
    expected = of_reference(logits, options)
    if not torch.equal(got.tokens.cpu(), expected.tokens.cpu()):
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
            difference = (a - b).abs()[good] / b.abs()[good].clamp_min(1)
            error = max(error, difference.max().item())
    return error, ROUNDINGS


def of_reference(logits, options) -> TokenSample:
    """The same call by the reference, which judges confidences in float64."""
    with backend("reference"):
        return sample_tokens(logits, **options)
