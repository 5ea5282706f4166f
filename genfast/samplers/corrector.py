"""The Langevin corrector of score SDEs: steps along the score whose size comes from norms measured on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genfast.ops.sampler_step import randn, sampler_step
from genfast.samplers.trajectory import Trajectory
from genfast.step_table import StepTable

CORRECTION_STREAM = 2**31
"""The Philox streams of corrections start here, those of steps at 0."""


@dataclass(frozen=True)
class Langevin:
    """``steps`` Langevin steps before every step of the sampler, at its level (Song et al. 2021, algorithms 4 and 5).

    x <- x + e score + sqrt(2 e) z with e = 2 a (snr |z| / |score|)^2. The norms are means over the batch of per-sample
    norms, so samples of one batch are coupled. a is 1 - beta on variance-preserving schedules, the squared ratio of
    alphas over the step, and 1 on variance-exploding ones. The step size stays on the device.
    """

    steps: int
    snr: float

    def gains(self, t: Trajectory) -> list[list[float]]:
        """2 a snr^2 of every correction, per step of a trajectory."""
        return [[2 * (t[i].alpha / t[i + 1].alpha * self.snr) ** 2] * self.steps for i in range(len(t))]

    def apply(self, run, call, table: StepTable, inputs: list[Tensor], options: dict) -> Tensor:
        """One correction; ``table`` makes the score from the state and the model's output."""
        x = inputs[0]
        score = sampler_step(inputs, table, step=call.row, dtype=run.history_dtype, **options)
        if "seed" in run.source:
            z = randn(
                *run.shape, stream=CORRECTION_STREAM + call.draw, dtype=score.dtype, device=run.device, **run.source
            )
        else:
            generator = run.source.get("generator")
            device = run.device if generator is None else generator.device
            z = torch.randn(run.shape, generator=generator, dtype=run.dtype, device=device).to(run.device)
        step = call.gain * (_norm(z) / _norm(score)) ** 2
        move = StepTable(torch.stack([torch.ones_like(step), step]), noise=(2 * step).sqrt())
        out = None if run.grad else run.target("x", run.dtype)
        return sampler_step([x, score], move, noise=z, dtype=run.dtype, out=out)


def checked(name: str | None, steps: int | None, snr: float | None, row) -> Langevin | None:
    """The corrector of a sampler, its arguments checked."""
    if name is None:
        return None
    if name != "langevin":
        raise ValueError(f"corrector must be 'langevin' or None; got {name!r}")
    if row.keeps or row.adaptive:
        raise ValueError(
            "corrector: a Langevin correction moves the state, so it needs a sampler that keeps no history"
        )
    steps, snr = 1 if steps is None else steps, 0.16 if snr is None else snr
    if not isinstance(steps, int) or steps < 1 or not snr > 0:
        raise ValueError(f"corrector_steps must be a positive int and snr positive; got {steps!r} and {snr!r}")
    return Langevin(steps, snr)


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t.flatten(1).to(torch.promote_types(t.dtype, torch.float32)), dim=1).mean()
