"""EulerAncestralDiscreteScheduler: Euler steps in sigma with noise put back (k-diffusion)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as peer
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput

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
    rows,
)

_output = output_maker(EulerAncestralDiscreteSchedulerOutput)


class EulerAncestralDiscreteScheduler(Fused, diffusers.EulerAncestralDiscreteScheduler):
    """``diffusers.EulerAncestralDiscreteScheduler`` with a fused ``step``."""

    def build(self) -> Plan:
        return Plan(scale=((levels(self.sigmas) ** 2 + 1) ** 0.5).tolist())

    def make_rows(self, plan) -> Rows | None:
        """x' = x + (sigma_down - sigma) (x - x0) / sigma + sigma_up z; one row per step."""
        sigmas = levels(self.sigmas)
        sigma, after = sigmas[:-1], sigmas[1:]
        prediction = self.config.prediction_type
        if prediction == "epsilon":  # x0 = k x + m output
            k, m = torch.ones_like(sigma).double(), -sigma.double()
        elif prediction == "v_prediction":
            k, m = 1 / (sigma**2 + 1).double(), (-sigma / (sigma**2 + 1) ** 0.5).double()
        else:
            return None
        up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        ratio = (down - sigma).double() / sigma.double()
        return rows(columns(1 + ratio * (1 - k), -ratio * m), second=columns(k, m), noise=up)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The sample over sqrt(sigma^2 + 1)."""
        if self._step_index is None:
            self._init_step_index(timestep)
        scaled = sample / self.current_plan().scale[self._step_index]
        self.is_scale_input_called = True
        return scaled

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        result = NotImplemented
        dtype = model_output.dtype
        if is_level(timestep) and dtype is not torch.float64 and sample.dtype is not torch.float64:
            if not self.is_scale_input_called:
                peer.logger.warning("The `scale_model_input` function should be called before `step`.")
            if self._step_index is None:
                self._init_step_index(timestep)

            def draw():
                return peer.randn_tensor(
                    model_output.shape, dtype=dtype, device=model_output.device, generator=generator
                )

            result = fused(
                (sample, model_output),
                self.current_rows(),
                self._step_index,
                dtype,
                torch.float32,
                draw=draw,
                seed=seed,
            )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        self._step_index += 1
        return _output(*result) if return_dict else result
