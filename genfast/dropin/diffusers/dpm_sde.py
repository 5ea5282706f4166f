"""DPMSolverSDEScheduler: a second-order SDE step through a midpoint, with Brownian noise (k-diffusion's DPM++ SDE)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_dpmsolver_sde as peer
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDESchedulerOutput

from genfast.dropin.diffusers.base import Fused, Plan, Rows, columns, fused, levels, output_maker, plain, promoted, rows

__all__ = ["DPMSolverSDEScheduler"]

_output = output_maker(DPMSolverSDESchedulerOutput)


class DPMSolverSDEScheduler(Fused, diffusers.DPMSolverSDEScheduler):
    """``diffusers.DPMSolverSDEScheduler`` with a fused ``step``.

    The noise is the peer's: a Brownian tree of torchsde, whose values at the midpoint and at the end belong to one
    path, so ``step`` has no ``seed``; a ``noise_seed`` (see :class:`Fused`) becomes the seed of the tree.
    """

    default_key = (False, 1.0)

    def build(self) -> Plan:
        sigmas = levels(self.sigmas)
        parts = [self._levels(second) for second in (False, True)]
        return Plan(
            sigmas=sigmas.tolist(),
            scale=((sigmas**2 + 1) ** 0.5).tolist(),
            mid_scale=((parts[0][2] ** 2 + 1) ** 0.5).tolist(),
            # Where the path is read, as 0-d tensors on the host: one bit off, and the noise would differ.
            starts=[part[1].unbind() for part in parts],
            ends=[part[2].unbind() for part in parts],
        )

    def _levels(self, second: bool):
        """(sigma and the next one, where the noise starts and ends, the model's sigma), float32 of every step."""
        sigmas = levels(self.sigmas)
        sigma, after = sigmas[:-1], sigmas[1:]
        if second:
            sigma, after = torch.cat([sigmas[-1:], sigmas[:-2]]), sigmas[:-1]
        t, t_next = sigma.log().neg(), after.log().neg()
        middle = t + (t_next - t) * 0.5
        mid_sigma = middle.neg().exp()
        end = t_next.neg().exp() if second else mid_sigma
        return (sigma, after), t.neg().exp(), end, mid_sigma if second else sigma

    def planned_keys(self, plan: Plan) -> list[tuple]:
        return [(False, 1.0), (True, 1.0)]

    def make_rows(self, plan, second, s_noise) -> Rows | None:
        """One row per step, as a first evaluation or as the one at the midpoint.

        First: (sample, output) -> next sample and x0. Second: (sample, output, sample of the first) -> the same.
        """
        (sigma, after), start, end, model_sigma = self._levels(second)
        prediction = self.config.prediction_type
        if prediction == "epsilon":  # x0 = k x + m output
            k, m = torch.ones_like(sigma), -model_sigma
        elif prediction == "v_prediction":
            k, m = 1 / (model_sigma**2 + 1).double(), -model_sigma / (model_sigma**2 + 1) ** 0.5
        else:
            return None
        k, m = k.double(), m.double()
        up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
        up = torch.where(up < end, up, end)
        t, down = sigma.log().neg(), (end**2 - up**2) ** 0.5
        ancestral = down.log().neg()
        last = after == 0
        slope = (after - sigma).double() / sigma.double()
        state = torch.where(last, 1 + slope, (ancestral.neg().exp() / start).double())
        x0 = torch.where(last, -slope, -(t - ancestral).expm1().double())
        noise = torch.where(last, 0.0, s_noise * up.double())
        if not second:
            return rows(columns(state + x0 * k, x0 * m), second=columns(k, m), noise=noise, draws=~last)
        zero = torch.zeros_like(k)
        own, first = torch.where(last, state, 0.0), torch.where(last, 0.0, state)
        return rows(columns(own + x0 * k, x0 * m, first), second=columns(k, m, zero), noise=noise, draws=~last)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        if self._step_index is None:
            self._init_step_index(timestep)
        plan, row = self.current_plan(), self._step_index
        if self.sample is None:
            return sample / plan.scale[row]
        if row > 0 and self.mid_point_sigma is plan.ends[0][row - 1]:
            return sample / plan.mid_scale[row - 1]
        return super().scale_model_input(sample, timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> DPMSolverSDESchedulerOutput | tuple:
        """The peer's step."""
        if self._step_index is None:
            self._init_step_index(timestep)
        if self.noise_sampler is None:
            self._start_path(sample)
        result = NotImplemented
        plan, row, start = self.current_plan(), self._step_index, self.sample
        second = start is not None
        table = plan.rows((second, s_noise), self.make_rows)
        inputs = (sample, model_output, start) if second else (sample, model_output)
        if table is not None and 0 <= row < len(table.usable) and table.usable[row] and plain(*inputs):
            noisy = table.draws[row]
            now = dtype = promoted(sample, model_output)
            noise = None
            if noisy:
                noise = self.noise_sampler(plan.starts[second][row], plan.ends[second][row])
                dtype = promoted(start if second else sample, model_output, sample, noise)
            result = fused(inputs, table, row, dtype, second_dtype=now, draw=None if noise is None else lambda: noise)
        if result is NotImplemented:
            return super().step(model_output, timestep, sample, return_dict, s_noise)
        if noisy:
            self.sample, self.mid_point_sigma = (None, None) if second else (sample, plan.ends[0][row])
        self._step_index = row + 1
        return _output(*result) if return_dict else result

    def _start_path(self, sample) -> None:
        """The peer's Brownian tree, from the seed of in-kernel noise if there is one."""
        seed = self.noise_sampler_seed
        if self.noise_seed is not None:
            seed = self.noise_seed.tolist() if isinstance(self.noise_seed, torch.Tensor) else self.noise_seed
        sigmas = self.current_plan().sigmas
        low = min(value for value in sigmas if value > 0)
        self.noise_sampler = peer.BrownianTreeNoiseSampler(sample, low, max(sigmas), seed)
