"""DDPMScheduler and DDPMParallelScheduler (Ho et al. 2020, arXiv:2006.11239; Nichol and Dhariwal 2021)."""

from __future__ import annotations

from types import ModuleType

import diffusers
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_ddpm_parallel
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelSchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    HostTimesteps,
    Plan,
    Rows,
    batched,
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


class _FusedDDPM(Fused):
    watched = ("alphas_cumprod", "timesteps", "custom_timesteps", "variance_type")
    default_key = ("step",)
    peer_module: ModuleType

    def build(self) -> Plan:
        scheduled = bool(self.custom_timesteps or self.num_inference_steps)
        known = HostTimesteps.of(self) if scheduled else None
        return Plan(
            # Row of a timestep: its first place in the schedule; without a schedule, itself.
            row_of=None if known is None else {t: places[0] for t, places in known.places.items()},
            values=None if known is None else known.values,
            x0_is_output=self.config.prediction_type == "sample",
        )

    def previous_timestep(self, timestep):
        if self.custom_timesteps or self.num_inference_steps:
            plan, t = self.current_plan(), self.host_timestep(timestep)
            place = None if plan.row_of is None else plan.row_of.get(t)
            if place is not None:
                last = place + 1 == len(plan.values)
                return torch.tensor(-1) if last else self.timesteps[place + 1]
        return super().previous_timestep(timestep)

    def make_rows(self, plan, kind) -> Rows | None:
        """x' = sqrt(abar') beta / (1 - abar) x0 + sqrt(alpha) (1 - abar') / (1 - abar) x + s z.

        ``"step"``: one row per timestep of the schedule; ``"batch"``: one per training timestep, without noise.
        """
        table = levels(self.alphas_cumprod)
        if kind == "batch":
            t = torch.arange(len(table))
            before = t - len(table) // (self.num_inference_steps or len(table))
        elif plan.values is None:
            t = torch.arange(len(table))
            before = t - 1
        else:
            t = torch.tensor(plan.values, dtype=torch.int64)
            before = torch.cat([t[1:], torch.tensor([-1])])
        if t.min() < 0 or t.max() >= len(table):
            return None
        alpha_bar = table[t]
        after = torch.where(before >= 0, table[before.clamp(min=0)], 1.0)
        alpha = alpha_bar / after
        beta = 1 - alpha
        made = x0_eps_columns(self.config.prediction_type, alpha_bar)
        if made is None:
            return None
        k, m = made[:2]
        to_x0 = (after**0.5 * beta / (1 - alpha_bar)).double()
        to_x = (alpha**0.5 * (1 - after) / (1 - alpha_bar)).double()
        if kind == "batch":
            noise = {}
        else:
            noise = self._noise(after, alpha_bar, beta, t > 0)
            if noise is None:
                return None
        if plan.clip is None and plan.threshold is None:
            return rows(columns(to_x0 * k + to_x, to_x0 * m), second=columns(k, m), **noise)
        return rows(columns(to_x, 0 * to_x), x0=to_x0, to_x0=columns(k, m), second_x0=torch.ones_like(k), **noise)

    def _noise(self, after, alpha_bar, beta, draws):
        """The noise arguments of :func:`rows`; None for a variance that has no fused form."""
        kind = self.variance_type
        if kind != self.config.variance_type:
            return None
        variance = torch.clamp((1 - after) / (1 - alpha_bar) * beta, min=1e-20)
        if kind == "learned_range":
            low, high = torch.log(variance).double(), torch.log(beta).double()
            log_std = columns((low + high) / 4, (high - low) / 4)
            return dict(noise=draws.double(), log_std=torch.where(draws[:, None], log_std, 0.0), draws=draws)
        std = {
            "fixed_small": lambda: variance**0.5,
            "fixed_small_log": lambda: torch.exp(0.5 * torch.log(variance)),
            "fixed_large": lambda: beta**0.5,
            "fixed_large_log": lambda: torch.log(beta) ** 0.5,
        }.get(kind)
        return None if std is None else dict(noise=torch.where(draws, std(), 0.0), draws=draws)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ):
        """The peer's step; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        plan = self.current_plan()
        t = self.host_timestep(timestep)
        row = t if plan.row_of is None else plan.row_of.get(t)
        result = NotImplemented
        if type(t) is int and row is not None:
            made = plan.rows(self.default_key, self.make_rows)
            output, log_variance = model_output, None
            if made is not None and made.table.has_log_std:
                if model_output.shape[1] == 2 * sample.shape[1]:
                    output, log_variance = torch.split(model_output, sample.shape[1], dim=1)
                else:
                    made = None  # the peer says what is wrong
            dtype = promoted(sample, model_output)

            def draw():
                return self.peer_module.randn_tensor(
                    output.shape, generator=generator, device=output.device, dtype=output.dtype
                )

            result = fused(
                (sample, output),
                made,
                row,
                dtype,
                output.dtype if plan.x0_is_output else dtype,
                plan.clip,
                plan.threshold,
                log_variance=log_variance,
                draw=draw,
                seed=seed,
            )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        return self._output(*result) if return_dict else result


class DDPMScheduler(_FusedDDPM, diffusers.DDPMScheduler):
    """``diffusers.DDPMScheduler`` with a fused ``step``; the variance type "learned" runs the peer's code."""

    peer_module = scheduling_ddpm
    _output = staticmethod(output_maker(DDPMSchedulerOutput))


class DDPMParallelScheduler(_FusedDDPM, diffusers.DDPMParallelScheduler):
    """``diffusers.DDPMParallelScheduler`` with a fused ``step`` and ``batch_step_no_noise``."""

    peer_module = scheduling_ddpm_parallel
    _output = staticmethod(output_maker(DDPMParallelSchedulerOutput))

    def batch_step_no_noise(
        self, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The peer's step of samples at timesteps of their own, [B], without noise."""
        output = model_output
        if self.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            output = model_output[:, : sample.shape[1]]
        plan = self.current_plan()
        made = plan.rows(("batch",), self.make_rows)
        result = batched((sample, output), made, timesteps, plan.clip, plan.threshold)
        if result is NotImplemented:
            return super().batch_step_no_noise(model_output, timesteps, sample)
        return result[0]
