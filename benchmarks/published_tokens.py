"""What the published masked diffusion language models run to get tokens from logits, written out in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast import backends

MASK_ID = 126336
"""LLaDA-8B's."""


def backend_name(device: torch.device) -> str:
    """The backend that runs the family on a device, with the instruction set of the CPU's."""
    name = backends.choose("token_sampling", "sample_tokens", device)[0]
    return f"{name} {backends.cpu_isa()}" if name == "cpu" else name


def noisy(logits: Tensor, temperature: float) -> Tensor:
    """LLaDA's Gumbel-max in float64."""
    if temperature == 0:
        return logits
    wide = logits.double()
    return wide.exp() / (-torch.rand_like(wide).log()) ** temperature


def confidence_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest, and its probability."""
    tokens = logits.argmax(-1)
    return tokens, confidence_of(logits, tokens)


def draw(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """A draw, and its probability."""
    tokens = noisy(logits, temperature).argmax(-1)
    return tokens, confidence_of(logits, tokens)


def nucleus(logits: Tensor, p: float = 0.95) -> tuple[Tensor, Tensor]:
    """Dream's: sort, cut after the token that crosses p, draw."""
    values, order = logits.sort(-1, descending=True)
    remove = values.softmax(-1).cumsum(-1) > p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    remove = torch.zeros_like(remove).scatter(-1, order, remove)
    left = logits.masked_fill(remove, torch.finfo(logits.dtype).min).softmax(-1)
    tokens = torch.distributions.Categorical(probs=left).sample()
    return tokens, left.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
