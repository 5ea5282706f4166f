"""FlowMatchHeunDiscreteScheduler: Heun's second-order steps of rectified flow, two calls a step."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    columns,
    fused,
    is_level,
    levels,
    output_maker,
    rows,
)

_output = output_maker(FlowMatchHeunDiscreteSchedulerOutput)

FIRST, SECOND = ("first",), ("second",)


class FlowMatchHeunDiscreteScheduler(Fused, diffusers.FlowMatchHeunDiscreteScheduler):
    """``diffusers.FlowMatchHeunDiscreteScheduler`` with a fused ``step``; with churn, the peer's code."""

    default_key = FIRST

    def build(self) -> Plan:
        sigmas = levels(self.sigmas)
        return Plan(differences=sigmas[1:] - sigmas[:-1])

    def planned_keys(self, plan):
        return FIRST, SECOND

    def make_rows(self, plan, half) -> Rows:
        """``first``: x' = x + dt v of (x, v), and the derivative v; ``second``: s + dt / 2 (d + v) of (s, v, d)."""
        dt = plan.differences.double()
        zero, one = torch.zeros_like(dt), torch.ones_like(dt)
        if half == "first":
            usable = levels(self.sigmas)[:-1] > 0  # where the peer divides by 0
            return rows(columns(one, dt), second=columns(zero, one), usable=usable.numpy())
        dt = torch.cat([dt.new_full((1,), float("nan")), dt[:-1]]) / 2
        return rows(columns(one, dt, dt))

    def step(
        self,
        model_output: torch.FloatTensor,
        timestep: float | torch.FloatTensor,
        sample: torch.FloatTensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple:
        """The peer's step: the first call of a pair is an Euler step, the second corrects it."""
        result = NotImplemented
        dtype = model_output.dtype
        if is_level(timestep) and not s_churn and dtype is not torch.float64 and sample.dtype is not torch.float64:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
            plan = self.current_plan()
            dt, origin = self.dt, sample
            if dt is None:
                result = fused((sample, model_output), plan.rows(FIRST, self.make_rows), row, dtype, torch.float32)
            elif row > 0 and dt is plan.dt[row - 1] and sample.shape == self.sample.shape:
                inputs = (self.sample, model_output, self.prev_derivative)
                result = fused(inputs, plan.rows(SECOND, self.make_rows), row, dtype)
        if result is NotImplemented:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )
        if dt is None:
            result, self.prev_derivative = result
            self.dt, self.sample = plan.dt[row], origin.to(torch.float32)
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = row + 1
        return _output(result) if return_dict else (result,)
