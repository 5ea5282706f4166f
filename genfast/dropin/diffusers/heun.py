"""HeunDiscreteScheduler: Heun's second-order steps in sigma, two calls a step (Karras et al. 2022, Algorithm 1)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor
from torch.compiler import is_compiling

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    columns,
    fused,
    levels,
    output_maker,
    promoted,
    rows,
)
from genfast.ops.sampler_step import object_path

_output = output_maker(HeunDiscreteSchedulerOutput)
FIRST, SECOND, WITH_SLOPE = ("first",), ("second",), ("slope",)


class Slope:
    """The derivative (sample - x0) / sigma of a first half step, computed when someone looks at it.

    The second half step takes it from the two tensors, which are kept anyway, in the same pass as all else.
    """

    __slots__ = ("row", "sample", "sigmas", "x0")

    def __init__(self, sample: Tensor, x0: Tensor, sigmas: Tensor, row: int):
        self.sample, self.x0, self.sigmas, self.row = sample, x0, sigmas, row

    def tensor(self) -> Tensor:
        return (self.sample - self.x0) / self.sigmas[self.row]


class SlopeAttribute:
    """``prev_derivative``, always a tensor or None to whoever reads it."""

    def __get__(self, scheduler, owner=None):
        if scheduler is None:
            return self
        value = scheduler.__dict__.get("prev_derivative")
        if type(value) is Slope:
            value = scheduler.__dict__["prev_derivative"] = value.tensor()
        return value

    def __set__(self, scheduler, value):
        scheduler.__dict__["prev_derivative"] = value


class HeunDiscreteScheduler(Fused, diffusers.HeunDiscreteScheduler):
    """``diffusers.HeunDiscreteScheduler`` with a fused ``step``."""

    default_key = FIRST
    prev_derivative = SlopeAttribute()

    def build(self) -> Plan:
        sigmas = levels(self.sigmas)
        return Plan(
            scale=((sigmas**2 + 1) ** 0.5).tolist(),
            sigmas=sigmas,
            differences=sigmas[1:] - sigmas[:-1],
            x0_is_output=self.config.prediction_type == "sample",
        )

    def planned_keys(self, plan):
        return FIRST, SECOND

    def make_rows(self, plan, half) -> Rows | None:
        """One row per call. With d = (x - x0) / sigma, ``first``: x' = x + dt d of (x, output). The second half, of
        the level sigma' that the first arrived at: ``second``, s + dt / 2 (d + d') of (x, output, s, x0 of the first
        half), where s is the sample of the first half; ``slope``, the same of (x, output, s, d)."""
        sigmas = levels(self.sigmas)
        first = half == "first"
        before = sigmas[:-1] if first else torch.cat([sigmas[:1], sigmas[:-2]])
        own = sigmas[:-1]  # of the model's output
        dt = (sigmas[1:] - sigmas[:-1] if first else own - before).double()
        prediction = self.config.prediction_type
        one, zero = torch.ones_like(dt), torch.zeros_like(dt)
        if prediction == "epsilon":  # x0 = k x + m output
            k, m = one, -own.double()
        elif prediction == "v_prediction":
            k, m = 1 / (own**2 + 1).double(), (-own / (own**2 + 1) ** 0.5).double()
        elif prediction == "sample":
            k, m = zero, one
        else:
            return None
        usable = torch.arange(len(own)) >= (0 if first else 1)
        rate = dt / own.double() * (1.0 if first else 0.5)  # of (x - x0)
        if first:
            state, rest = one, []
        elif half == "second":
            other = dt / before.double() / 2
            state, rest = zero, [one + other, -other]
        else:
            state, rest = zero, [one, dt / 2]
        padding = [zero] * len(rest)
        if plan.clip is not None:
            return rows(
                columns(state + rate, zero, *rest),
                x0=-rate,
                to_x0=columns(k, m),
                second_x0=one,
                usable=usable.numpy(),
            )
        return rows(
            columns(state + rate * (1 - k), -rate * m, *rest),
            second=columns(k, m, *padding),
            usable=usable.numpy(),
        )

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The sample over sqrt(sigma^2 + 1)."""
        if self._step_index is None:
            self._init_step_index(timestep)
        return sample / self.current_plan().scale[self._step_index]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> HeunDiscreteSchedulerOutput | tuple:
        """The peer's step: the first call of a pair is an Euler step, the second corrects it."""
        if self._step_index is None:
            self._init_step_index(timestep)
        row = self._step_index
        plan = self.current_plan()
        attributes = self.__dict__
        dt = attributes["dt"]
        if dt is None:
            key, inputs = FIRST, (sample, model_output)
        elif row > 0 and dt is plan.dt[row - 1]:
            slope, origin = attributes["prev_derivative"], attributes["sample"]
            if type(slope) is Slope and slope.sample is origin:
                key, inputs = SECOND, (sample, model_output, origin, slope.x0)
            else:
                key, inputs = WITH_SLOPE, (sample, model_output, origin, self.prev_derivative)
        else:  # somebody else's step size
            return super().step(model_output, timestep, sample, return_dict)
        made = plan.rows(key, self.make_rows)
        result = NotImplemented
        if return_dict and made is not None and not is_compiling():
            result = object_path.run(_output.spec, made.table, row, plan.clip, *inputs)
        if result is not NotImplemented:
            x0 = result.pred_original_sample
        else:
            if type(sample) is Tensor and type(model_output) is Tensor:
                x0_dtype = model_output.dtype if plan.x0_is_output else promoted(sample, model_output)
                result = fused(inputs, made, row, promoted(*inputs), x0_dtype, plan.clip)
            if result is NotImplemented:
                return super().step(model_output, timestep, sample, return_dict)
            x0 = result[1]
            if return_dict:
                result = _output(*result)
        if dt is None:
            attributes["prev_derivative"] = Slope(sample, x0, plan.sigmas, row)
            attributes["dt"], attributes["sample"] = plan.dt[row], sample
        else:
            attributes["prev_derivative"] = attributes["dt"] = attributes["sample"] = None
        self._step_index = row + 1
        return result
