"""ScoreSdeVeScheduler: reverse diffusion and Langevin correction of the VE SDE (Song et al. 2021, arXiv:2011.13456)."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_sde_ve as peer
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Rows,
    check_seed,
    columns,
    fused,
    levels,
    needs_generator,
    output_maker,
    plain,
    promoted,
    rows,
)
from genfast.ops.sampler_step import sampler_step
from genfast.step_table import StepTable

_predicted = output_maker(SdeVeOutput)
_corrected = output_maker(SchedulerOutput)


class ScoreSdeVeScheduler(Fused, diffusers.ScoreSdeVeScheduler):
    """``diffusers.ScoreSdeVeScheduler`` with fused ``step_pred`` and ``step_correct``.

    A tensor of timesteps, one per sample, runs the peer's code. Results are float32 for half-precision samples, since
    the peer's coefficients are tensors with a batch dimension.
    """

    watched = ("discrete_sigmas", "timesteps")

    def make_rows(self, plan) -> Rows:
        """x' = x + (sigma_i^2 - sigma_{i-1}^2) score + sqrt(sigma_i^2 - sigma_{i-1}^2) z; one row per sigma."""
        sigma = levels(self.discrete_sigmas)
        before = torch.cat([torch.zeros(1), sigma[:-1]])
        diffusion = (sigma**2 - before**2) ** 0.5
        mean = columns(torch.ones_like(sigma), diffusion**2)
        return rows(mean, noise=diffusion, second=mean)

    def step_pred(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> SdeVeOutput | tuple:
        """The peer's predictor; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        result = NotImplemented
        t = None if self.timesteps is None else self.host_timestep(timestep)
        if isinstance(t, (int, float)) and sample.dim():
            row = int(np.float32(t) * np.float32(len(self.timesteps) - 1))

            def draw():
                return peer.randn_tensor(
                    sample.shape, layout=sample.layout, generator=generator, device=sample.device, dtype=sample.dtype
                )

            dtype = torch.promote_types(promoted(sample, model_output), torch.float32)
            result = fused((sample, model_output), self.current_rows(), row, dtype, draw=draw, seed=seed)
        if result is NotImplemented:
            needs_generator(seed)
            return super().step_pred(model_output, timestep, sample, generator, return_dict)
        return _predicted(*result) if return_dict else result

    def step_correct(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """The peer's corrector: its step size couples the samples through mean norms, which stay on the device.

        The noise is always ``generator``'s: its norm is part of the step size.
        """
        needs_noise_of_float32 = promoted(sample, model_output) is torch.float64
        if self.timesteps is None or not sample.dim() or needs_noise_of_float32 or not plain(sample, model_output):
            return super().step_correct(model_output, sample, generator, return_dict)
        noise = peer.randn_tensor(sample.shape, layout=sample.layout, generator=generator).to(sample.device)
        batch = sample.shape[0]
        grad_norm = torch.norm(model_output.reshape(batch, -1), dim=-1).mean()
        noise_norm = torch.norm(noise.reshape(batch, -1), dim=-1).mean()
        step_size = ((self.config.snr * noise_norm / grad_norm) ** 2 * 2).float()
        table = StepTable(torch.stack([torch.ones_like(step_size), step_size]), noise=(step_size * 2) ** 0.5)
        result = sampler_step([sample, model_output], table, noise=noise, dtype=torch.float32)
        return _corrected(result) if return_dict else (result,)
