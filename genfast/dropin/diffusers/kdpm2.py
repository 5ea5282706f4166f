"""KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler: DPM-Solver-2 in sigma, two calls a step (k-diffusion;
Karras et al. 2022, Algorithm 2)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_k_dpm_2_ancestral_discrete as ancestral_peer
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

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
    plain_object,
    promoted,
    rows,
)

FIRST, SECOND = ("first",), ("second",)


def half_rows(config, first: bool, own, origin, to, noise=None) -> Rows | None:
    """``first``: x + (to - own) (x - x0) / own of (x, output); second: s + (to - origin) (x - x0) / own of (x, output,
    s). ``own`` is the level of the model's output, ``origin`` that of the step's beginning."""
    if config.prediction_type == "epsilon":  # x0 = k x + m output
        k, m = torch.ones_like(own).double(), -own.double()
    elif config.prediction_type == "v_prediction":
        k, m = 1 / (own**2 + 1).double(), (-own / (own**2 + 1) ** 0.5).double()
    else:
        return None
    ratio = (to - origin).double() / own.double()
    one, zero = torch.ones_like(k), torch.zeros_like(k)
    if first:
        return rows(columns(1 + ratio * (1 - k), -ratio * m), second=columns(k, m))
    return rows(columns(ratio * (1 - k), -ratio * m, one), second=columns(k, m, zero), noise=noise)


class _FusedKDPM2(Fused):
    default_key = FIRST

    def planned_keys(self, plan):
        return FIRST, SECOND

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The sample over sqrt(sigma^2 + 1), with the level between two steps for the second call of a pair."""
        if self._step_index is None:
            self._init_step_index(timestep)
        plan = self.current_plan()
        scale = plan.scale if self.sample is None else plan.scale_between
        return sample / scale[self._step_index]

    def _fused(self, model_output, timestep, sample, return_dict, draw=None, seed=None):
        """The output of the step, or NotImplemented."""
        if self._step_index is None:
            self._init_step_index(timestep)
        row = self._step_index
        plan = self.current_plan()
        result = NotImplemented
        origin = self.sample
        if origin is None:
            if return_dict:
                result = plain_object(self._output, plan, row, sample, model_output)
            inputs, key, draw = (sample, model_output), FIRST, None
        else:
            inputs, key = (sample, model_output, origin), SECOND
        if result is NotImplemented:
            if not all(isinstance(t, Tensor) for t in inputs):
                return result
            made = plan.rows(key, self.make_rows)
            result = fused(inputs, made, row, promoted(*inputs), promoted(sample, model_output), draw=draw, seed=seed)
            if result is NotImplemented:
                return result
            if return_dict:
                result = self._output(*result)
        self._first_half(plan, row, sample) if origin is None else self._second_half()
        self._step_index = row + 1
        return result

    def _first_half(self, plan, row, sample):
        self.sample = sample

    def _second_half(self):
        self.sample = None


class KDPM2DiscreteScheduler(_FusedKDPM2, diffusers.KDPM2DiscreteScheduler):
    """``diffusers.KDPM2DiscreteScheduler`` with a fused ``step``."""

    watched = ("sigmas", "sigmas_interpol")
    _output = staticmethod(output_maker(KDPM2DiscreteSchedulerOutput))

    def build(self) -> Plan:
        return Plan(
            scale=((levels(self.sigmas) ** 2 + 1) ** 0.5).tolist(),
            scale_between=((levels(self.sigmas_interpol) ** 2 + 1) ** 0.5).tolist(),
        )

    def make_rows(self, plan, half) -> Rows | None:
        """One row per call of ``step``."""
        sigmas, between = levels(self.sigmas), levels(self.sigmas_interpol)
        if half == "first":
            return half_rows(self.config, True, sigmas[:-1], sigmas[:-1], between[1:])
        origin = torch.cat([sigmas.new_full((1,), float("nan")), sigmas[:-1]])
        return half_rows(self.config, False, between, origin, sigmas)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> KDPM2DiscreteSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """The peer's step: the first call of a pair goes half the way."""
        result = self._fused(model_output, timestep, sample, return_dict)
        if result is NotImplemented:
            return super().step(model_output, timestep, sample, return_dict)
        return result


class KDPM2AncestralDiscreteScheduler(_FusedKDPM2, diffusers.KDPM2AncestralDiscreteScheduler):
    """``diffusers.KDPM2AncestralDiscreteScheduler`` with a fused ``step``."""

    watched = ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down")
    _output = staticmethod(output_maker(KDPM2AncestralDiscreteSchedulerOutput))

    def build(self) -> Plan:
        sigmas, between = levels(self.sigmas), levels(self.sigmas_interpol)
        scale_between = ((between**2 + 1) ** 0.5).tolist()
        return Plan(
            scale=((sigmas**2 + 1) ** 0.5).tolist(),
            scale_between=[scale_between[-1], *scale_between[:-1]],
            differences=between - sigmas,
        )

    def make_rows(self, plan, half) -> Rows | None:
        """One row per call of ``step``; noise at every second one."""
        sigmas, between = levels(self.sigmas), levels(self.sigmas_interpol)
        if half == "first":
            return half_rows(self.config, True, sigmas, sigmas, between)
        up, down = levels(self.sigmas_up), levels(self.sigmas_down)
        sigmas, between, up, down = (v.roll(1) for v in (sigmas, between, up, down))
        return half_rows(self.config, False, between, sigmas, down, noise=up)

    def _first_half(self, plan, row, sample):
        self.sample, self.dt = sample, plan.dt[row]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> KDPM2AncestralDiscreteSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """The peer's step: the first call of a pair goes half the way; ``seed`` draws the noise of the second inside
        the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)

        def draw():
            return ancestral_peer.randn_tensor(
                model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator
            )

        result = self._fused(model_output, timestep, sample, return_dict, draw, seed)
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        return result
