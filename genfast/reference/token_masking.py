"""The forward process of discrete diffusion in plain PyTorch: the specification of ``token_masking``.

Every number is float32 and made by one operation at a time, in the order of the published code, so that all backends
agree to the bit. Per sequence b and block j, with u uniform in [0, 1):

    u <- (u / n + k / n) mod 1 for stratum k of n,    t = (high - low) u + low,    p = slope t + floor.

A position is noised if its uniform number is below p. From Philox, u is the top 24 bits of word 0 of block
2^63 + j, a position's number is its word of the layout in :mod:`genfast.random`, and its uniform token comes from the
same word of the blocks that begin at 2^62.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.random import philox_words, signed64

TOKENS, TIMES = 2**62, -(2**63)
"""First blocks of the words of uniform tokens and of times (2^63 as a signed number)."""


def words(
    seed: int | Tensor, stream: int, offset: int, batch: int, blocks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of Philox blocks [N] for every sequence, int64 [B, N]."""
    device = blocks.device
    sample = torch.arange(batch, device=device) + offset
    if isinstance(seed, Tensor):
        if seed.dim() == 1:
            sample = torch.full_like(sample, offset)
    else:
        seed = torch.tensor(signed64(seed), device=device)
    return philox_words(seed.reshape(-1, 1), blocks[None], sample[:, None], torch.tensor(stream, device=device))


def position_words(seed, stream: int, offset: int, batch: int, length: int, first: int, device) -> Tensor:
    """The word of every position, int64 [B, L], of the blocks from ``first`` on."""
    groups = -(-length // 64)
    w = torch.stack(words(seed, stream, offset, batch, torch.arange(groups * 16, device=device) + first))
    return w.view(4, batch, groups, 16).permute(1, 2, 0, 3).reshape(batch, groups * 64)[:, :length]


def times(uniform: Tensor, low: float, spread: float, strata: int, first: int) -> Tensor:
    """t of uniform numbers [B, blocks]; the first of them is in stratum ``first`` of ``strata`` (0: none)."""
    if strata:
        stratum = (torch.arange(uniform.numel(), device=uniform.device) + first) % strata
        uniform = uniform / torch.tensor(strata, dtype=torch.float32, device=uniform.device) + (
            stratum.view_as(uniform).float() / torch.tensor(strata, dtype=torch.float32, device=uniform.device)
        )
        uniform = torch.where(uniform >= 1, uniform - 1, uniform)
    return uniform * spread + low


def forward_mask(
    x0: Tensor,
    *,
    mask_id: int,
    t: Tensor | None,
    drawn: bool,
    low: float,
    spread: float,
    slope: float,
    floor: float,
    by_time: bool,
    block_size: int,
    strata: int,
    maskable: Tensor | None,
    count: int | Tensor | None,
    vocab_size: int,
    noise: Tensor | None,
    tokens: Tensor | None,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    times_out: Tensor,
) -> None:
    """See :func:`genfast.forward_mask`. ``t`` is [B, blocks], uniform numbers if ``drawn``; ``vocab_size`` 0 masks."""
    batch, length = x0.shape
    device = x0.device
    allowed = torch.ones_like(x0, dtype=torch.bool) if maskable is None else maskable
    if noise is None:
        word = position_words(seed, stream, offset, batch, length, 0, device)
    if count is not None:
        most = allowed.sum(1)
        wanted = torch.as_tensor(count, device=device).expand(batch).clamp_min(0).minimum(most)
        order = torch.where(allowed, word, 2**32).sort(dim=1, stable=True).indices
        places = torch.arange(length, device=device).expand_as(order)
        mask.copy_(torch.empty_like(order).scatter_(1, order, places) < wanted[:, None])
        probability = torch.where(most > 0, wanted.float() / most.float(), 0.0)[:, None]
        time = probability
    else:
        blocks = times_out.shape[1]
        if t is None:
            w0 = words(seed, stream, offset, batch, torch.arange(blocks, device=device) + TIMES)[0]
            t, drawn = (w0 >> 8).float() * 2.0**-24, True
        time = times(t, low, spread, strata, offset * blocks) if drawn else t
        probability = time * slope + floor
        of_position = torch.arange(length, device=device) // block_size
        below = probability[:, of_position]
        chosen = noise < below if noise is not None else word.double() < below.double() * 2.0**32
        mask.copy_(chosen & allowed)
        probability, time_of_position = below, time[:, of_position]
    times_out.copy_(time)
    if vocab_size:
        if tokens is None:
            tokens = position_words(seed, stream, offset, batch, length, TOKENS, device) * vocab_size >> 32
        x.copy_(torch.where(mask, tokens, x0))
    else:
        x.copy_(torch.where(mask, mask_id, x0))
    if weight is not None:
        divisor = time_of_position if by_time else probability
        weight.copy_(torch.where(mask, 1.0 / divisor, 0.0))
