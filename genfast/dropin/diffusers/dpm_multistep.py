"""DPMSolverMultistepScheduler and its inverse: DPM-Solver and DPM-Solver++ (Lu et al. 2022, arXiv:2206.00927,
arXiv:2211.01095), as ODE and as SDE."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_dpmsolver_multistep_inverse
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
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
)

_output = output_maker(SchedulerOutput)


def multistep_weights(algorithm: str, solver: str, order: int, alpha, sigma, lam):
    """(a, [w_0, ..], noise), float64 [steps]: x' = a x + sum_k w_k m_k + noise z over every interval; None if the peer
    has no such update.

    ``alpha``, ``sigma`` and ``lam`` = log(alpha / sigma) are those of all levels, float32; m_0 is the estimate at the
    interval's start (of x0 with "++", else of eps), m_1 and m_2 those before. A level before the first counts from the
    end, as it does in the peer.
    """
    at = torch.arange(len(lam) - 1)
    alpha_t, sigma_t = alpha[1:], sigma[1:]
    alpha_s, sigma_s = alpha[:-1], sigma[:-1]
    h = lam[1:] - lam[:-1]
    stochastic = algorithm.startswith("sde-")
    if algorithm == "dpmsolver++":
        a, w, noise = sigma_t / sigma_s, -(alpha_t * (torch.exp(-h) - 1.0)), None
    elif algorithm == "dpmsolver":
        a, w, noise = alpha_t / alpha_s, -(sigma_t * (torch.exp(h) - 1.0)), None
    elif algorithm == "sde-dpmsolver++":
        a, w = sigma_t / sigma_s * torch.exp(-h), alpha_t * (1 - torch.exp(-2.0 * h))
        noise = (sigma_t * torch.sqrt(1.0 - torch.exp(-2 * h))).double()
    elif algorithm == "sde-dpmsolver":
        a, w = alpha_t / alpha_s, -(2.0 * (sigma_t * (torch.exp(h) - 1.0)))
        noise = (sigma_t * torch.sqrt(torch.exp(2 * h) - 1.0)).double()
    else:
        return None
    a, w = a.double(), w.double()
    if order == 1:
        return a, [w], noise

    # Of the first difference: half of w, or the exact integral of a linear estimate.
    if algorithm == "dpmsolver++":
        exact = alpha_t * ((torch.exp(-h) - 1.0) / h + 1.0)
    elif algorithm == "dpmsolver":
        exact = -(sigma_t * ((torch.exp(h) - 1.0) / h - 1.0))
    elif algorithm == "sde-dpmsolver++":
        exact = alpha_t * ((1.0 - torch.exp(-2.0 * h)) / (-2.0 * h) + 1.0)
    else:
        exact = -(2.0 * (sigma_t * ((torch.exp(h) - 1.0) / h - 1.0)))
    inverse_r0 = 1.0 / ((lam[:-1] - lam[(at - 1) % len(lam)]) / h)
    if order == 2:
        if solver not in ("midpoint", "heun"):
            return None
        d1 = (0.5 * w if solver == "midpoint" else exact.double()) * inverse_r0.double()
        return a, [w + d1, -d1], noise

    if algorithm == "dpmsolver++":
        second = -(alpha_t * ((torch.exp(-h) - 1.0 + h) / h**2 - 0.5))
    elif algorithm == "dpmsolver":
        second = -(sigma_t * ((torch.exp(h) - 1.0 - h) / h**2 - 0.5))
    elif algorithm == "sde-dpmsolver++":
        second = alpha_t * ((1.0 - torch.exp(-2.0 * h) - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
    else:
        return None
    r0 = (lam[:-1] - lam[(at - 1) % len(lam)]) / h
    r1 = (lam[(at - 1) % len(lam)] - lam[(at - 2) % len(lam)]) / h
    # D1 = D1_0 + r0 / (r0 + r1) (D1_0 - D1_1) and D2 = (D1_0 - D1_1) / (r0 + r1), with D1_0 = (m_0 - m_1) / r0 and
    # D1_1 = (m_1 - m_2) / r1.
    d1, d2 = exact.double(), second.double()
    share, inverse = (r0 / (r0 + r1)).double(), (1.0 / (r0 + r1)).double()
    of_first = (d1 * (1 + share) + d2 * inverse) * inverse_r0.double()
    of_second = -(d1 * share + d2 * inverse) * (1.0 / r1).double()
    return a, [w + of_first, of_second - of_first, -of_second], noise if stochastic else None


def estimate_columns(algorithm: str, prediction: str, alpha, sigma, flow_sigma):
    """(k, m), float64 [steps]: the estimate that the solver keeps is k sample + m output; None if there is none."""
    alpha, sigma = alpha[:-1].double(), sigma[:-1].double()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if algorithm.endswith("++"):
        return {
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -flow_sigma[:-1].double()),
        }.get(prediction)
    return {
        "epsilon": (zero, one),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
    }.get(prediction)


class _FusedMultistep(Fused):
    watched = ("sigmas", "timesteps")
    default_key = (1,)
    upcasts = True
    """Whether the peer updates in float32, whatever the sample's dtype."""

    def build(self) -> Plan:
        config = self.config
        algorithm, prediction = config.algorithm_type, config.prediction_type
        plus = algorithm.endswith("++")
        steps = len(self.timesteps)
        falls_off = bool(config.lower_order_final and steps < 15)
        return Plan(
            algorithm=algorithm,
            stochastic=algorithm.startswith("sde-"),
            order=config.solver_order,
            steps=steps,
            euler_at_final=self.ends_with_euler(config) or falls_off,
            falls_off=falls_off,
            first_three=prediction == "epsilon" and config.variance_type in ("learned", "learned_range"),
            limited=bool(config.thresholding),
            keeps_output=prediction == ("sample" if plus else "epsilon") and not config.thresholding,
            has_outputs_dtype=prediction == ("sample" if plus else "epsilon") and (plus or not config.thresholding),
        )

    def planned_keys(self, plan):
        return [(order,) for order in range(1, plan.order + 1)]

    def make_rows(self, plan, order) -> Rows | None:
        """(sample, output, m_1, ..) -> next sample and the new estimate m_0; one row per step."""
        sigmas = levels(self.sigmas)
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        lam = torch.log(alpha) - torch.log(sigma)
        config = self.config
        weights = multistep_weights(plan.algorithm, config.solver_type, order, alpha, sigma, lam)
        estimate = estimate_columns(plan.algorithm, config.prediction_type, alpha, sigma, sigmas)
        if weights is None or estimate is None:
            return None
        a, (new, *past), noise = weights
        k, m = estimate
        none = torch.zeros_like(a)
        padding = [none] * len(past)
        if not plan.limited:
            kept = None if plan.keeps_output else columns(k, m, *padding)
            return rows(columns(a + new * k, new * m, *past), second=kept, noise=noise)
        if plan.algorithm.endswith("++"):
            one = torch.ones_like(a)
            return rows(columns(a, none, *past), x0=new, to_x0=columns(k, m), second_x0=one, noise=noise)
        # eps once more, from the limited x0 = (x - sigma eps) / alpha.
        alpha_s, sigma_s = alpha[:-1].double(), sigma[:-1].double()
        to_x0 = columns((1 - sigma_s * k) / alpha_s, -sigma_s * m / alpha_s)
        return rows(
            columns(a + new / sigma_s, none, *past),
            x0=-new * alpha_s / sigma_s,
            to_x0=to_x0,
            second=columns(1 / sigma_s, none, *padding),
            second_x0=-alpha_s / sigma_s,
            noise=noise,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> SchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise of the SDE solvers in the kernel, in place of ``generator``."""
        result = NotImplemented
        plan = self.current_plan()
        seed = check_seed(self, generator, seed) if plan.stochastic else None
        past = self.model_outputs
        if self.num_inference_steps is not None and len(past) == plan.order:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
            left = plan.steps - row
            ready = self.lower_order_nums
            if plan.order == 1 or ready < 1 or (left == 1 and plan.euler_at_final):
                order = 1
            elif plan.order == 2 or ready < 2 or (left == 2 and plan.falls_off):
                order = 2
            else:
                order = 3
            output = model_output[:, :3] if plan.first_three else model_output
            history = past[:-order:-1] if order > 1 else ()
            dtype = output.dtype if plan.has_outputs_dtype else promoted(sample, output)
            draw = None
            if plan.stochastic:

                def draw():
                    return self._noise(output, dtype, generator, variance_noise)

            if self.upcasts:
                fits, next_dtype = dtype is not torch.float64 and sample.dtype is not torch.float64, dtype
            else:
                fits = all(m is not None for m in history)
                next_dtype = promoted(sample, output, *history) if fits else dtype
            if fits:
                result = fused(
                    (sample, output, *history),
                    plan.rows((order,), self.make_rows),
                    row,
                    next_dtype,
                    dtype,
                    threshold=plan.threshold if plan.limited else None,
                    draw=draw,
                    seed=seed,
                )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        result, estimate = (result, output) if plan.keeps_output else result
        for i in range(plan.order - 1):
            past[i] = past[i + 1]
        past[-1] = estimate
        if ready < plan.order:
            self.lower_order_nums = ready + 1
        self._step_index = row + 1
        return _output(result) if return_dict else (result,)


class DPMSolverMultistepScheduler(_FusedMultistep, diffusers.DPMSolverMultistepScheduler):
    """``diffusers.DPMSolverMultistepScheduler`` with a fused ``step``."""

    @staticmethod
    def ends_with_euler(config) -> bool:
        return config.euler_at_final or config.final_sigmas_type == "zero"

    @staticmethod
    def _noise(output, dtype, generator, variance_noise):
        if variance_noise is not None:
            return variance_noise.to(device=output.device, dtype=torch.float32)
        return scheduling_dpmsolver_multistep.randn_tensor(
            output.shape, generator=generator, device=output.device, dtype=torch.float32
        )


class DPMSolverMultistepInverseScheduler(_FusedMultistep, diffusers.DPMSolverMultistepInverseScheduler):
    """``diffusers.DPMSolverMultistepInverseScheduler`` with a fused ``step``."""

    upcasts = False

    @staticmethod
    def ends_with_euler(config) -> bool:
        return config.euler_at_final

    @staticmethod
    def _noise(output, dtype, generator, variance_noise):
        if variance_noise is not None:
            return variance_noise
        return scheduling_dpmsolver_multistep_inverse.randn_tensor(
            output.shape, generator=generator, device=output.device, dtype=dtype
        )
