"""PNDMScheduler: pseudo linear multistep steps, with or without a Runge-Kutta start (Liu et al. 2022, 2202.09778)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    columns,
    fused,
    levels,
    output_maker,
    promoted,
    rows,
)

__all__ = ["PNDMScheduler"]

_output = output_maker(SchedulerOutput)

WEIGHTS = {
    "first": (1.0,),
    "second": (1 / 2, 1 / 2),  # the mean of the new output and the one that the first prediction was made with
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Of the model's outputs, newest first, in one step of the multistep part."""


class PNDMScheduler(Fused, diffusers.PNDMScheduler):
    """``diffusers.PNDMScheduler`` with a fused ``step``, ``step_prk`` and ``step_plms``: one kernel each.

    As in the peer, what is extrapolated is the model's output as it is, also where the model predicts v.
    """

    watched = ("alphas_cumprod", "final_alpha_cumprod")
    default_key = ("first",)

    def build(self) -> Plan:
        calls = [] if self.prk_timesteps is None else self.prk_timesteps.tolist()
        return Plan(
            stride=self.config.num_train_timesteps // self.num_inference_steps if self.num_inference_steps else None,
            calls=[int(t) for t in calls],
            moves={},
        )

    def planned_keys(self, plan: Plan) -> list[tuple]:
        return [(kind,) for kind in ((*WEIGHTS,) if self.config.skip_prk_steps else ("start", "middle", "end", 4))]

    def make_rows(self, plan, kind) -> Rows | None:
        """One row per training timestep in the multistep part.

        In the Runge-Kutta part one row per call, in tables of three kinds: ``"start"``, (sample, output) -> next sample
        and the first share of the mean output; ``"middle"``, (first sample, output, mean so far) -> next sample and
        mean so far; ``"end"``, the same without the mean.
        """
        if plan.stride is None:
            return None
        part = "multistep" if kind in WEIGHTS else "start"
        if part not in plan.moves:
            if part == "multistep":
                at = torch.arange(len(self.alphas_cumprod))
                to = at - plan.stride
            else:
                given = torch.tensor(plan.calls)
                call = torch.arange(len(given))
                at, to = given[call // 4 * 4], given - torch.where(call % 2 == 1, 0, plan.stride // 2)
            plan.moves[part] = self._transfer(at, to)
        if plan.moves[part] is None:
            return None
        state, out = plan.moves[part]
        if part == "multistep":
            return rows(columns(state, *(w * out for w in WEIGHTS[kind])))
        zero, one = torch.zeros_like(out), torch.ones_like(out)
        if kind == "start":
            return rows(columns(state, out), second=columns(zero, one / 6))
        if kind == "middle":
            return rows(columns(state, out, zero), second=columns(zero, one / 3, one))
        return rows(columns(state, out / 6, out))

    def _transfer(self, at: torch.Tensor, to: torch.Tensor):
        """(a, b), float64, of x' = a x + b output from timestep ``at`` to ``to``, which may lie before the first."""
        alpha_bar, final = levels(self.alphas_cumprod), levels(self.final_alpha_cumprod)
        now, then = alpha_bar[at], torch.where(to >= 0, alpha_bar[to.clamp(min=0)], final)
        state = ((then / now) ** 0.5).double()
        divisor = now * (1 - then) ** 0.5 + (now * (1 - now) * then) ** 0.5
        out = -(then - now).double() / divisor.double()
        if self.config.prediction_type == "v_prediction":
            return state + out * ((1 - now) ** 0.5).double(), out * (now**0.5).double()
        return (state, out) if self.config.prediction_type == "epsilon" else None

    def step_prk(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """The peer's step of the Runge-Kutta part."""
        made = NotImplemented
        call = self.counter
        if self.num_inference_steps is not None:
            plan = self.current_plan()
            # The rows are those of the schedule, for calls in its order.
            if (
                0 <= call < len(plan.calls)
                and len(self.prk_timesteps) == len(plan.calls)
                and self.host_timestep(timestep) == plan.calls[call]
                and self.prk_timesteps[call // 4 * 4] == plan.calls[call // 4 * 4]
            ):
                made = self._runge_kutta(plan, call, model_output, sample)
        if made is NotImplemented:
            return super().step_prk(model_output, timestep, sample, return_dict)
        previous, self.cur_model_output = made
        if call % 4 == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        self.counter = call + 1
        return _output(previous) if return_dict else (previous,)

    def _runge_kutta(self, plan, call, model_output, sample):
        """(next sample, mean output so far), or NotImplemented."""
        mean = self.cur_model_output
        if call % 4 == 0:
            if isinstance(mean, torch.Tensor) or mean != 0 or not _tensors(sample, model_output):
                return NotImplemented
            table = plan.rows(("start",), self.make_rows)
            inputs, dtype = (sample, model_output), promoted(sample, model_output)
            return fused(inputs, table, call, dtype, second_dtype=model_output.dtype)
        start = sample if self.cur_sample is None else self.cur_sample
        if not _tensors(start, model_output, mean):
            return NotImplemented
        inputs = (start, model_output, mean)
        if call % 4 == 3:
            made = fused(inputs, plan.rows(("end",), self.make_rows), call, promoted(*inputs))
            return made if made is NotImplemented else (made, 0)
        table = plan.rows(("middle",), self.make_rows)
        return fused(inputs, table, call, promoted(start, model_output), second_dtype=mean.dtype)

    def step_plms(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """The peer's step of the multistep part."""
        made = NotImplemented
        row = self.host_timestep(timestep)
        call, past = self.counter, self.ets
        kept = past[-3:]
        if (
            type(row) is int
            and self.num_inference_steps is not None
            and (self.config.skip_prk_steps or len(past) >= 3)
            and isinstance(model_output, torch.Tensor)
        ):
            plan = self.current_plan()
            if call == 1:  # the first step again, with the mean of both outputs
                kind, row, start = ("second" if len(past) == 1 else None), row + plan.stride, self.cur_sample
            elif kept:
                kind, start = len(kept) + 1, sample
            else:
                kind, start = ("first" if call == 0 else None), sample
            inputs = (start, model_output, *kept[::-1])
            if kind is not None and _tensors(*inputs):
                made = fused(inputs, plan.rows((kind,), self.make_rows), row, promoted(*inputs))
        if made is NotImplemented:
            return super().step_plms(model_output, timestep, sample, return_dict)
        if call != 1:
            kept.append(model_output)
            self.ets = kept
        if kind == "first":
            self.cur_sample = sample
        elif kind == "second":
            self.cur_sample = None
        self.counter = call + 1
        return _output(made) if return_dict else (made,)


def _tensors(*values) -> bool:
    return all(isinstance(v, torch.Tensor) for v in values)
