"""DDIMScheduler, DDIMParallelScheduler and DDIMInverseScheduler (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

from types import ModuleType

import diffusers
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_parallel
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelSchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    batched,
    check_seed,
    columns,
    fused,
    levels,
    limits,
    needs_generator,
    output_maker,
    plain_object,
    promoted,
    rows,
    x0_eps_columns,
)


def ddim_rows(config, alpha_bar, after, eta=None, use_clipped_model_output=False) -> Rows | None:
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s z, s = eta sqrt((1 - abar')/(1 - abar) (1 - abar/abar')).

    Args:
        alpha_bar, after: float32 [rows], abar before and after the step.
        eta: None for a step that has no variance, not even one of 0 / 0 times 0.
    """
    made = x0_eps_columns(config.prediction_type, alpha_bar)
    if made is None:
        return None
    k, m, e, f = made
    std = torch.zeros_like(after)
    if eta is not None:
        std = eta * ((1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after)) ** 0.5
    direction = ((1 - after - std**2) ** 0.5).double()
    sa, sb, to = (alpha_bar**0.5).double(), ((1 - alpha_bar) ** 0.5).double(), (after**0.5).double()
    noise = std if eta else None
    if limits(config)[:2] == (None, None):
        if use_clipped_model_output:
            e, f = (1 - sa * k) / sb, -sa * m / sb
        direct = columns(to * k + direction * e, to * m + direction * f)
        return rows(direct, second=columns(k, m), noise=noise)
    if use_clipped_model_output:  # eps again, from the limited x0
        direct, weight = columns(direction / sb, 0 * sb), to - direction * sa / sb
    else:
        direct, weight = columns(direction * e, direction * f), to
    return rows(direct, x0=weight, to_x0=columns(k, m), second_x0=torch.ones_like(k), noise=noise)


def alpha_bars(scheduler, final) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 abar of every training timestep t, and of t - T // N (``final`` before the first)."""
    alpha_bar = levels(scheduler.alphas_cumprod)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    before = torch.arange(len(alpha_bar)) - stride
    return alpha_bar, torch.where(before >= 0, alpha_bar[before], levels(final))


class _FusedDDIM(Fused):
    watched = ("alphas_cumprod", "final_alpha_cumprod")
    default_key = (0.0, False)
    peer_module: ModuleType

    def build(self) -> Plan:
        return Plan(x0_is_output=self.config.prediction_type == "sample")

    def make_rows(self, plan, eta, use_clipped_model_output) -> Rows | None:
        """One row per training timestep."""
        steps = alpha_bars(self, self.final_alpha_cumprod)
        return ddim_rows(self.config, *steps, eta, use_clipped_model_output)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ):
        """The peer's step; ``seed`` draws the noise of ``eta > 0`` inside the kernel, in place of ``generator``."""
        result = NotImplemented
        row = self.host_timestep(timestep)
        if type(row) is int and self.num_inference_steps is not None:
            if return_dict and not eta and not use_clipped_model_output:
                result = plain_object(self._output, self.current_plan(), row, sample, model_output)
                if result is not NotImplemented:
                    return result
            seed = check_seed(self, generator, seed)
            if variance_noise is not None and (generator is not None or seed is not None) and eta > 0:
                raise ValueError("Cannot pass both generator and variance_noise: give one source of noise")
            plan = self.current_plan()
            dtype = promoted(sample, model_output)

            def draw():
                if variance_noise is not None:
                    return variance_noise
                return self.peer_module.randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )

            result = fused(
                (sample, model_output),
                plan.rows((eta, use_clipped_model_output), self.make_rows),
                row,
                dtype,
                model_output.dtype if plan.x0_is_output else dtype,
                plan.clip,
                plan.threshold,
                draw=draw if eta > 0 else None,
                seed=seed,
            )
        if result is NotImplemented:
            needs_generator(seed if eta > 0 else None)
            return super().step(
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        return self._output(*result) if return_dict else result


class DDIMScheduler(_FusedDDIM, diffusers.DDIMScheduler):
    """``diffusers.DDIMScheduler`` with a fused ``step``."""

    peer_module = scheduling_ddim
    _output = staticmethod(output_maker(DDIMSchedulerOutput))


class DDIMParallelScheduler(_FusedDDIM, diffusers.DDIMParallelScheduler):
    """``diffusers.DDIMParallelScheduler`` with a fused ``step`` and ``batch_step_no_noise``."""

    peer_module = scheduling_ddim_parallel
    _output = staticmethod(output_maker(DDIMParallelSchedulerOutput))

    def make_rows(self, plan, eta, use_clipped_model_output) -> Rows | None:
        """One row per training timestep; with ``eta`` None, those of ``batch_step_no_noise``, which ends at abar' = 1
        whatever ``set_alpha_to_one`` says."""
        if eta is not None:
            return super().make_rows(plan, eta, use_clipped_model_output)
        return ddim_rows(self.config, *alpha_bars(self, torch.tensor(1.0)), None, use_clipped_model_output)

    def batch_step_no_noise(
        self,
        model_output: torch.Tensor,
        timesteps: torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> torch.Tensor:
        """The peer's step of samples at timesteps of their own, [B], without noise."""
        result = NotImplemented
        if self.num_inference_steps is not None and eta == 0.0:
            plan = self.current_plan()
            made = plan.rows((None, use_clipped_model_output), self.make_rows)
            result = batched((sample, model_output), made, timesteps, plan.clip, plan.threshold)
        if result is NotImplemented:
            return super().batch_step_no_noise(model_output, timesteps, sample, eta, use_clipped_model_output)
        return result[0]


class DDIMInverseScheduler(Fused, diffusers.DDIMInverseScheduler):
    """``diffusers.DDIMInverseScheduler`` with a fused ``step``: DDIM run backwards, from data to noise."""

    watched = ("alphas_cumprod", "initial_alpha_cumprod")
    _output = staticmethod(output_maker(DDIMSchedulerOutput))

    def build(self) -> Plan:
        return Plan(x0_is_output=self.config.prediction_type == "sample")

    def make_rows(self, plan) -> Rows | None:
        """One row per training timestep t, a step from t - T // N to t."""
        after, before = alpha_bars(self, self.initial_alpha_cumprod)
        return ddim_rows(self.config, before, after)

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """The peer's step."""
        result = NotImplemented
        row = self.host_timestep(timestep)
        if type(row) is int and self.num_inference_steps is not None:
            plan = self.current_plan()
            if return_dict:
                result = plain_object(self._output, plan, row, sample, model_output)
                if result is not NotImplemented:
                    return result
            dtype = promoted(sample, model_output)
            result = fused(
                (sample, model_output),
                plan.rows((), self.make_rows),
                row,
                dtype,
                model_output.dtype if plan.x0_is_output else dtype,
                plan.clip,
            )
        if result is NotImplemented:
            return super().step(model_output, timestep, sample, return_dict)
        return self._output(*result) if return_dict else result
