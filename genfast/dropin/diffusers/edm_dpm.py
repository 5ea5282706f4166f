"""EDMDPMSolverMultistepScheduler: DPM-Solver++ on EDM's preconditioned network (Karras et al. 2022, Lu et al. 2022)."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_edm_dpmsolver_multistep as peer
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import Plan, check_seed, levels, needs_generator, output_maker
from genfast.dropin.diffusers.dpm_multistep import FusedMultistep

_output = output_maker(SchedulerOutput)


class EDMDPMSolverMultistepScheduler(FusedMultistep, diffusers.EDMDPMSolverMultistepScheduler):
    """``diffusers.EDMDPMSolverMultistepScheduler`` with a fused ``step``."""

    algorithms = ("dpmsolver++", "sde-dpmsolver++")

    @staticmethod
    def ends_with_euler(config) -> bool:
        return config.euler_at_final or config.final_sigmas_type == "zero"

    def build(self) -> Plan:
        plan = super().build()
        plan.keeps_output = plan.has_outputs_dtype = plan.first_three = False
        plan.c_in = self._get_conditioning_c_in(levels(self.sigmas)).tolist()
        return plan

    def estimate(self, plan):
        sigma, sigma_data = plan.levels[0][:-1], self.config.sigma_data
        sign = {"epsilon": 1, "v_prediction": -1}.get(self.config.prediction_type)
        if sign is None:
            return None
        k = sigma_data**2 / (sigma**2 + sigma_data**2)
        m = sign * sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        return k.astype(np.float64), m.astype(np.float64)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """c_in times the sample."""
        if self._step_index is None:
            self._init_step_index(timestep)
        scaled = sample * self.current_plan().c_in[self._step_index]
        self.is_scale_input_called = True
        return scaled

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> SchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise of the SDE solver in the kernel, in place of ``generator``."""
        if not self.current_plan().stochastic:
            seed = None
        else:
            seed = check_seed(self, generator, seed)

        def draw(like, dtype):
            return peer.randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)

        result = self.advance(model_output, timestep, sample, draw, seed)
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        return _output(result) if return_dict else (result,)
