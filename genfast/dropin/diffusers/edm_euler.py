"""EDMEulerScheduler: Euler steps on EDM's preconditioned network (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_edm_euler as peer
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput

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

_output = output_maker(EDMEulerSchedulerOutput)


class EDMEulerScheduler(Fused, diffusers.EDMEulerScheduler):
    """``diffusers.EDMEulerScheduler`` with a fused ``step``.

    As in the peer, churn is added after the model was called, where the paper adds it before.
    """

    default_key = (0.0, 0.0, float("inf"), 1.0)

    def build(self) -> Plan:
        return Plan(c_in=[float(self._get_conditioning_c_in(sigma)) for sigma in levels(self.sigmas)])

    def make_rows(self, plan, s_churn, s_tmin, s_tmax, s_noise) -> Rows | None:
        """x' = x^ + (sigma' - sigma^) (x^ - x0) / sigma^, x0 = c_skip x^ + c_out output, x^ = x + churn z."""
        sigmas, sigma_data = levels(self.sigmas), self.config.sigma_data
        sigma, after = sigmas[:-1], sigmas[1:]
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
        churned = (s_tmin <= sigma) & (sigma <= s_tmax) & (gamma > 0)
        hat = torch.where(churned, sigma * (gamma + 1), sigma)
        sign = {"epsilon": 1, "v_prediction": -1}.get(self.config.prediction_type)
        if sign is None:
            return None
        k = (sigma_data**2 / (hat**2 + sigma_data**2)).double()
        m = (sign * hat * sigma_data / (hat**2 + sigma_data**2) ** 0.5).double()
        ratio = (after - hat).double() / hat.double()
        a, b = 1 + ratio * (1 - k), -ratio * m
        noise = {}
        if churned.any():
            churn = torch.where(churned, (hat**2 - sigma**2) ** 0.5, 0).double() * s_noise
            noise = dict(noise=a * churn, second_noise=k * churn)
        return rows(columns(a, b), second=columns(k, m), draws=churned, **noise)

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
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        pred_original_sample: torch.Tensor | None = None,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise of churn inside the kernel, in place of ``generator``. A given
        ``pred_original_sample`` runs the peer's code."""
        result = NotImplemented
        dtype = model_output.dtype
        if (
            is_level(timestep)
            and pred_original_sample is None
            and dtype is not torch.float64
            and sample.dtype is not torch.float64
        ):
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
                torch.float32,
                draw=draw if s_churn else None,
                seed=seed,
            )
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
                return_dict,
                pred_original_sample,
            )
        self._step_index += 1
        return _output(*result) if return_dict else result
