"""DPMSolverSinglestepScheduler: DPM-Solver and DPM-Solver++ in cycles of one to three steps (Lu et al. 2022)."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_dpmsolver_singlestep as peer
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    check_seed,
    fused,
    needs_generator,
    output_maker,
    promoted,
    rows,
)
from genfast.dropin.diffusers.dpm_multistep import (
    estimate_columns,
    interval_terms,
    quietly,
    side_by_side,
    signal_and_noise,
)

_output = output_maker(SchedulerOutput)


class DPMSolverSinglestepScheduler(Fused, diffusers.DPMSolverSinglestepScheduler):
    """``diffusers.DPMSolverSinglestepScheduler`` with a fused ``step``.

    A step of order 2 or 3 starts from the sample at the beginning of its cycle.
    """

    watched = ("sigmas", "timesteps")
    default_key = (1,)

    def build(self) -> Plan:
        config = self.config
        plus = config.algorithm_type.endswith("++")
        is_estimate = config.prediction_type == ("sample" if plus else "epsilon")
        return Plan(
            levels=None,
            order=config.solver_order,
            stochastic=config.algorithm_type.startswith("sde-"),
            first_three=config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range"),
            limited=bool(config.thresholding),
            keeps_output=is_estimate and not config.thresholding,
            has_outputs_dtype=is_estimate,
        )

    def planned_keys(self, plan):
        return [(order,) for order in range(1, plan.order + 1)]

    @quietly
    def make_rows(self, plan, order) -> Rows | None:
        """Order 1: (sample, output); else (sample, output, sample of the cycle's start, m_1, ..): next sample and the
        new estimate m_0; one row per step."""
        config = self.config
        algorithm, solver = config.algorithm_type, config.solver_type
        if plan.levels is None:
            plan.levels = signal_and_noise(self)
        sigmas, alpha, sigma, lam = plan.levels
        estimate = estimate_columns(algorithm, config.prediction_type, sigmas, alpha, sigma)
        if algorithm == "sde-dpmsolver" or (plan.limited and not algorithm.endswith("++")):
            return None
        # The level at which the cycle begins; before the first level: from the end, as in the peer.
        alpha_s, sigma_s, lam_s = (np.roll(v, order - 1)[:-1] for v in (alpha, sigma, lam))
        h = lam[1:] - lam_s
        terms = interval_terms(algorithm, alpha[1:], sigma[1:], alpha_s, sigma_s, h)
        if terms is None or estimate is None or (order > 1 and solver not in ("midpoint", "heun")):
            return None
        a, w, first, second, noise = terms
        if order == 1:
            weights = [w]
        elif order == 2:
            d1 = (0.5 * w if solver == "midpoint" else first) * (1.0 / ((lam[:-1] - lam_s) / h)).astype(np.float64)
            weights = [d1, w - d1]
        else:
            r0, r1 = (lam[:-1] - lam_s) / h, (np.roll(lam, 1)[:-1] - lam_s) / h
            inverse_r0, inverse_r1 = (1.0 / r0).astype(np.float64), (1.0 / r1).astype(np.float64)
            if solver == "midpoint":
                newest, middle = first * inverse_r0, np.zeros_like(w)
            else:
                r0, r1 = r0.astype(np.float64), r1.astype(np.float64)
                newest = (2 * second - first * r1) / (r0 - r1) * inverse_r0
                middle = (first * r0 - 2 * second) / (r0 - r1) * inverse_r1
            weights = [newest, middle, w - newest - middle]
        new, *past = weights
        k, m = estimate
        none, one = np.zeros_like(a), np.ones_like(a)
        own = [a, none] if order == 1 else [none, none, a]
        if plan.limited:
            return rows(side_by_side(*own, *past), x0=new, to_x0=side_by_side(k, m), second_x0=one, noise=noise)
        own[0], own[1] = own[0] + new * k, own[1] + new * m
        kept = None
        if not plan.keeps_output:
            kept = side_by_side(k, m, *[none] * (len(own) + len(past) - 2))
        return rows(side_by_side(*own, *past), second=kept, noise=noise)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> SchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise of the SDE solver in the kernel, in place of ``generator``."""
        plan = self.current_plan()
        seed = check_seed(self, generator, seed) if plan.stochastic else None
        result = NotImplemented
        past = self.model_outputs
        if self.num_inference_steps is not None and len(past) == plan.order:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
            order = self.order_list[row] if 0 <= row < len(self.order_list) else 0
            while order > 1 and past[1 - order] is None:
                order -= 1
            if order > 0:
                result = self._advance(plan, row, order, model_output, sample, past, generator, seed)
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        return _output(result) if return_dict else (result,)

    def _advance(self, plan, row, order, model_output, sample, past, generator, seed):
        """The next sample, or NotImplemented and nothing done."""
        if not (isinstance(model_output, torch.Tensor) and isinstance(sample, torch.Tensor)):
            return NotImplemented
        output = model_output[:, :3] if plan.first_three else model_output
        dtype = output.dtype if plan.has_outputs_dtype else promoted(sample, output)
        rest = () if order == 1 else (self.sample, *past[:-order:-1])
        if any(t is None for t in rest):
            return NotImplemented

        def draw():
            return peer.randn_tensor(output.shape, generator=generator, device=output.device, dtype=dtype)

        result = fused(
            (sample, output, *rest),
            plan.rows((order,), self.make_rows),
            row,
            torch.promote_types(promoted(*rest) if rest else sample.dtype, dtype),
            dtype,
            threshold=plan.threshold if plan.limited else None,
            draw=draw if plan.stochastic else None,
            seed=seed,
        )
        if result is NotImplemented:
            return result
        result, estimate = (result, output) if plan.keeps_output else result
        for i in range(plan.order - 1):
            past[i] = past[i + 1]
        past[-1] = estimate
        if order == 1:
            self.sample = sample
        self._step_index = row + 1
        return result
