"""TCDScheduler: trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_tcd as peer
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    HostTimesteps,
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
    x0_eps_columns,
)

_output = output_maker(TCDSchedulerOutput)


class TCDScheduler(Fused, diffusers.TCDScheduler):
    """``diffusers.TCDScheduler`` with a fused ``step``; the second output is ``pred_noised_sample``."""

    watched = ("alphas_cumprod", "final_alpha_cumprod", "timesteps")
    default_key = (0.3,)

    def build(self) -> Plan:
        return Plan(values=HostTimesteps.of(self).values)

    def make_rows(self, plan, eta) -> Rows | None:
        """y = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps with s = (1 - eta) t'; x' = sqrt(r) y + sqrt(1 - r) z with
        r = abar' / abar_s, one row per step of the schedule; the last is y. (The peer clips nothing.)"""
        table = levels(self.alphas_cumprod)
        prediction = self.config.prediction_type
        t = torch.tensor(plan.values, dtype=torch.int64)
        before = torch.cat([t[1:], torch.zeros(1, dtype=torch.int64)])
        s = torch.floor((1 - eta) * before).to(torch.int64)
        alpha_bar, alpha_s = table[t], table[s]
        after = torch.where(before >= 0, table[before.clamp(min=0)], levels(self.final_alpha_cumprod))
        root = torch.sqrt if prediction == "epsilon" else lambda v: v**0.5
        made = x0_eps_columns(prediction, alpha_bar, root)
        if made is None:
            return None
        k, m, e, f = made
        to_x0, to_eps = alpha_s.sqrt().double(), (1 - alpha_s).sqrt().double()
        a, b = to_x0 * k + to_eps * e, to_x0 * m + to_eps * f
        if not eta > 0:
            return rows(columns(a, b), second=columns(a, b))
        last = torch.arange(len(t)) == self.num_inference_steps - 1
        keep = torch.where(last, 1.0, (after / alpha_s).sqrt()).double()
        noise = torch.where(last, 0.0, (1 - after / alpha_s).sqrt())
        return rows(columns(keep * a, keep * b), second=columns(a, b), noise=noise, draws=~last)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.3,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> TCDSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """The peer's step; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        result = NotImplemented
        if self.num_inference_steps is not None and 0 <= eta <= 1:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
            plan = self.current_plan()
            if 0 <= row < len(plan.values) and self.host_timestep(timestep) == plan.values[row]:
                dtype = promoted(sample, model_output)

                def draw():
                    return peer.randn_tensor(
                        model_output.shape, generator=generator, device=model_output.device, dtype=dtype
                    )

                result = fused(
                    (sample, model_output),
                    plan.rows((eta,), self.make_rows),
                    row,
                    dtype,
                    draw=draw if eta > 0 else None,
                    seed=seed,
                )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        self._step_index = row + 1
        return _output(*result) if return_dict else result
