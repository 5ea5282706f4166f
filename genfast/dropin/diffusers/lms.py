"""LMSDiscreteScheduler: Adams-Bashforth steps in sigma of orders up to seven, the peer's default being four."""

from __future__ import annotations

import warnings

import diffusers
import torch
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput

from genfast.dropin.adams import adams_weights
from genfast.dropin.diffusers.base import Fused, Plan, Rows, columns, fused, levels, output_maker, promoted, rows
from genfast.step_table import MAX_INPUTS

__all__ = ["LMSDiscreteScheduler"]

_output = output_maker(LMSDiscreteSchedulerOutput)


class LMSDiscreteScheduler(Fused, diffusers.LMSDiscreteScheduler):
    """``diffusers.LMSDiscreteScheduler`` with a fused ``step``.

    The peer integrates its polynomials numerically in every step (``scipy.integrate.quad``, four times); here the
    integrals of the whole schedule come from one exact rule, when the schedule is made. A step is one kernel for the
    two outputs and one for the derivative, a tensor of its own, or a single kernel if the model predicts the sample.
    """

    default_key = (4, 1)

    def build(self) -> Plan:
        sigmas = levels(self.sigmas)
        return Plan(
            scale=((sigmas**2 + 1) ** 0.5).tolist(),
            x0_is_output=self.config.prediction_type == "sample",
            weights={},
        )

    def planned_keys(self, plan: Plan) -> list[tuple]:
        return [(4, count) for count in range(1, 5)] + [(None, 0)]

    def make_rows(self, plan, order, count) -> Rows | None:
        """Rows, one per step: (sample, output, count - 1 older derivatives) -> next sample, and x0 or the derivative.

        With ``order`` None: (sample, output) -> the derivative.
        """
        sigma = levels(self.sigmas)[:-1]
        prediction = self.config.prediction_type
        if prediction == "epsilon":  # x0 = k x + m output
            k, m = torch.ones_like(sigma), -sigma
        elif prediction == "v_prediction":
            k, m = 1 / (sigma**2 + 1).double(), -sigma / (sigma**2 + 1) ** 0.5
        elif prediction == "sample":
            k, m = torch.zeros_like(sigma), torch.ones_like(sigma)
        else:
            return None
        k, m = k.double(), m.double()
        a, b = (1 - k) / sigma.double(), -m / sigma.double()  # of the derivative
        if order is None:
            return rows(columns(a, b))
        if order not in plan.weights:
            plan.weights[order] = adams_weights(levels(self.sigmas).double().numpy(), order)
        weights = torch.from_numpy(plan.weights[order][:, :count])
        newest, older = weights[:, 0], list(weights[:, 1:].T)
        nothing = [torch.zeros_like(k)] * len(older)
        second = (a, b) if plan.x0_is_output else (k, m)
        return rows(columns(1 + newest * a, newest * b, *older), second=columns(*second, *nothing))

    def scale_model_input(self, sample, timestep):
        if self._step_index is None:
            self._init_step_index(timestep)
        scaled = sample / self.current_plan().scale[self._step_index]
        self.is_scale_input_called = True
        return scaled

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple:
        """The peer's step."""
        if type(order) is not int or not 1 <= order <= MAX_INPUTS - 1:
            return super().step(model_output, timestep, sample, order, return_dict)
        if not self.is_scale_input_called:
            warnings.warn(
                "scale_model_input was not called before step: the model saw a sample of the wrong scale", stacklevel=2
            )
        if self._step_index is None:
            self._init_step_index(timestep)
        plan = self.current_plan()
        row = self._step_index
        derivatives = self.derivatives
        # What the peer has after it has appended the new one and dropped one that is too old.
        kept = derivatives[1:] if len(derivatives) >= order else derivatives
        count = min(row + 1, order, len(kept) + 1)
        result = NotImplemented
        if isinstance(model_output, torch.Tensor) and isinstance(sample, torch.Tensor):
            result = self._fused(plan, row, order, count, model_output, sample, kept)
        if result is NotImplemented:
            with warnings.catch_warnings():
                if not self.is_scale_input_called:
                    warnings.filterwarnings("ignore", ".*scale_model_input")  # it has been said
                return super().step(model_output, timestep, sample, order, return_dict)
        previous, x0, derivative = result
        derivatives.append(derivative)
        if len(derivatives) > order:
            derivatives.pop(0)
        self._step_index = row + 1
        return _output(previous, x0) if return_dict else (previous, x0)

    def _fused(self, plan, row, order, count, model_output, sample, kept):
        """(next sample, x0, derivative), or NotImplemented."""
        older = kept[:-count:-1] if count > 1 else []
        now = promoted(sample, model_output)
        dtype = promoted(sample, model_output, *older)
        made = fused(
            (sample, model_output, *older), plan.rows((order, count), self.make_rows), row, dtype, second_dtype=now
        )
        if made is NotImplemented:
            return made
        if plan.x0_is_output:
            return made[0], model_output, made[1]
        derivative = fused((sample, model_output), plan.rows((None, 0), self.make_rows), row, now)
        return derivative if derivative is NotImplemented else (*made, derivative)
