"""The four samplers once more, as they are usually written: PyTorch operations on all of the logits [B, L, V].

``x`` int64 [B, L] holds a prompt of ``start`` characters and masks; a filled copy is returned. ``model`` answers as the
network does, :func:`sedd`'s with log scores. Formulas are the papers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from genfast.demo.text.data import MASK, VOCABULARY

EPS = 1e-3
"""Of the log-linear noise: a character is masked at time t with probability (1 - EPS) t."""
END = 1e-5
"""The time at which SEDD's and MDLM's steps end; what is left is then filled in at once."""


def llada(model: Callable, x: Tensor, start: int, steps: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Nie et al. 2025: at each step the most confident of the characters drawn, an even share of the masks."""
    x = x.clone()
    room = x.shape[1] - start
    for i in range(steps):
        logits = model(x).logits
        drawn = _gumbel_max(logits, temperature, generator)
        confidence = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
        confidence = torch.where(x == MASK, confidence, -torch.inf)
        count = room // steps + (i < room % steps)
        for row, values, found in zip(x, confidence, drawn):
            best = values.topk(count).indices
            row[best] = found[best]
    return x


def mdlm(model: Callable, x: Tensor, start: int, steps: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Sahoo et al. 2024: a masked character gets one with probability (m_t - m_s) / m_t; what is there stays.

    The model is asked again only after a step that changed something.
    """
    x = x.clone()
    chances = (1 - EPS) * torch.linspace(1, END, steps + 1)
    p = None
    for m, following in pairwise(chances):
        if p is None:
            p = _substituted(model(x).logits / temperature, x)
        q = p * (m - following)
        q[..., MASK] = following
        new = torch.where(x == MASK, _draw(q, generator), x)
        if not torch.equal(new, x):
            p = None
        x = new
    return _substituted(model(x).logits, x).argmax(-1) if (x == MASK).any() else x


def sedd(model: Callable, x: Tensor, start: int, steps: int, generator: torch.Generator) -> Tensor:
    """Lou et al. 2024, Tweedie tau-leaping on the absorbing graph: the score brought back by the step's noise, times
    the chance of the forward step from each y to x."""
    x = x.clone()
    sigma = -torch.log1p(-(1 - EPS) * torch.linspace(1, END, steps + 1))
    steps_back = [*zip(sigma, sigma[:-1] - sigma[1:]), (sigma[-1], sigma[-1])]
    for i, (level, amount) in enumerate(steps_back):
        score = model(x, level.expand(len(x))).exp()
        stay = math.exp(-amount)
        staggered = score / stay
        staggered[..., MASK] += (1 - 1 / stay) * score.sum(-1)
        onehot = F.one_hot(x, VOCABULARY)
        forward = torch.where(x[..., None] == MASK, (1 - stay) + stay * onehot, stay * onehot)
        p = staggered * forward
        if i == steps:
            p[..., MASK] = torch.where(x == MASK, 0, p[..., MASK])
        x = torch.where(x == MASK, _draw(p, generator), x)
    return x


def block_diffusion(
    model: Callable,
    x: Tensor,
    start: int,
    steps: int,
    temperature: float,
    generator: torch.Generator,
    block: int,
) -> Tensor:
    """Arriola et al. 2025, with SDAR's choice of positions: blocks from left to right, each given the clean ones before
    it, whose keys and values are kept; within a block as LLaDA."""
    x = x.clone()
    cache = None
    number = torch.arange(x.shape[1]) // block
    visible = (number[:, None] >= number)[None, None]
    position = torch.arange(x.shape[1])
    kept = 0
    for first in range(start // block * block, x.shape[1], block):
        last = min(first + block, x.shape[1])
        room = last - max(first, start)
        for i in range(min(steps, room)):
            # The first pass over a block takes the one before it along, now that it is clean.
            answer = model(
                x[:, kept:last],
                attention_mask=visible[..., kept:last, :last],
                position_ids=position[kept:last],
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits = answer.past_key_values, answer.logits[:, first - kept :]
            cache.crop(first)
            kept = first
            logits = logits / temperature if temperature else logits
            p = logits.softmax(-1)
            drawn = _draw(p, generator) if temperature else p.argmax(-1)
            confidence = p.gather(-1, drawn[..., None])[..., 0]
            masked = x[:, first:last] == MASK
            confidence = torch.where(masked, confidence, -torch.inf)
            count = block // steps + (i < block % steps)
            for row, values, found, left in zip(x[:, first:last], confidence, drawn, masked.sum(1).tolist()):
                best = values.topk(min(count, left)).indices
                row[best] = found[best]
    return x


def _gumbel_max(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A draw from softmax(logits / temperature), with float64 noise as LLaDA has it."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
    return (logits.double().exp() / (-noise.log()) ** temperature).argmax(-1)


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from p [.., V], which need not add up to one."""
    noise = 1e-10 - (torch.rand(p.shape, generator=generator) + 1e-10).log()
    return (p / noise).argmax(-1)


def _substituted(logits: Tensor, x: Tensor) -> Tensor:
    """MDLM's SUBS: probabilities without the mask at masked positions, and those of x itself elsewhere."""
    logits = logits.clone()
    logits[..., MASK] -= 1e6
    p = logits.log_softmax(-1).exp()
    return torch.where(x[..., None] == MASK, p, F.one_hot(x, VOCABULARY).to(p.dtype))
