"""UniPCMultistepScheduler: predictor and corrector of one order (Zhao et al. 2023, arXiv:2302.04867)."""

from __future__ import annotations

from typing import NamedTuple

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import Fused, Plan, Rows, columns, fused, levels, output_maker, rows
from genfast.step_table import MAX_INPUTS

__all__ = ["UniPCMultistepScheduler"]

_output = output_maker(SchedulerOutput)


class Move(NamedTuple):
    """Weights, float64 [rows], of a move: of the state it starts from, of estimates, newest first, and of noise."""

    state: torch.Tensor
    estimates: list[torch.Tensor]
    noise: torch.Tensor | None = None


def combined(kind: str, estimate, corrector: Move | None, predictor: Move | None, limited, keeps_output) -> Rows:
    """Rows of a predictor-corrector step; estimates (of x0, or of eps) are m = k sample + m output, newest first.

    Kinds: ``"plain"``, (sample, output, m_1, ..) -> prediction and m; ``"correct"``, (sample, output, last, m_1, ..)
    -> corrected sample and m; ``"predict"``, (corrected sample, m, m_1, ..) -> prediction; ``"both"``, (sample, output,
    last, m_1, ..) -> prediction and corrected sample, where m is the output. A corrector with noise takes the noise of
    the step before as one more input after the last sample.

    Args:
        estimate: (k, m), float64 [rows].
        corrector, predictor: None where a kind has none.
        limited: whether m is thresholded.
        keeps_output: whether m is the output, and need not be written.
    """
    k, m = estimate
    zero, one = torch.zeros_like(k), torch.ones_like(k)
    corrected = corrector or Move(one, [zero])
    state, estimates, old_noise, noise = corrected.state, list(corrected.estimates), corrected.noise, None
    if predictor is not None:
        state, estimates = predictor.state * state, [predictor.state * w for w in estimates]
        estimates += [zero] * (len(predictor.estimates) - len(estimates))
        for j, weight in enumerate(predictor.estimates):
            estimates[j] = estimates[j] + weight
        old_noise = None if old_noise is None else predictor.state * old_noise
        noise = predictor.noise if predictor.noise is not None and predictor.noise.any() else None
    new, *past = estimates
    if kind == "predict":
        return rows(columns(state, new, *past), noise=noise)
    noises = [] if old_noise is None else [old_noise]
    if kind == "both":
        older = corrected.estimates[1:]
        second = [
            zero,
            corrected.estimates[0],
            corrected.state,
            *([] if old_noise is None else [corrected.noise]),
            *older,
        ]
        second += [zero] * (len(past) - len(older))
        return rows(columns(zero, new, state, *noises, *past), second=columns(*second), noise=noise)
    own = [zero, zero, state, *noises] if kind == "correct" else [state, zero]
    if limited:
        return rows(columns(*own, *past), x0=new, to_x0=columns(k, m), second_x0=one, noise=noise)
    own[0], own[1] = own[0] + new * k, own[1] + new * m
    if keeps_output:
        return rows(columns(*own, *past), noise=noise)
    rest = [zero] * (len(own) + len(past) - 2)
    return rows(columns(*own, *past), second=columns(k, m, *rest), noise=noise)


class Interval(NamedTuple):
    """The moves of predictor and corrector over every interval between levels; the corrector's newest estimate is the
    one at the interval's end."""

    predictor: Move
    corrector: Move


