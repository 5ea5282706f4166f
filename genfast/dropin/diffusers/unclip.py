"""UnCLIPScheduler: the DDPM step of unCLIP (Ramesh et al. 2022, arXiv:2204.06125), with any previous timestep."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import torch
from diffusers.schedulers import scheduling_unclip as peer
from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput

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

_output = output_maker(UnCLIPSchedulerOutput)


class UnCLIPScheduler(Fused, diffusers.UnCLIPScheduler):
    """``diffusers.UnCLIPScheduler`` with a fused ``step``, learned variances included."""

    watched = ("alphas_cumprod", "alphas", "betas", "timesteps", "variance_type")

    def build(self) -> Plan:
        """``row_of[t, previous]``: steps along the schedule; a step from t to t - 1 has row t."""
        values = HostTimesteps.of(self).values
        start = len(self.alphas_cumprod)
        return Plan(
            row_of={pair: start + i for i, pair in enumerate(pairwise(values))},
            x0_is_output=self.config.prediction_type == "sample",
        )

    def make_rows(self, plan) -> Rows | None:
        """x' = sqrt(abar') beta / (1 - abar) x0 + sqrt(alpha) (1 - abar') / (1 - abar) x + s z."""
        kind = self.variance_type
        if kind != self.config.variance_type or kind not in ("fixed_small_log", "learned_range"):
            return None
        if self.config.prediction_type not in ("epsilon", "sample"):
            return None
        table = levels(self.alphas_cumprod)
        t = torch.arange(len(table))
        jumps = torch.tensor(list(plan.row_of), dtype=torch.int64).reshape(-1, 2)
        t, before = torch.cat([t, jumps[:, 0]]), torch.cat([t - 1, jumps[:, 1]])
        alpha_bar, after = table[t], torch.where(before >= 0, table[before], 1.0)
        by_one = before == t - 1
        beta = torch.where(by_one, levels(self.betas)[t], 1 - alpha_bar / after)
        alpha = torch.where(by_one, levels(self.alphas)[t], 1 - beta)
        k, m, _, _ = x0_eps_columns(self.config.prediction_type, alpha_bar)
        to_x0 = (after**0.5 * beta / (1 - alpha_bar)).double()
        to_x = (alpha**0.5 * (1 - after) / (1 - alpha_bar)).double()

        draws = t > 0
        variance = (1 - after) / (1 - alpha_bar) * beta
        if kind == "fixed_small_log":
            std = torch.exp(0.5 * torch.log(torch.clamp(variance, min=1e-20)))
            noise = dict(noise=torch.where(draws, std, 0.0))
        else:
            low, high = variance.log().double(), beta.log().double()
            log_std = columns((low + high) / 4, (high - low) / 4)
            noise = dict(noise=draws.double(), log_std=torch.where(draws[:, None], log_std, 0.0))
        if plan.clip is None:
            direct = columns(to_x0 * k + to_x, to_x0 * m)
            return rows(direct, second=columns(k, m), draws=draws, **noise)
        return rows(
            columns(to_x, 0 * to_x),
            x0=to_x0,
            to_x0=columns(k, m),
            second_x0=torch.ones_like(k),
            draws=draws,
            **noise,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        prev_timestep: int | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> UnCLIPSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise inside the kernel, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        plan = self.current_plan()
        t, before = self.host_timestep(timestep), self.host_timestep(prev_timestep)
        row = t if before is None or before == t - 1 else plan.row_of.get((t, before))
        made = plan.rows((), self.make_rows)
        result = NotImplemented
        if type(row) is int and made is not None and (prev_timestep is None or before is not None):
            output, log_variance = model_output, None
            if made.table.has_log_std:
                if model_output.shape[1] == 2 * sample.shape[1]:
                    output, log_variance = torch.split(model_output, sample.shape[1], dim=1)
                else:
                    made = None  # the peer says what is wrong
            dtype = promoted(sample, model_output)

            def draw():
                return peer.randn_tensor(output.shape, dtype=output.dtype, generator=generator, device=output.device)

            result = fused(
                (sample, output),
                made,
                row,
                dtype,
                output.dtype if plan.x0_is_output else dtype,
                plan.clip,
                log_variance=log_variance,
                draw=draw,
                seed=seed,
            )
        if result is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, prev_timestep, generator, return_dict)
        return _output(*result) if return_dict else result
