"""The calls whose kernels ship: every kind of sampler step in every combination of dtypes.

One list serves the ahead-of-time compilation (``benchmarks/compile_report.py``), its tests, and a warm-up on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from genfast.step_table import StepTable

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32+bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64),
}
"""(dtype of the state and of the outputs, dtype of the model's outputs)."""

_X0 = dict(x0=0.5, to_x0=[1.0, -0.5])


@dataclass(frozen=True)
class Case:
    """One kind of step: what its table holds, which optional tensors it has, and its options."""

    name: str
    inputs: int
    table: dict = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    per_sample: bool = False
    """Whether step, seed and guidance come from the device, one per sample."""


CASES = (
    Case("ddim", 2),
    Case("ddim_clip", 2, _X0, options=dict(clip=(-1.0, 1.0))),
    Case("ddim_threshold", 2, _X0, options=dict(threshold=(0.995, 1.5))),
    Case("ddpm_philox", 2, dict(noise=0.1), options=dict(seed=0)),
    Case("ddpm_clip_noise", 2, {**_X0, "noise": 0.1}, ("noise",), dict(clip=(-1.0, 1.0))),
    Case(
        "ddpm_learned_philox",
        2,
        {**_X0, "noise": 0.1, "log_std": [-1.0, 0.5]},
        ("log_variance",),
        dict(clip=(-1.0, 1.0), seed=0),
    ),
    Case("multistep", 3, dict(second=0.1)),
    Case("multistep_x0", 3, {**_X0, "second_x0": 1.0}),
    Case("multistep_sde", 4, {**_X0, "second_x0": 1.0, "noise": 0.1}, options=dict(seed=0)),
    Case("unipc", 5, dict(second=0.1)),
    Case("eight", 8, dict(second=0.1, noise=0.1), ("noise",)),
    Case("guided", 2, tensors=("uncond",), options=dict(guidance=5.0)),
    Case("guided_rescale", 2, tensors=("uncond",), options=dict(guidance=5.0, guidance_rescale=0.7)),
    Case(
        "guided_rescale_threshold_philox",
        3,
        {**_X0, "second_x0": 1.0, "noise": 0.1},
        ("uncond",),
        dict(guidance=5.0, guidance_rescale=0.7, threshold=(0.995, 1.5), seed=0),
    ),
    Case("on_device", 3, {**_X0, "second_x0": 1.0, "noise": 0.1}, ("uncond",), dict(clip=(-1.0, 1.0)), per_sample=True),
    Case("randn", 0, dict(noise=1.0), options=dict(seed=0)),
)


def arguments(case: Case, dtypes: str, shape=(2, 4, 64, 64), device="meta") -> tuple[tuple, dict]:
    """Positional and keyword arguments of a backend's ``sampler_step`` for a case, with uninitialised tensors."""
    state, model = DTYPES[dtypes]
    batch = shape[0]

    def tensor(dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    coefficients = [[0.5] * case.inputs] * 2
    parts = {k: [[v] * case.inputs] if k == "second" else v for k, v in case.table.items()}
    table = StepTable(coefficients, **parts).to(device)
    options = dict(
        step=1, uncond=None, guidance=1.0, guidance_rescale=0.0, clip=None, threshold=None, log_variance=None,
        noise=None, seed=None, stream=0, offset=0,
    )  # fmt: skip
    options.update(case.options)
    options.update((name, tensor(state if name == "noise" else model)) for name in case.tensors)
    if case.per_sample:
        options.update(
            step=torch.zeros(batch, dtype=torch.int64, device=device),
            seed=torch.zeros(batch, dtype=torch.int64, device=device),
            guidance=torch.zeros(batch, dtype=torch.float64, device=device),
        )
    options.update(out=tensor(state), second_out=tensor(state) if table.has_second else None)
    return ([tensor(state if i != 1 else model) for i in range(case.inputs)], table), options