class UniPCMultistepScheduler(Fused, diffusers.UniPCMultistepScheduler):
    """``diffusers.UniPCMultistepScheduler`` with a fused ``step``.

    A step without corrector is one kernel, and so is one whose model predicts what the solver keeps; the others are
    two: one writes the corrected sample and the data estimate, the other predicts. With a ``solver_p``, and for samples
    and outputs of different dtypes, the step is the peer's own code.
    """

    watched = ("sigmas", "predict_x0")
    default_key = ("plain", 0, 1)

    def build(self) -> Plan:
        config = self.config
        alpha, sigma, lam = self._alpha_sigma_lambda()
        limited = bool(config.thresholding and self.predict_x0)
        return Plan(
            order=config.solver_order,
            lower_order_final=config.lower_order_final,
            limited=limited,
            keeps_output=config.prediction_type == ("sample" if self.predict_x0 else "epsilon") and not limited,
            levels=(alpha, sigma, lam),
            estimate=self._estimate(alpha, sigma),
            intervals={},
        )

    def planned_keys(self, plan: Plan) -> list[tuple]:
        orders = range(1, plan.order + 1)
        keys = [("plain", 0, p) for p in (orders if self.disable_corrector else (1,))]
        if plan.keeps_output:
            return keys + [("both", c, p) for c in orders for p in orders if abs(c - p) <= 1]
        return keys + [("correct", c, 0) for c in orders] + [("predict", 0, p) for p in orders]

    def make_rows(self, plan, kind, corrector, predictor) -> Rows | None:
        """One row per step for a kind of :func:`combined` and these orders, 0 for a part that it has not."""
        estimate = plan.estimate
        config = self.config
        if estimate is None or config.solver_type not in ("bh1", "bh2") or config.solver_order + 3 > MAX_INPUTS:
            return None
        behind = ahead = None
        if corrector:
            state, estimates, _ = self._interval(plan, corrector).corrector
            behind = Move(shifted(state), [shifted(w) for w in estimates])
        if predictor:
            ahead = self._interval(plan, predictor).predictor
        return combined(kind, estimate, behind, ahead, plan.limited, plan.keeps_output)

    def _alpha_sigma_lambda(self):
        sigmas = levels(self.sigmas)
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def _estimate(self, alpha, sigma):
        """(k, m), float64 [steps]: the estimate that the solver keeps is k sample + m output; None if there is none."""
        alpha, sigma = alpha[:-1].double(), sigma[:-1].double()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        prediction = self.config.prediction_type
        if self.predict_x0:
            made = {
                "epsilon": (1 / alpha, -sigma / alpha),
                "sample": (zero, one),
                "v_prediction": (alpha, -sigma),
                "flow_prediction": (one, -levels(self.sigmas)[:-1].double()),
            }
        else:
            made = {
                "epsilon": (zero, one),
                "sample": (1 / sigma, -alpha / sigma),
                "v_prediction": (sigma, alpha),
            }
        return made.get(prediction)

    def _interval(self, plan: Plan, order: int) -> Interval:
        """The weights of every interval i, from level i to level i + 1, in the peer's float32 arithmetic."""
        if order in plan.intervals:
            return plan.intervals[order]
        alpha, sigma, lam = plan.levels
        count = len(lam) - 1
        at = torch.arange(count)
        h = lam[1:] - lam[:-1]
        ratios = []
        for k in range(1, order):
            earlier = at - k  # a negative position counts from the end, as it does in the peer
            ratio = (lam[earlier % len(lam)] - lam[:-1]) / h
            ratios.append(torch.where(earlier >= -len(lam), ratio, float("nan")))
        stacked = torch.stack([*ratios, torch.ones_like(h)], 1)
        hh = -h if self.predict_x0 else h
        h_phi_1 = torch.expm1(hh)
        b_h = hh if self.config.solver_type == "bh1" else h_phi_1
        h_phi_k, factorial = h_phi_1 / hh - 1, 1
        matrix, right = [], []
        for k in range(1, order + 1):
            matrix.append(torch.pow(stacked, k - 1))
            right.append(h_phi_k * factorial / b_h)
            factorial *= k + 1
            h_phi_k = h_phi_k / hh - 1 / factorial
        matrix, right = torch.stack(matrix, 1), torch.stack(right, 1)
        half = torch.full((count, 1), 0.5)
        predict = half[:, : order - 1] if order <= 2 else _solve(matrix[:, :-1, :-1], right[:, :-1])
        correct = half if order == 1 else _solve(matrix, right)
        if self.predict_x0:
            state, weight = sigma[1:] / sigma[:-1], alpha[1:]
        else:
            state, weight = alpha[1:] / alpha[:-1], sigma[1:]
        base, scale = -(weight * h_phi_1).double(), -(weight * b_h).double()

        def spread(rho):
            shares = [scale * rho[:, j].double() / ratios[j].double() for j in range(order - 1)]
            # Order 1 adds scale times 0, which is not 0 where the scale is infinite.
            return [base - sum(shares, 0 * scale), *shares]

        following = scale * correct[:, -1].double()
        newest, *older = spread(correct)
        state = state.double()
        made = Interval(Move(state, spread(predict)), Move(state, [following, newest - following, *older]))
        plan.intervals[order] = made
        return made

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """The peer's step."""
        if self.num_inference_steps is None or self.solver_p:
            return super().step(model_output, timestep, sample, return_dict)
        if self._step_index is None:
            self._init_step_index(timestep)
        row = self._step_index
        plan = self.current_plan()
        past = self.model_outputs
        last = self.last_sample
        most = self.lower_order_nums + 1
        if most > plan.order:
            most = plan.order
        if plan.lower_order_final and most > len(self.timesteps) - row:
            most = len(self.timesteps) - row
        made = NotImplemented
        if len(past) == plan.order and most > 0 and alike(plan, model_output, sample):
            if last is None or row < 1 or row - 1 in self.disable_corrector:
                made = self._predict(plan, row, most, model_output, sample, past)
            else:
                made = self._correct_and_predict(plan, row, most, model_output, sample, past, last)
        if made is NotImplemented:
            return super().step(model_output, timestep, sample, return_dict)
        previous, estimate, corrected = made
        timesteps = self.timestep_list
        for i in range(plan.order - 1):
            past[i] = past[i + 1]
            timesteps[i] = timesteps[i + 1]
        past[-1] = estimate
        timesteps[-1] = timestep
        self.this_order = most
        self.last_sample = corrected
        if self.lower_order_nums < plan.order:
            self.lower_order_nums += 1
        self._step_index = row + 1
        return _output(previous) if return_dict else (previous,)

    def _predict(self, plan, row, order, model_output, sample, past):
        """(prediction, estimate, state it starts from), or NotImplemented."""
        history = past[:-order:-1]
        dtype = sample.dtype
        if not alike(plan, sample, *history):
            return NotImplemented
        table = plan.rows(("plain", 0, order), self.make_rows)
        made = fused(
            (sample, model_output, *history), table, row, dtype, threshold=plan.threshold if plan.limited else None
        )
        if made is NotImplemented:
            return made
        return (made, model_output, sample) if plan.keeps_output else (*made, sample)

    def _correct_and_predict(self, plan, row, order, model_output, sample, past, last):
        """(prediction, estimate, corrected sample), or NotImplemented."""
        before = self.__dict__.get("this_order", 0)
        if not 0 < before <= plan.order:
            return NotImplemented
        history = past[: -before - 1 : -1]
        dtype = sample.dtype
        if not alike(plan, sample, last, *past[: -max(before + 1, order) : -1]):
            return NotImplemented
        if plan.keeps_output:
            history += past[-before - 1 : -order : -1]  # what the predictor looks back on and the corrector does not
            table = plan.rows(("both", before, order), self.make_rows)
            made = fused((sample, model_output, last, *history), table, row, dtype)
            return made if made is NotImplemented else (made[0], model_output, made[1])
        table = plan.rows(("correct", before, 0), self.make_rows)
        threshold = plan.threshold if plan.limited else None
        made = fused((sample, model_output, last, *history), table, row, dtype, threshold=threshold)
        if made is NotImplemented:
            return made
        corrected, estimate = made
        table = plan.rows(("predict", 0, order), self.make_rows)
        previous = fused((corrected, estimate, *past[:-order:-1]), table, row, dtype)
        return previous if previous is NotImplemented else (previous, estimate, corrected)


def alike(plan: Plan, first, *others) -> bool:
    """Whether these are tensors of one dtype, of the two dimensions (three for thresholding) that the peer needs."""
    if not isinstance(first, torch.Tensor) or first.dim() < (3 if plan.limited else 2):
        return False
    dtype = first.dtype
    return all([isinstance(t, torch.Tensor) and t.dtype is dtype for t in others])  # noqa: C419 (faster)


def shifted(weights: torch.Tensor) -> torch.Tensor:
    """Those of the interval that ends where a step begins; there is none before the first step."""
    return torch.cat([weights.new_full((1,), float("nan")), weights[:-1]])


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solutions of a batch of systems, NaN where a matrix is singular (the peer raises there)."""
    solution, info = torch.linalg.solve_ex(matrix, right)
    return torch.where(info[:, None] == 0, solution, float("nan"))
