"""What the schedulers of tokens share.

Their draws differ from those of real samples: the peers call ``torch.multinomial``, which makes a random number for
every entry of every row of probabilities. Nothing is gained by doing that in another place, so a step that draws tokens
from a generator is the peer's own. A greedy step is fused always; one that draws is fused with ``seed=``, in whole
numbers from one uniform per row.

The stream of a draw is the step's number. A pipeline that makes several blocks of text goes through the schedule once
for each, and ``noise_seed`` is one number for all of them: there the block is counted too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.dropin.diffusers.base import DropIn, version_of
from genfast.dropin.tensors import plain
from genfast.ops._checks import LOGIT_DTYPES
from genfast.ops.token_masking import forward_mask
from genfast.ops.token_sampling import sample_tokens

ROUTES = 2**31
"""Added to the stream of the draws that choose what becomes of a token."""


class Discrete(DropIn):
    """Mixin for a scheduler of diffusers whose samples are tokens."""

    _on_host: dict | None = None
    _passes: tuple | None = None  # timesteps, passes through them, the steps of this one
    _unsaved = ("_index", "_on_host")

    def whole_timestep(self, timestep) -> int:
        """A timestep as a whole number, as the peers take it, without a copy to the host for one of ``timesteps``."""
        value = None if self.timesteps is None else self.host_timestep(timestep)
        return int(timestep if value is None else value)

    def stream(self, step: int, seed) -> int:
        """The stream of a step's draws: its number, and without a ``seed`` of its own the pass through the schedule."""
        if seed is not None:
            return step
        timesteps, passes, seen = self._passes or (None, 0, frozenset())
        if timesteps is not self.timesteps:
            passes, seen = 0, frozenset()
        elif step in seen:
            passes, seen = passes + 1, frozenset()
        self._passes = (self.timesteps, passes, seen | {step})
        return (step + (passes << 20)) % ROUTES

    def host_values(self, name: str) -> list:
        """The numbers of a tensor attribute, copied to the host once."""
        tensor, known = getattr(self, name), self.__dict__.setdefault("_on_host", {})
        found = known.get(name)
        if found is None or found[0] is not tensor or found[1] != version_of(tensor):
            found = known[name] = (tensor, version_of(tensor), tensor.tolist())
        return found[2]


def takes(logits, sample) -> bool:
    """Whether the kernels take these logits [B, L, V] and tokens [B, L]; if not, the step is the peer's."""
    return (
        plain(logits)
        and logits.dtype in LOGIT_DTYPES
        and logits.dim() == 3
        and logits.numel() > 0
        and type(sample) is Tensor
        and sample.dtype is torch.int64
        and sample.shape == logits.shape[:2]
        and sample.device == logits.device
    )


def renoised(x: Tensor, kept: Tensor, vocab_size: int, generator, seed, stream: int) -> Tensor:
    """``x`` with uniform tokens where it is not kept: the peer's draw from the generator, or the kernel's own."""
    if seed is not None:
        return forward_mask(x, vocab_size=vocab_size, t=1.0, eps=0.0, maskable=~kept, seed=seed, stream=stream).x
    random = torch.randint(low=0, high=vocab_size, size=x.shape, device=x.device, generator=generator)
    return torch.where(kept, x, random)


def routes(weights: Tensor, seed, stream: int) -> Tensor:
    """Which of the last dimension's weights is drawn, int64 [B, L]; they need not sum to 1."""
    return sample_tokens(weights.float().log(), temperature=1.0, confidence=None, seed=seed, stream=stream).tokens
