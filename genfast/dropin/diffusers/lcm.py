"""LCMScheduler: multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_lcm as peer
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    HostTimesteps,
    Plan,
    Rows,
    check_seed,
    columns,
    fused,
    levels,
    needs_generator,
    output_maker,
    promoted,
    rows,
    x0_eps_columns,
)

_output = output_maker(LCMSchedulerOutput)


class LCMScheduler(Fused, diffusers.LCMScheduler):
    """``diffusers.LCMScheduler`` with a fused ``step``; the second output is ``denoised``."""

    watched = ("alphas_cumprod", "final_alpha_cumprod", "timesteps")

    def build(self) -> Plan:
        return Plan(values=HostTimesteps.of(self).values)

    def make_rows(self, plan) -> Rows | None:
        """denoised = c_out x0 + c_skip x; x' = sqrt(abar') denoised + sqrt(1 - abar') z, one row per step of the
        schedule; the last is the denoised sample."""
        table = levels(self.alphas_cumprod)
        t = torch.tensor(plan.values, dtype=torch.int64)
        last = torch.arange(len(t)) == self.num_inference_steps - 1
        before = torch.cat([t[1:], t[-1:]])
        alpha_bar = table[t]
        after = torch.where(before >= 0, table[before.clamp(min=0)], levels(self.final_alpha_cumprod))
        made = x0_eps_columns(self.config.prediction_type, alpha_bar, torch.sqrt)
        if made is None:
            return None
        k, m = made[:2]
        scaled = t * self.config.timestep_scaling
        sigma_data = 0.5
        c_skip = (sigma_data**2 / (scaled**2 + sigma_data**2)).double()
        c_out = (scaled / (scaled**2 + sigma_data**2) ** 0.5).double()
        keep = torch.where(last, 1.0, after.sqrt()).double()
        noise = torch.where(last, 0.0, (1 - after).sqrt())
        if plan.clip is None and plan.threshold is None:
            a, b = c_out * k + c_skip, c_out * m
            return rows(columns(keep * a, keep * b), second=columns(a, b), noise=noise, draws=~last)
        none = torch.zeros_like(k)
        return rows(
            columns(keep * c_skip, none),
            x0=keep * c_out,
            to_x0=columns(k, m),
            second=columns(c_skip, none),
            second_x0=c_out,
            noise=noise,
            draws=~last,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> LCMSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        result = NotImplemented
        if self.num_inference_steps is not None:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
            plan = self.current_plan()
            if 0 <= row < len(plan.values) and self.host_timestep(timestep) == plan.values[row]:
                dtype = promoted(sample, model_output)

                def draw():
                    return peer.randn_tensor(
                        model_output.shape, generator=generator, device=model_output.device, dtype=dtype
                    )

                result = fused(
                    (sample, model_output),
                    plan.rows((), self.make_rows),
                    row,
                    dtype,
                    clip=plan.clip,
                    threshold=plan.threshold,
                    draw=draw,
                    seed=seed,
                )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        self._step_index = row + 1
        self.sigma_data = 0.5  # as the peer's step leaves it
        return _output(*result) if return_dict else result
