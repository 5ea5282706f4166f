"""What the drop-ins of SEDD, MDLM and BD3-LM share: seeds; a model's answer kept as logits, and a step made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops.token_transition import Transition, discrete_transition


def one_seed(seed: int | Tensor | torch.Generator | None) -> int | Tensor | None:
    """The seed of a run: as it is, or drawn from a generator."""
    if not isinstance(seed, torch.Generator):
        return seed
    return int(torch.randint(-(2**63), 2**63 - 1, (), generator=seed, device=seed.device))


class Prediction:
    """What a model said of every position: what the published code keeps as p(x0), one probability per id.

    Here it stays logits [B, L, V]; the steps need no more. :meth:`probabilities` makes the published tensor.
    """

    def __init__(self, logits: Tensor, mask_index: int):
        self.logits, self.mask_index = logits, mask_index

    def probabilities(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """p(x0 | x) [B, L, V]: no mask, and certainty at the positions of x [B, L] that are not masked."""
        found = log_probabilities(self.logits, x, self.mask_index)
        return (found if dtype is None else found.to(dtype)).exp()


def log_probabilities(logits: Tensor, xt: Tensor, mask_index: int) -> Tensor:
    """SUBS: log-softmax without the mask; rows that are not masked have 0 at their token and -1e6 elsewhere."""
    never = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    never[mask_index] = -1e6
    logits = logits + never
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    certain = torch.full_like(logits, -1e6).scatter(-1, xt[..., None], 0)
    return torch.where((xt == mask_index)[..., None], logits, certain)


def logits_of(p_x0) -> Tensor:
    """Logits of a :class:`Prediction`, or of probabilities."""
    return p_x0.logits if isinstance(p_x0, Prediction) else p_x0.log()


def staying(chance_t: Tensor, chance_s: Tensor) -> Tensor:
    """[B]: the probability of staying masked from t to s, 0 where the published weights give the mask none."""
    chance_t, chance_s = chance_t.reshape(-1), chance_s.reshape(-1)
    return torch.where(chance_t > 0, (chance_s / chance_t).clamp(0, 1), 0)


def published_noise(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The uniform numbers of the published draw from float32 probabilities (or of ``dtype``)."""
    dtype = torch.promote_types(logits.dtype, torch.float32) if dtype is None else dtype
    return torch.rand(logits.shape, device=logits.device, dtype=dtype)


def step(x: Tensor, logits: Tensor, stay, mask_index: int, randomness: dict | None, **options) -> Transition:
    """A step of the posterior.

    Args:
        stay: the probability of staying masked, [B] or a number.
        randomness: seed, stream and offset, or None to draw as published.
        options: of :func:`genfast.discrete_transition`.
    """
    if randomness is None:
        randomness = dict(noise=published_noise(logits))
    return discrete_transition(
        x, logits, stay, kind="logits", rule="posterior", mask_id=mask_index, **randomness, **options
    )


def likeliest(x: Tensor, logits: Tensor, mask_index: int) -> Tensor:
    """x [B, L] with the likeliest token at every mask."""
    found = discrete_transition(
        x, logits, 0.0, kind="logits", rule="posterior", mask_id=mask_index, temperature=0.0, seed=0
    )
    return found.x
