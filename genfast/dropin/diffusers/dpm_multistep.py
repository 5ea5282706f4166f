"""DPMSolverMultistepScheduler and its inverse: DPM-Solver and DPM-Solver++ (Lu et al. 2022, arXiv:2206.00927,
arXiv:2211.01095), as ODE and as SDE."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_dpmsolver_multistep_inverse
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    HostTimesteps,
    Plan,
    Rows,
    check_seed,
    fused,
    levels,
    needs_generator,
    output_maker,
    promoted,
    rows,
)

_output = output_maker(SchedulerOutput)


def signal_and_noise(scheduler: Fused):
    """(sigmas, alpha, sigma, lambda), float32 NumPy arrays [levels], from the peer's own torch functions."""
    sigmas = levels(scheduler.sigmas)
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas)
    alpha = alpha.to(sigma.dtype).expand(sigma.shape)  # one number where no signal is lost
    return tuple(v.numpy() for v in (sigmas, alpha, sigma, torch.log(alpha) - torch.log(sigma)))


def _exp(v):  # NumPy's differs in the last bit
    return torch.from_numpy(v).exp().numpy()


def interval_terms(algorithm: str, alpha_t, sigma_t, alpha_s, sigma_s, h):
    """(a, w, first, second, noise), float64, of moves over intervals from levels s to t, h = lambda_t - lambda_s:
    x' = a x + w D_0 + first D_1 + second D_2 + noise z, where the estimates D are of x0 with "++", else of eps, and D_1
    and D_2 are its first two derivatives in lambda / h. None for an unknown algorithm.

    ``first`` is the exact integral of a linear estimate (solver type "heun"); "midpoint" has half of w. The arithmetic
    is the peers' in float32, in NumPy, whose small arrays cost a third of torch's.
    """
    noise = None
    if algorithm == "dpmsolver++":
        e = _exp(-h) - 1.0
        a, w = sigma_t / sigma_s, -(alpha_t * e)
        first = alpha_t * (e / h + 1.0)
        second = -(alpha_t * ((e + h) / h**2 - 0.5))
    elif algorithm == "dpmsolver":
        e = _exp(h) - 1.0
        a, w = alpha_t / alpha_s, -(sigma_t * e)
        first = -(sigma_t * (e / h - 1.0))
        second = -(sigma_t * ((e - h) / h**2 - 0.5))
    elif algorithm == "sde-dpmsolver++":
        e = 1.0 - _exp(-2.0 * h)
        a, w = sigma_t / sigma_s * _exp(-h), alpha_t * e
        first = alpha_t * (e / (-2.0 * h) + 1.0)
        second = alpha_t * ((e - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        noise = sigma_t * np.sqrt(e)
    elif algorithm == "sde-dpmsolver":
        e = _exp(h) - 1.0
        a, w = alpha_t / alpha_s, -(2.0 * (sigma_t * e))
        first = -(2.0 * (sigma_t * (e / h - 1.0)))
        second = np.full_like(h, np.nan)  # the peers have no third order of it
        noise = sigma_t * np.sqrt(_exp(2.0 * h) - 1.0)
    else:
        return None
    return tuple(None if v is None else v.astype(np.float64) for v in (a, w, first, second, noise))


def multistep_weights(terms, solver: str, order: int, lam):
    """(a, [w_0, ..], noise), float64 [steps]: x' = a x + sum_k w_k m_k + noise z over every interval; None if the peer
    has no such update.

    ``terms`` are those of all intervals, ``lam`` = log(alpha / sigma) float32 [levels]; m_0 is the estimate at the
    interval's start, m_1 and m_2 those before. A level before the first counts from the end, as it does in the peer.
    """
    if terms is None or (order == 2 and solver not in ("midpoint", "heun")):
        return None
    a, w, first, second, noise = terms
    if order == 1:
        return a, [w], noise
    h = lam[1:] - lam[:-1]
    before = np.roll(lam, 1)[:-1]
    r0 = (lam[:-1] - before) / h
    inverse_r0 = (1.0 / r0).astype(np.float64)
    if order == 2:
        d1 = (0.5 * w if solver == "midpoint" else first) * inverse_r0
        return a, [w + d1, -d1], noise
    r1 = (before - np.roll(lam, 2)[:-1]) / h
    # D_1 = D_10 + r0 / (r0 + r1) (D_10 - D_11) and D_2 = (D_10 - D_11) / (r0 + r1), with D_10 = (m_0 - m_1) / r0 and
    # D_11 = (m_1 - m_2) / r1.
    share, inverse = (r0 / (r0 + r1)).astype(np.float64), (1.0 / (r0 + r1)).astype(np.float64)
    newer = (first * (1 + share) + second * inverse) * inverse_r0
    older = -(first * share + second * inverse) * (1.0 / r1).astype(np.float64)
    return a, [w + newer, older - newer, -older], noise


def estimate_columns(algorithm: str, prediction: str, sigmas, alpha, sigma):
    """(k, m), float64 [steps]: the estimate that the solver keeps is k sample + m output; None if there is none."""
    sigmas, alpha, sigma = (v[:-1].astype(np.float64) for v in (sigmas, alpha, sigma))
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if algorithm.endswith("++"):
        return {
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -sigmas),
        }.get(prediction)
    return {
        "epsilon": (zero, one),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
    }.get(prediction)


quietly = np.errstate(all="ignore")  # the peers divide tensors by zero without a word; such rows are left to them


def side_by_side(*parts):
    """[rows, columns] of arrays [rows]."""
    return np.array(parts).T


class FusedMultistep(Fused):
    """What the multistep solvers share: the order of a step, the history, and one kernel for both.

    A class says which ``algorithms`` its peer knows, ``upcasts``, whether the peer updates in float32 whatever the
    sample's dtype, ``draws_third_order``, whether its third order has an SDE form, and ``ends_with_euler``; others
    write ``estimate`` or ``make_rows``.
    """

    watched = ("sigmas", "timesteps")
    default_key = (1,)
    algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    upcasts = False
    draws_third_order = False

    def build(self) -> Plan:
        config = self.config
        algorithm, prediction = config.algorithm_type, config.prediction_type
        plus = algorithm.endswith("++")
        steps = len(self.timesteps)
        falls_off = bool(config.lower_order_final and steps < 15)
        is_estimate = prediction == ("sample" if plus else "epsilon")
        return Plan(
            levels=None,
            algorithm=algorithm,
            stochastic=algorithm.startswith("sde-"),
            order=config.solver_order,
            steps=steps,
            euler_at_final=self.ends_with_euler(config) or falls_off,
            falls_off=falls_off,
            first_three=prediction == "epsilon" and config.get("variance_type") in ("learned", "learned_range"),
            limited=bool(config.thresholding),
            keeps_output=is_estimate and not config.thresholding,
            has_outputs_dtype=is_estimate and (plus or not config.thresholding),
        )

    def planned_keys(self, plan):
        return [(order,) for order in range(1, min(plan.order, 3) + 1)]  # more are kept, but not used

    def estimate(self, plan):
        """See :func:`estimate_columns`."""
        return estimate_columns(plan.algorithm, self.config.prediction_type, *plan.levels[:3])

    def prepare(self, plan) -> None:
        """What the tables of all orders share."""
        plan.levels = _, alpha, sigma, lam = signal_and_noise(self)
        h = lam[1:] - lam[:-1]
        plan.terms = interval_terms(plan.algorithm, alpha[1:], sigma[1:], alpha[:-1], sigma[:-1], h)
        plan.estimate = self.estimate(plan)

    @quietly
    def make_rows(self, plan, order) -> Rows | None:
        """(sample, output, m_1, ..) -> next sample and the new estimate m_0; one row per step."""
        if plan.levels is None:
            self.prepare(plan)
        if plan.estimate is None or plan.algorithm not in self.algorithms:
            return None
        if order == 3 and plan.stochastic and not self.draws_third_order:
            return None
        _, alpha, sigma, lam = plan.levels
        weights = multistep_weights(plan.terms, self.config.solver_type, order, lam)
        if weights is None:
            return None
        a, (new, *past), noise = weights
        k, m = plan.estimate
        none = np.zeros_like(a)
        padding = [none] * len(past)
        if not plan.limited:
            kept = None if plan.keeps_output else side_by_side(k, m, *padding)
            return rows(side_by_side(a + new * k, new * m, *past), second=kept, noise=noise)
        if plan.algorithm.endswith("++"):
            one = np.ones_like(a)
            return rows(side_by_side(a, none, *past), x0=new, to_x0=side_by_side(k, m), second_x0=one, noise=noise)
        # eps once more, from the limited x0 = (x - sigma eps) / alpha.
        alpha, sigma = alpha[:-1].astype(np.float64), sigma[:-1].astype(np.float64)
        return rows(
            side_by_side(a + new / sigma, none, *past),
            x0=-new * alpha / sigma,
            to_x0=side_by_side((1 - sigma * k) / alpha, -sigma * m / alpha),
            second=side_by_side(1 / sigma, none, *padding),
            second_x0=-alpha / sigma,
            noise=noise,
        )

    def advance(self, model_output, timestep, sample, draw=None, seed=None, noise_dtype=None):
        """The next sample, with everything that the peer keeps brought up to date, or NotImplemented and nothing done.

        ``draw(like, dtype)`` makes the peer's noise for an estimate of that dtype; ``noise_dtype`` is that of noise
        that the caller gave.
        """
        plan = self.current_plan()
        past = self.model_outputs
        if self.num_inference_steps is None or len(past) != plan.order:
            return NotImplemented
        if not (isinstance(model_output, torch.Tensor) and isinstance(sample, torch.Tensor)):
            return NotImplemented
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
        dtype = next_dtype = output.dtype if plan.has_outputs_dtype else promoted(sample, output)
        if not self.upcasts:
            if not all(m is not None for m in history):
                return NotImplemented
            next_dtype = promoted(sample, output, *history)
            if noise_dtype is not None:
                next_dtype = torch.promote_types(next_dtype, noise_dtype)
        elif dtype is torch.float64 or sample.dtype is torch.float64:
            return NotImplemented
        result = fused(
            (sample, output, *history),
            plan.rows((order,), self.make_rows),
            row,
            next_dtype,
            dtype,
            threshold=plan.threshold if plan.limited else None,
            draw=(lambda: draw(output, dtype)) if plan.stochastic else None,
            seed=seed,
        )
        if result is NotImplemented:
            return result
        result, estimate = (result, output) if plan.keeps_output else result
        for i in range(plan.order - 1):
            past[i] = past[i + 1]
        past[-1] = estimate
        if ready < plan.order:
            self.lower_order_nums = ready + 1
        self._step_index = row + 1
        return result


class _FusedDPM(FusedMultistep):
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
        if not self.current_plan().stochastic:
            result = self.advance(model_output, timestep, sample)
        else:
            if variance_noise is None:
                seed = check_seed(self, generator, seed)
            elif seed is not None:
                raise ValueError("seed and variance_noise exclude each other: give one source of noise")
            result = self.advance(
                model_output,
                timestep,
                sample,
                lambda like, dtype: self._noise(like, dtype, generator, variance_noise),
                seed,
                getattr(variance_noise, "dtype", None),
            )
            if result is NotImplemented:
                needs_generator(seed)
        if result is NotImplemented:
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        return _output(result) if return_dict else (result,)


class DPMSolverMultistepScheduler(_FusedDPM, diffusers.DPMSolverMultistepScheduler):
    """``diffusers.DPMSolverMultistepScheduler`` with a fused ``step``."""

    upcasts = draws_third_order = True

    @staticmethod
    def ends_with_euler(config) -> bool:
        return config.euler_at_final or config.final_sigmas_type == "zero"

    @staticmethod
    def _noise(like, dtype, generator, variance_noise):
        if variance_noise is not None:
            return variance_noise.to(device=like.device, dtype=torch.float32)
        return scheduling_dpmsolver_multistep.randn_tensor(
            like.shape, generator=generator, device=like.device, dtype=torch.float32
        )


class DPMSolverMultistepInverseScheduler(_FusedDPM, diffusers.DPMSolverMultistepInverseScheduler):
    """``diffusers.DPMSolverMultistepInverseScheduler`` with a fused ``step``."""

    @staticmethod
    def ends_with_euler(config) -> bool:
        return config.euler_at_final

    def _init_step_index(self, timestep):
        value = self.host_timestep(timestep)
        places = None if value is None else HostTimesteps.of(self).places.get(value)
        if places is None:
            super()._init_step_index(timestep)
        else:
            self._step_index = places[min(len(places), 2) - 1]  # the second, as in index_for_timestep of the others

    @staticmethod
    def _noise(like, dtype, generator, variance_noise):
        if variance_noise is not None:
            return variance_noise
        return scheduling_dpmsolver_multistep_inverse.randn_tensor(
            like.shape, generator=generator, device=like.device, dtype=dtype
        )
