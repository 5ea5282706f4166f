"""DEISMultistepScheduler: the exponential integrator with polynomials in log rho (Zhang and Chen 2023,
arXiv:2204.13902)."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import Plan, Rows, output_maker, rows
from genfast.dropin.diffusers.dpm_multistep import FusedMultistep, quietly, side_by_side, signal_and_noise

_output = output_maker(SchedulerOutput)


class DEISMultistepScheduler(FusedMultistep, diffusers.DEISMultistepScheduler):
    """``diffusers.DEISMultistepScheduler`` with a fused ``step``."""

    @staticmethod
    def ends_with_euler(config) -> bool:
        return False

    def build(self) -> Plan:
        plan = super().build()
        plan.keeps_output = plan.has_outputs_dtype = plan.first_three = plan.stochastic = False
        return plan

    @quietly
    def prepare(self, plan) -> None:
        plan.levels = _, alpha, sigma, _ = signal_and_noise(self)
        plan.rho = sigma / alpha
        plan.log_rho = np.log(plan.rho)  # NumPy's, as in the peer

    def weights(self, plan, order):
        """(a, [w_0, ..]): the closed integrals of Lagrange polynomials in log rho, with the peer's roundings."""
        _, alpha, sigma, lam = plan.levels
        alpha_t, alpha_s = alpha[1:], alpha[:-1]
        if order == 1:
            growth = torch.from_numpy(lam[1:] - lam[:-1]).exp().numpy() - 1.0
            return (alpha_t / alpha_s).astype(np.float64), [-(sigma[1:] * growth).astype(np.float64)]
        rho, log_rho = plan.rho, plan.log_rho
        logs = [np.roll(log_rho, k)[:-1] for k in range(order)]  # before the first: from the end, as in the peer

        def integral(t, log_t, b, c, d=None):
            if d is None:
                return t * (-c + log_t - 1) / (b - c)
            top = t * (c * (d - log_t + 1) - d * log_t + d + log_t**2 - 2 * log_t + 2)
            return top / ((b - c) * (b - d))

        weights = []
        scale = alpha_t.astype(np.float64)
        for k in range(order):
            nodes = [logs[(k + j) % order] for j in range(order)]
            step = integral(rho[1:], log_rho[1:], *nodes) - integral(rho[:-1], log_rho[:-1], *nodes)
            weights.append(scale * step.astype(np.float64))
        return scale / alpha_s.astype(np.float64), weights

    @quietly
    def make_rows(self, plan, order) -> Rows | None:
        """(sample, output, m_1, ..) -> next sample and eps = (x - alpha x0) / sigma; one row per step."""
        if self.config.algorithm_type != "deis":
            return None
        if plan.levels is None:
            self.prepare(plan)
        sigmas, alpha, sigma = (v[:-1].astype(np.float64) for v in plan.levels[:3])
        if self.config.prediction_type == "flow_prediction":  # of the level as it is, whatever the noise's weight
            sigma = sigmas
        none, one = np.zeros_like(alpha), np.ones_like(alpha)
        estimate = {  # (k, m) of x0 = k x + m output, which the peer limits
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (none, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -sigma),
        }.get(self.config.prediction_type)
        if estimate is None:
            return None
        k, m = estimate
        a, (new, *past) = self.weights(plan, order)
        padding = [none] * len(past)
        if plan.limited:
            return rows(
                side_by_side(a + new / sigma, none, *past),
                x0=-new * alpha / sigma,
                to_x0=side_by_side(k, m),
                second=side_by_side(1 / sigma, none, *padding),
                second_x0=-alpha / sigma,
            )
        e, f = (1 - alpha * k) / sigma, -alpha * m / sigma
        return rows(side_by_side(a + new * e, new * f, *past), second=side_by_side(e, f, *padding))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """The peer's step."""
        result = self.advance(model_output, timestep, sample)
        if result is NotImplemented:
            return super().step(model_output, timestep, sample, return_dict)
        return _output(result) if return_dict else (result,)
