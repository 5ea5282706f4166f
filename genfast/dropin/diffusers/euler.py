"""EulerDiscreteScheduler: Euler steps of the probability-flow ODE in sigma (Karras et al. 2022, Algorithm 2)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_euler_discrete as peer
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput

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

_output = output_maker(EulerDiscreteSchedulerOutput)


class EulerDiscreteScheduler(Fused, diffusers.EulerDiscreteScheduler):
    """``diffusers.EulerDiscreteScheduler`` with a fused ``step``.

    One kernel reads the sample and the model's output and writes ``prev_sample`` and ``pred_original_sample``. The
    sample is taken in float32 and ``prev_sample`` returned in the model output's dtype, as the peer does.
    """

    default_key = (0.0, 0.0, float("inf"), 1.0)

    def build(self) -> Plan:
        sigmas = levels(self.sigmas)
        return Plan(
            scale=((sigmas**2 + 1) ** 0.5).tolist(),
            x0_is_output=self.config.prediction_type in ("sample", "original_sample"),
        )

    def make_rows(self, plan, s_churn, s_tmin, s_tmax, s_noise) -> Rows | None:
        """x' = x^ + (sigma' - sigma^) (x^ - x0) / sigma^ with x^ = x + churn z; one row per step."""
        sigmas = levels(self.sigmas)
        sigma, after = sigmas[:-1], sigmas[1:]
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
        churned = (s_tmin <= sigma) & (sigma <= s_tmax) & (gamma > 0)
        hat = torch.where(churned, sigma * (gamma + 1), sigma)
        prediction = self.config.prediction_type
        if prediction == "epsilon":  # x0 = k x^ + m output
            k, m = torch.ones_like(sigma), -hat
        elif prediction in ("sample", "original_sample"):
            k, m = torch.zeros_like(sigma), torch.ones_like(sigma)
        elif prediction == "v_prediction":
            k, m = 1 / (sigma**2 + 1).double(), -sigma / (sigma**2 + 1) ** 0.5
        else:
            return None
        k, m, ratio = k.double(), m.double(), (after - hat).double() / hat.double()
        a, b = 1 + ratio * (1 - k), -ratio * m
        noise = {}
        if churned.any():
            churn = torch.where(churned, (hat**2 - sigma**2) ** 0.5, 0).double() * s_noise
            noise = dict(noise=a * churn, second_noise=k * churn)
        return rows(columns(a, b), second=columns(k, m), draws=churned, **noise)

    def scale_model_input(self, sample, timestep):
        if self._step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        return sample / self.current_plan().scale[self._step_index]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> EulerDiscreteSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise of churn inside the kernel, in place of ``generator``."""
        result = NotImplemented
        dtype = model_output.dtype
        if is_level(timestep) and dtype is not torch.float64 and sample.dtype is not torch.float64:
            if not self.is_scale_input_called:
                peer.logger.warning("The `scale_model_input` function should be called before `step`.")
            if self._step_index is None:
                self._init_step_index(timestep)
            plan = self.current_plan()
            if return_dict and not s_churn and dtype is torch.float32 and sample.dtype is torch.float32:
                result = plain_object(_output, plan, self._step_index, sample, model_output)
                if result is not NotImplemented:
                    self._step_index += 1
                    return result
            seed = check_seed(self, generator, seed)

            def draw():
                return peer.randn_tensor(
                    model_output.shape, dtype=dtype, device=model_output.device, generator=generator
                )

            result = fused(
                (sample, model_output),
                plan.rows((s_churn, s_tmin, s_tmax, s_noise) if s_churn else self.default_key, self.make_rows),
                self._step_index,
                dtype,
                dtype if plan.x0_is_output else torch.float32,
                draw=draw if s_churn else None,
                seed=seed,
            )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )
        self._step_index += 1
        return _output(*result) if return_dict else result
