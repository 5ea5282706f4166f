"""DEISMultistepScheduler: the exponential integrator with polynomials in log rho (Zhang and Chen 2023,
arXiv:2204.13902)."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import Plan, Rows, columns, levels, output_maker, rows
from genfast.dropin.diffusers.dpm_multistep import FusedMultistep

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

    def weights(self, plan, order):
        """The peer's closed integrals of Lagrange polynomials in log rho, with its own float32 roundings."""
        alpha, sigma, lam = self.alpha_sigma_lambda()
        alpha_t, alpha_s = alpha[1:], alpha[:-1]
        if order == 1:
            h = lam[1:] - lam[:-1]
            return (alpha_t / alpha_s).double(), [-(sigma[1:] * (torch.exp(h) - 1.0)).double()], None
        rho = sigma / alpha
        with np.errstate(divide="ignore"):
            log_rho = torch.from_numpy(np.log(rho.numpy()))
        count = len(rho)
        at = torch.arange(count - 1)
        nodes = [(at - k) % count for k in range(order)]  # before the first level: from the end, as in the peer
        logs = [log_rho[n] for n in nodes]

        def integral(place, b, c, d=None):
            t, log_t = rho[place], log_rho[place]
            if d is None:
                return t * (-c + log_t - 1) / (b - c)
            top = t * (c * (d - log_t + 1) - d * log_t + d + log_t**2 - 2 * log_t + 2)
            return top / ((b - c) * (b - d))

        weights = []
        for k in range(order):
            others = [logs[(k + j) % order] for j in range(1, order)]
            coefficient = integral(at + 1, logs[k], *others) - integral(nodes[0], logs[k], *others)
            weights.append(alpha_t.double() * coefficient.double())
        return (alpha_t.double() / alpha_s.double()), weights, None

    def make_rows(self, plan, order) -> Rows | None:
        """(sample, output, m_1, ..) -> next sample and eps = (x - alpha x0) / sigma; one row per step."""
        if self.config.algorithm_type != "deis":
            return None
        alpha, sigma = (v[:-1].double() for v in self.alpha_sigma_lambda()[:2])
        if self.config.prediction_type == "flow_prediction":  # of the level as it is, whatever the noise's weight
            sigma = levels(self.sigmas)[:-1].double()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        estimate = {  # (k, m) of x0 = k x + m output, which the peer limits
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -sigma),
        }.get(self.config.prediction_type)
        if estimate is None:
            return None
        k, m = estimate
        a, (new, *past), _ = self.weights(plan, order)
        none = torch.zeros_like(a)
        padding = [none] * len(past)
        if plan.limited:
            return rows(
                columns(a + new / sigma, none, *past),
                x0=-new * alpha / sigma,
                to_x0=columns(k, m),
                second=columns(1 / sigma, none, *padding),
                second_x0=-alpha / sigma,
            )
        e, f = (1 - alpha * k) / sigma, -alpha * m / sigma
        return rows(columns(a + new * e, new * f, *past), second=columns(e, f, *padding))

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
