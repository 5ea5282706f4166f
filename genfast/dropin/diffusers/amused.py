"""AmusedScheduler: masked image tokens, the least confident masked again at random (MaskGIT, arXiv:2202.04200)."""

from __future__ import annotations

import math

import diffusers
import torch
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput

from genfast.dropin.diffusers.base import HostTimesteps, check_seed, needs_generator, output_maker
from genfast.dropin.diffusers.discrete import Discrete, takes
from genfast.ops.token_sampling import sample_tokens
from genfast.ops.token_transfer import select_transfer

_output = output_maker(AmusedSchedulerOutput)


class AmusedScheduler(Discrete, diffusers.AmusedScheduler):
    """``diffusers.AmusedScheduler`` whose ``step`` is fused with ``seed=``.

    Every step draws, so that one without a seed is the peer's. What was given stays: the peer masks one token of a
    sample that has no mask left.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.LongTensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> AmusedSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws tokens and positions inside the kernels, in place of ``generator``."""
        given, seed = seed, check_seed(self, generator, seed)
        logits, ids = model_output, sample
        image = sample.ndim == 3 and model_output.ndim == 4
        if image:
            logits, ids = logits.flatten(2).transpose(1, 2), ids.flatten(1)
        step = left = None
        if seed is not None and self.timesteps is not None and takes(logits, ids):
            step = self.whole_timestep(timestep)
            left = 0 if step == 0 else self._masks_left(step, ids.shape[1], starting_mask_ratio)
        if left is None:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, starting_mask_ratio, generator, return_dict)

        unknown = ids == self.config.mask_token_id
        stream = self.stream(step, given)
        found = sample_tokens(logits, temperature=1.0, seed=seed, stream=stream)
        predicted = torch.where(unknown, found.tokens, ids)
        x = predicted
        if step != 0:
            masks = unknown.sum(dim=-1)
            again = (masks - 1).clamp(max=left).clamp_(min=1)  # at least one, fewer than before
            noise = self.host_values("temperatures")[HostTimesteps.of(self).places[step][0]]
            # A ranking by log p + noise x Gumbel: the best are kept.
            kept = select_transfer(
                found.confidence.log(), unknown, masks - again, temperature=noise, seed=seed, stream=stream
            )
            x = torch.where(unknown & ~kept, self.config.mask_token_id, predicted)
        if image:
            x, predicted = x.view_as(sample), predicted.view_as(sample)
        return _output(x, predicted) if return_dict else (x, predicted)

    def _masks_left(self, step: int, length: int, starting_mask_ratio: float) -> int | None:
        """How many masks the schedule leaves after a step; None where the peer must say what is wrong."""
        places = HostTimesteps.of(self).places.get(step)
        if places is None or len(places) > 1 or self.host_values("temperatures")[places[0]] < 0:
            return None
        ratio = torch.tensor(places[0] + 1) / len(self.timesteps)  # float32, as the peer's
        if self.config.masking_schedule == "cosine":
            ratio = torch.cos(ratio * math.pi / 2)
        elif self.config.masking_schedule == "linear":
            ratio = 1 - ratio
        else:
            return None
        return int((length * (starting_mask_ratio * ratio)).floor())
