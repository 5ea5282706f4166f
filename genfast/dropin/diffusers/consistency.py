"""CMStochasticIterativeScheduler: multistep sampling of consistency models (Song et al. 2023, arXiv:2303.01469)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_consistency_models as peer
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput

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
    promoted,
    rows,
)

_output = output_maker(CMStochasticIterativeSchedulerOutput)


class CMStochasticIterativeScheduler(Fused, diffusers.CMStochasticIterativeScheduler):
    """``diffusers.CMStochasticIterativeScheduler`` with a fused ``step``."""

    def build(self) -> Plan:
        sigmas = levels(self.sigmas)
        return Plan(
            scale=((sigmas**2 + self.config.sigma_data**2) ** 0.5).tolist(),
            range=(-1.0, 1.0) if self.config.clip_denoised else None,
        )

    def make_rows(self, plan) -> Rows | None:
        """x' = clip(c_skip x + c_out output) + s_noise sqrt(sigma'^2 - sigma_min^2) z; one row per step."""
        if self.sigmas.dtype is not torch.float32:  # not before set_timesteps
            return None
        config, sigmas = self.config, levels(self.sigmas)
        sigma = sigmas[:-1]
        after = torch.where(torch.arange(1, len(sigmas)) < config.num_train_timesteps, sigmas[1:], sigmas[-1])
        c_skip, c_out = self.get_scalings_for_boundary_condition(sigma)
        hat = after.clamp(min=config.sigma_min, max=config.sigma_max)
        noise = None
        if len(self.timesteps) > 1:
            noise = ((hat**2 - config.sigma_min**2) ** 0.5).double() * config.s_noise
        if plan.range is None:
            return rows(columns(c_skip, c_out), noise=noise)
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        return rows(columns(zero, zero), x0=one, to_x0=columns(c_skip, c_out), noise=noise)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The sample over sqrt(sigma^2 + sigma_data^2)."""
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
    ) -> CMStochasticIterativeSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        result = NotImplemented
        if is_level(timestep) and self.is_scale_input_called:
            if self._step_index is None:
                self._init_step_index(timestep)
            plan = self.current_plan()

            def draw():
                return peer.randn_tensor(
                    model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator
                )

            result = fused(
                (sample, model_output),
                plan.rows((), self.make_rows),
                self._step_index,
                promoted(sample, model_output),
                clip=plan.range,
                draw=draw if len(self.timesteps) > 1 else None,
                seed=seed,
            )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        self._step_index += 1
        return _output(result) if return_dict else (result,)
