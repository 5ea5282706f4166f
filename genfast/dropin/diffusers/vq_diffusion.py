"""VQDiffusionScheduler: mask and replace (arXiv:2111.14822)."""

from __future__ import annotations

import math

import diffusers
import torch
from diffusers.schedulers.scheduling_vq_diffusion import VQDiffusionSchedulerOutput

from genfast.dropin.diffusers.base import check_seed, needs_generator, output_maker
from genfast.dropin.diffusers.discrete import ROUTES, Discrete, renoised, routes, takes
from genfast.ops.token_sampling import sample_tokens

_output = output_maker(VQDiffusionSchedulerOutput)


class VQDiffusionScheduler(Discrete, diffusers.VQDiffusionScheduler):
    """``diffusers.VQDiffusionScheduler`` whose ``step`` is fused with ``seed=``.

    The peer sums over x0 for the probabilities of x_{t-1}, a dozen tensors of all classes, and draws from them. The
    same law is x0 ~ p(x0), then x_{t-1} ~ q(x_{t-1} | x_t, x0), which has four outcomes: x0, x_t, any class, the mask.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> VQDiffusionSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws classes inside the kernels, in place of ``generator``."""
        given, seed = seed, check_seed(self, generator, seed)
        logits = model_output.transpose(1, 2) if model_output.ndim == 3 else model_output
        if seed is None or not takes(logits, sample) or logits.shape[-1] != self.num_embed - 1:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        t = self.whole_timestep(timestep)
        stream = self.stream(t, given)
        x0 = sample_tokens(logits, temperature=1.0, confidence=None, seed=seed, stream=stream).tokens
        x = x0 if t == 0 else self._given_x0(x0, sample, t, seed, stream)
        return _output(x) if return_dict else (x,)

    def _given_x0(self, x0: torch.Tensor, x_t: torch.Tensor, t: int, seed, stream: int) -> torch.Tensor:
        """A draw of q(x_t | x_{t-1}) q(x_{t-1} | x0), as weights of (x0, x_t, any class, the mask).

        With a, b, c the chances to keep the class, to become each class, to be masked in step t and A, B, C those of
        all steps before it: a class x_t came from i with a [i = x_t] + b, a mask from a class with c and from a mask
        surely, and i came from x0 with A [i = x0] + B, a mask with C.
        """
        classes = self.num_embed - 1
        a, b, c = (math.exp(self.host_values(name)[t]) for name in ("log_at", "log_bt", "log_ct"))
        before = ("log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct")
        a0, b0, c0 = (math.exp(self.host_values(name)[t - 1]) for name in before)
        masked, same = x_t == self.mask_class, x_t == x0
        of_class, of_mask = (b * a0, a * b0, b * b0 * classes, 0.0), (c * a0, 0.0, c * b0 * classes, c0)
        weights = torch.stack([torch.where(masked, *pair) for pair in zip(of_mask, of_class)], dim=-1)
        weights[..., 1] += a * a0 * (same & ~masked)
        route = routes(weights, seed, stream + ROUTES)
        x = torch.where(route == 0, x0, torch.where(route == 1, x_t, self.mask_class))
        return renoised(x, route != 2, classes, None, seed, stream)
