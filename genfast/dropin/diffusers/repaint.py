"""RePaintScheduler: inpainting by DDPM with resampling jumps (Lugmayr et al. 2022, arXiv:2201.09865)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_repaint as peer
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput

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
    plain,
    promoted,
    rows,
    x0_eps_columns,
)

_output = output_maker(RePaintSchedulerOutput)


class RePaintScheduler(Fused, diffusers.RePaintScheduler):
    """``diffusers.RePaintScheduler`` with a fused ``step`` and ``undo_step``.

    Two kernels, one for the known part and one for the unknown part and x0, with the same noise, then one blend by the
    mask.
    """

    watched = ("alphas_cumprod", "final_alpha_cumprod", "betas", "eta")
    default_key = ("unknown",)

    def build(self) -> Plan:
        return Plan(range=(-1.0, 1.0) if self.config.clip_sample else None)

    def planned_keys(self, plan):
        return ("unknown",), ("known",)

    def make_rows(self, plan, part) -> Rows | None:
        """One row per training timestep: ``unknown``, a DDIM step of the sample; ``known``, the image with noise;
        ``undo``, a step of the forward process."""
        if part == "undo":
            beta = levels(self.betas)
            return rows(((1 - beta) ** 0.5)[:, None], noise=beta**0.5)
        alpha_bar = levels(self.alphas_cumprod)
        t = torch.arange(len(alpha_bar))
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        after = torch.where(before >= 0, alpha_bar[before], levels(self.final_alpha_cumprod))
        if part == "known":
            return rows((after**0.5)[:, None], noise=(1 - after) ** 0.5)
        k, m, _, _ = x0_eps_columns("epsilon", alpha_bar)
        std = self.eta * ((1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after)) ** 0.5
        direction, to = ((1 - after - std**2) ** 0.5).double(), (after**0.5).double()
        noise = torch.where(t > 0, std, 0.0) if self.eta > 0 else torch.zeros_like(std)
        if plan.range is None:
            return rows(columns(to * k, to * m + direction), second=columns(k, m), noise=noise)
        return rows(columns(0 * to, direction), x0=to, to_x0=columns(k, m), second_x0=torch.ones_like(k), noise=noise)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        original_image: torch.Tensor,
        mask: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> RePaintSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """The peer's step; ``seed`` draws the noise inside the kernels, in place of ``generator``."""
        seed = check_seed(self, generator, seed)
        row = self.host_timestep(timestep)
        unknown = known = NotImplemented
        if type(row) is int and self.num_inference_steps and plain(sample, model_output, original_image):
            plan = self.current_plan()
            dtype = promoted(sample, model_output, original_image)
            noise = []

            def draw():
                if not noise:
                    noise.append(
                        peer.randn_tensor(
                            model_output.shape,
                            generator=generator,
                            device=model_output.device,
                            dtype=model_output.dtype,
                        )
                    )
                return noise[0]

            parts = [plan.rows((part,), self.make_rows) for part in ("unknown", "known")]
            if mask.dtype is dtype and all(0 <= row < len(part.usable) and part.usable[row] for part in parts):
                unknown = fused((sample, model_output), parts[0], row, dtype, clip=plan.range, draw=draw, seed=seed)
                known = fused((original_image,), parts[1], row, dtype, draw=draw, seed=seed)
        if unknown is NotImplemented or known is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, original_image, mask, generator, return_dict)
        unknown, x0 = unknown
        result = torch.lerp(unknown, known, mask)
        return _output(result, x0) if return_dict else (result, x0)

    def undo_step(
        self,
        sample: torch.Tensor,
        timestep: int,
        generator: torch.Generator | None = None,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The peer's steps back towards noise, one kernel each; ``seed`` draws the noise inside the kernels."""
        seed = check_seed(self, generator, seed)
        row = self.host_timestep(timestep)
        if type(row) is not int or not plain(sample):
            needs_generator(seed)
            return super().undo_step(sample, timestep, generator)
        table = self.current_rows("undo")
        for i in range(self.config.num_train_timesteps // self.num_inference_steps):

            def draw(like=sample):
                return peer.randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)

            sample = fused((sample,), table, row + i, sample.dtype, draw=draw, seed=seed)
            if sample is NotImplemented:
                raise IndexError(f"timestep {row + i} is out of range for {len(table.usable)} training timesteps")
        return sample
