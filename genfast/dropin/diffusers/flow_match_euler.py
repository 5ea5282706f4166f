"""FlowMatchEulerDiscreteScheduler: Euler steps of rectified flow (Liu et al. 2022; Esser et al. 2024)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as peer
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    check_seed,
    columns,
    fused,
    is_level,
    levels,
    needs_generator,
    output_maker,
    plain_object,
    rows,
)

_output = output_maker(FlowMatchEulerDiscreteSchedulerOutput)


class FlowMatchEulerDiscreteScheduler(Fused, diffusers.FlowMatchEulerDiscreteScheduler):
    """``diffusers.FlowMatchEulerDiscreteScheduler`` with a fused ``step``; per-token timesteps run the peer's code."""

    def build(self) -> Plan:
        return Plan(stochastic=bool(self.config.stochastic_sampling))

    def make_rows(self, plan) -> Rows:
        """x' = x + (sigma' - sigma) v; stochastic: x' = (1 - sigma') (x - sigma v) + sigma' z."""
        sigmas = levels(self.sigmas)
        sigma, after = sigmas[:-1], sigmas[1:]
        if not self.config.stochastic_sampling:
            return rows(columns(torch.ones_like(sigma), after - sigma))
        keep = (1 - after).double()
        return rows(columns(keep, -keep * sigma), noise=after)

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
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple:
        """The peer's step (whose churn arguments do nothing); ``seed`` draws the noise of stochastic sampling."""
        result = NotImplemented
        if is_level(timestep) and per_token_timesteps is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            plan = self.current_plan()
            dtype = model_output.dtype
            if return_dict and dtype is torch.float32 and sample.dtype is torch.float32:
                result = plain_object(_output, plan, self._step_index, sample, model_output)
                if result is not NotImplemented:
                    self._step_index += 1
                    return result
            seed = check_seed(self, generator, seed)
            draw = None
            if plan.stochastic:

                def draw():  # in the dtype of the sample after the peer's promotion
                    return peer.randn_tensor(
                        sample.shape, generator=generator, device=sample.device, dtype=torch.float32
                    )

            if dtype is not torch.float64 and sample.dtype is not torch.float64:
                rows = plan.rows((), self.make_rows)
                result = fused((sample, model_output), rows, self._step_index, dtype, draw=draw, seed=seed)
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(
                model_output,
                timestep,
                sample,
                s_churn,
                s_tmin,
                s_tmax,
                s_noise,
                generator,
                per_token_timesteps,
                return_dict,
            )
        self._step_index += 1
        return _output(result) if return_dict else (result,)
