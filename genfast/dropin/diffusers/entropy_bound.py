"""EntropyBoundScheduler: the positions of least entropy, as many as a bound allows (arXiv:2505.24857)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_entropy_bound import EntropyBoundSchedulerOutput

from genfast.dropin.diffusers.base import check_seed, needs_generator, output_maker
from genfast.dropin.diffusers.discrete import Discrete, renoised, takes
from genfast.ops.token_sampling import sample_tokens
from genfast.ops.token_transfer import select_transfer

_output = output_maker(EntropyBoundSchedulerOutput)


class EntropyBoundScheduler(Discrete, diffusers.EntropyBoundScheduler):
    """``diffusers.EntropyBoundScheduler`` whose ``step`` is fused with ``seed=``.

    Every step draws, so that one without a seed is the peer's. The entropies are float32 for logits of any dtype, where
    the peer's are of the logits' own. The scaled logits that a step returns are the one temporary of their size.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        entropy_bound: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        seed: int | torch.Tensor | None = None,
    ) -> EntropyBoundSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws tokens inside the kernel, in place of ``generator``."""
        given, seed = seed, check_seed(self, generator, seed)
        step = self.whole_timestep(timestep)
        left = (self.num_inference_steps - step) / self.num_inference_steps
        temperature = self.config.t_min + (self.config.t_max - self.config.t_min) * left
        if seed is None or not takes(model_output, sample) or not temperature > 0:
            needs_generator(seed)
            return super().step(
                model_output,
                timestep,
                sample,
                entropy_bound=entropy_bound,
                generator=generator,
                return_dict=return_dict,
            )
        bound = float(self.config.entropy_bound if entropy_bound is None else entropy_bound)
        stream = self.stream(step, given)
        scaled = model_output / temperature
        found = sample_tokens(scaled, temperature=1.0, seed=seed, stream=stream, statistics=("entropy",))
        everywhere = torch.ones_like(sample, dtype=torch.bool)
        accepted = select_transfer(-found.entropy, everywhere, 0, strategy="entropy_bound", bound=bound)
        x = renoised(found.tokens, accepted, model_output.shape[-1], None, seed, stream)
        result = x, accepted, found.tokens, found.confidence, scaled
        return _output(*result) if return_dict else result
