"""Cases of ``sampler_step``: every feature of the op, alone and combined, in every dtype and layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genfast.checks import compare
from genfast.ops.sampler_step import randn, sampler_step
from genfast.random import reference_normal
from genfast.reference.sampler_step import sampler_step as reference
from genfast.step_table import StepTable

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FEATURES = (
    "x0",  # x0 made from the first two inputs and weighed into the result
    "clip",
    "threshold",
    "cfg",
    "rescale",
    "noise",  # a tensor
    "philox",  # a seed
    "seeds",  # one seed per sample, as a tensor
    "log_variance",
    "second",
    "step",  # a row chosen by an int
    "steps",  # a row per sample, chosen by a tensor
    "rows",  # a table with one row per sample and no step
)
LAYOUTS = ("contiguous", "chunk", "channels_last", "transposed", "mixed")


@dataclass(frozen=True)
class StepCase:
    """One call of the op: what it uses, on what shape, dtypes (cycled over the inputs) and memory layout."""

    shape: tuple[int, ...]
    inputs: int = 2
    features: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (F32,)
    layout: str = "contiguous"
    seed: int = 0

    @property
    def name(self) -> str:
        dtypes = "+".join(str(d).removeprefix("torch.") for d in self.dtypes)
        dtypes = dtypes.replace("float", "f").replace("bf", "bf")
        parts = ["x".join(map(str, self.shape)) or "0-d", f"n={self.inputs}", dtypes, *self.features]
        return " ".join(parts + ([] if self.layout == "contiguous" else [self.layout]))


@dataclass(frozen=True)
class DrawCase:
    """Noise drawn in the kernel, which must be the specification's to the bit."""

    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} randn, exact"


def cases(quick: bool = False) -> list[StepCase | DrawCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third, and the draws."""
    odd, image = (3, 5, 7, 11), (2, 4, 16, 16)
    found = [StepCase(odd, inputs=n) for n in range(1, 9)]
    found += [
        StepCase(odd, features=(f,)) for f in ("x0", "noise", "philox", "seeds", "second", "step", "steps", "rows")
    ]
    combined = (
        ("x0", "clip"),
        ("x0", "threshold"),
        ("cfg",),
        ("cfg", "rescale"),
        ("philox", "log_variance"),
        ("noise", "log_variance", "second"),
        ("x0", "clip", "philox", "second", "step"),
        ("x0", "threshold", "cfg", "rescale", "noise", "second", "steps"),
        ("x0", "clip", "cfg", "rescale", "seeds", "log_variance", "second", "rows"),
    )
    for features in combined:
        for dtypes in ((F32,), (BF16,), (F16,), (F64,), (F32, BF16)):
            found.append(StepCase(image, 3, features, dtypes))
    for layout in LAYOUTS[1:]:
        for features in (("x0",), ("x0", "clip", "philox", "second"), ("x0", "threshold", "cfg", "rescale", "noise")):
            found.append(StepCase((2, 6, 9, 10), 3, features, layout=layout))
            found.append(StepCase((2, 6, 9, 10), 3, features, (F32, BF16), layout=layout))
    found += [StepCase(shape, features=("x0", "clip", "philox")) for shape in ((), (1,), (7,), (0, 4), (4, 0), (1, 64))]
    # Large enough for several tiles and threads.
    found += [StepCase((3, 40_009), 4, f) for f in (("second",), ("x0", "threshold", "philox"), ("cfg", "rescale"))]
    return [DrawCase((3, 1)), DrawCase((2, 1537)), *(found[::3] if quick else found)]


def build(case: StepCase, device: str = "cpu"):
    """Inputs, table and options of a case: random, the same for one seed on every machine."""
    g = torch.Generator().manual_seed(case.seed)
    has = case.features.__contains__
    batch = case.shape[0] if case.shape else 1
    rows = batch if has("rows") else (5 if has("step") or has("steps") else 1)
    n = max(case.inputs, 2) if has("x0") or has("cfg") else case.inputs

    def uniform(*shape, low=-1.0, high=1.0):
        return torch.rand(shape, generator=g, dtype=F64) * (high - low) + low

    def tensor(k: int) -> Tensor:
        return _laid_out(torch.randn(case.shape, generator=g), case, k).to(device)

    random_source = any(has(f) for f in ("noise", "philox", "seeds"))
    parts = dict(coefficients=uniform(rows, n))
    if has("x0"):
        parts.update(x0=uniform(rows), to_x0=torch.stack([uniform(rows, low=0.5, high=1.5), uniform(rows)], 1))
    if random_source:
        parts.update(noise=uniform(rows))
    if has("second"):
        parts.update(second=uniform(rows, n))
        parts.update({"second_x0": uniform(rows)} if has("x0") else {})
        parts.update({"second_noise": uniform(rows)} if random_source else {})
    if has("log_variance"):
        parts.update(log_std=torch.stack([uniform(rows), uniform(rows, low=-0.5, high=0.5)], 1))
    table = StepTable(**parts, device=device)

    options: dict = {}
    if has("step"):
        options["step"] = 3
    if has("steps"):
        options["step"] = torch.randint(0, rows, (batch,), generator=g).to(device)
    if has("cfg"):
        options.update(
            uncond=tensor(1), guidance=4.5 if case.seed % 2 == 0 else uniform(batch, low=1, high=8).to(device)
        )
    if has("rescale"):
        options["guidance_rescale"] = 0.7
    if has("clip"):
        options["clip"] = (-0.8, 1.1)
    if has("threshold"):
        options["threshold"] = (0.9, 1.7)
    if has("noise"):
        options["noise"] = tensor(2)
    if has("philox"):
        options.update(seed=0x1234_5678_9ABC_DEF0 + case.seed, stream=7, offset=3)
    if has("seeds"):
        options.update(seed=torch.randint(-(2**62), 2**62, (batch,), generator=g).to(device), stream=1)
    if has("log_variance"):
        options["log_variance"] = tensor(1)
    return [tensor(k) for k in range(n)], table, options


def check(case: StepCase | DrawCase, device: str = "cpu") -> tuple[float, float]:
    """The largest error of the backend in use, and the error allowed."""
    if isinstance(case, DrawCase):
        address = dict(seed=0x1234_5678_9ABC_DEF0, stream=7, offset=3)
        got, want = (
            randn(*case.shape, device=device, **address),
            reference_normal(*case.shape, device=device, **address),
        )
        return (0.0 if torch.equal(got, want) else math.inf), 0.0
    inputs, table, options = build(case, device)
    got = _as_tuple(sampler_step(inputs, table, **options))
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    oracle = _as_tuple(reference([t.double() for t in inputs], table, **wide))
    plain = _as_tuple(reference(inputs, table, **options))
    if got[0].numel() == 0:
        return 0.0, 0.0
    pairs = [compare(a, b, c) for a, b, c in zip(got, oracle, plain, strict=True)]
    return max(pairs, key=lambda p: p[0] - p[1] if math.isfinite(p[0]) else math.inf)


def _as_tuple(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _laid_out(t: Tensor, case: StepCase, k: int) -> Tensor:
    t = t.to(case.dtypes[k % len(case.dtypes)])
    layout = case.layout if case.layout != "mixed" else LAYOUTS[k % 4]
    if layout == "chunk" and t.dim() > 1:
        return torch.cat([t, t + 1], dim=1).chunk(2, dim=1)[0]
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return t
