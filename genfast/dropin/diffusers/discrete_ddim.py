"""DiscreteDDIMScheduler: the exact posterior of the uniform corruption process (D3PM, arXiv:2107.03006)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMSchedulerOutput

from genfast.dropin.diffusers.base import check_seed, needs_generator, output_maker
from genfast.dropin.diffusers.discrete import ROUTES, Discrete, renoised, routes, takes
from genfast.ops.token_sampling import sample_tokens

_output = output_maker(DiscreteDDIMSchedulerOutput)


class DiscreteDDIMScheduler(Discrete, diffusers.DiscreteDDIMScheduler):
    """``diffusers.DiscreteDDIMScheduler`` whose ``step`` reads the logits once.

    Steps at temperature 0 are fused always, others with ``seed=``. ``step_correct`` is the peer's.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        seed: int | torch.Tensor | None = None,
    ) -> DiscreteDDIMSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws tokens inside the kernels, in place of ``generator``."""
        given, seed = seed, check_seed(self, generator, seed)
        if not takes(model_output, sample) or not (temperature == 0 or (temperature > 0 and seed is not None)):
            needs_generator(seed)
            return super().step(
                model_output, timestep, sample, temperature=temperature, generator=generator, return_dict=return_dict
            )
        step, steps, size = self.whole_timestep(timestep), self.num_inference_steps, model_output.shape[-1]
        stream = self.stream(step, given)
        drawn = dict(temperature=temperature, seed=seed, stream=stream) if temperature else {}
        tokens, confidence = sample_tokens(model_output, **drawn)[:2]

        # x_s is the predicted token, or stays, or is any token. The roundings are the peer's, so that one generator
        # takes both the same way.
        survival_t, survival = step / steps, (step + 1) / steps
        ratio = survival_t / survival
        same = (sample == tokens).float()
        one = torch.ones_like(same)
        predicted = survival * (1 - ratio) / size + ratio * survival * same
        weights = torch.stack(
            [predicted, ratio * (1 - survival) / size * one, (1 - ratio) * (1 - survival) / size * one], dim=-1
        )
        if seed is None:
            share = (weights / weights.sum(dim=-1, keepdim=True)).view(-1, 3)
            route = torch.multinomial(share, num_samples=1, generator=generator).view_as(sample)
        else:
            route = routes(weights, seed, stream + ROUTES)
        x = torch.where(route == 0, tokens, sample)
        x = renoised(x, route != 2, size, generator, seed, stream)
        result = x, tokens, confidence, model_output
        return _output(*result) if return_dict else result
