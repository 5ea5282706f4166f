"""Which masked positions to unmask, and the write, in plain PyTorch: the specification of ``token_transfer``."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference.token_sampling import row_words

STRATEGIES = ("top", "threshold", "factor", "entropy_bound", "hierarchy", "sequential", "random")


def position_words(
    seed: int | Tensor, stream: int, offset: int, batch: int, length: int, device: torch.device
) -> Tensor:
    """Word 3 of every position, int64 [B, L]: apart from those that :func:`sample_tokens` draws with."""
    rows = torch.arange(batch * length, device=device)
    return row_words(seed, stream, offset, rows, length, None)[3].view(batch, length)


def scores(
    confidence: Tensor, strategy: str, temperature: float, seed: int | Tensor | None, stream: int, offset: int
) -> Tensor:
    """What positions are ranked by, float32 [B, L]: the confidence, or with Gumbel noise, or noise alone."""
    if strategy == "sequential":
        return -torch.arange(confidence.shape[1], dtype=torch.float32, device=confidence.device).expand_as(confidence)
    key = confidence.float()
    if strategy == "random" or temperature > 0:
        word = position_words(seed, stream, offset, *confidence.shape, confidence.device)
        if strategy == "random":
            return (word >> 8).float()
        u = (word.double() + 0.5) * 2.0**-32
        key = (key.double() / temperature - (-u.log()).log()).float()
    return torch.where(key.isnan(), -torch.inf, key)


def select_transfer(
    confidence: Tensor,
    mask: Tensor,
    *,
    n: int | Tensor,
    strategy: str,
    threshold: float,
    low_threshold: float,
    slack: float | None,
    strict: bool,
    factor: float,
    accept_last: bool,
    bound: float,
    inclusive: bool,
    start: int | Tensor,
    end: int | Tensor,
    temperature: float,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    out: Tensor,
) -> None:
    """See :func:`genfast.select_transfer`."""
    batch, length = confidence.shape
    device = confidence.device
    places = torch.arange(length, device=device)
    start, end, n = (torch.as_tensor(v, device=device).expand(batch)[:, None] for v in (start, end, n))
    candidate = mask & (places >= start) & (places < end)
    key = scores(confidence, strategy, temperature, seed, stream, offset)
    order = key.sort(dim=1, descending=True, stable=True).indices
    last = (~candidate).gather(1, order).int().sort(dim=1, stable=True).indices
    order = order.gather(1, last)  # candidates first
    rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    count = candidate.sum(1, keepdim=True)
    chosen = rank < n

    def reaches(limit: float | Tensor) -> Tensor:
        limit = torch.as_tensor(limit, dtype=torch.float32, device=device)
        return key > limit if strict else key >= limit

    if strategy == "threshold":
        limit = threshold
        if slack is not None and length:
            best = torch.where(candidate, key, -torch.inf).amax(1, keepdim=True)
            limit = (best - slack).clamp(torch.finfo(torch.float32).min, threshold)
        chosen |= reaches(limit)
    elif strategy == "factor":
        least = (1 - factor / (places + 2.0).double()).float()
        fails = (key.gather(1, order) < least) & (places > 0) & (places < count)
        first = torch.where(fails, places, length).amin(1, keepdim=True).clamp_max(count)
        if accept_last:
            first = torch.where(first == count - 1, count, first)
        chosen |= rank < first
    elif strategy == "entropy_bound":
        entropy = -key.gather(1, order).double()
        running = entropy.cumsum(1)
        within = running < bound if inclusive else running - entropy <= bound
        reached = within.int().cumprod(1).sum(1, keepdim=True)
        chosen |= rank < reached
    elif strategy == "hierarchy":
        chosen |= reaches(threshold)
        before = torch.nn.functional.pad(candidate, (1, 0))[:, :-1]
        run = (candidate & ~before).cumsum(1) * candidate
        best = torch.full((batch, length + 1), length, device=device).scatter_reduce(1, run, rank, "amin")
        chosen |= (rank == best.gather(1, run)) & reaches(low_threshold)
    out.copy_(chosen & candidate)


def commit_(
    x: Tensor, tokens: Tensor, selected: Tensor, *, mask_id: int, eos_id: int | None, left: Tensor, finished: Tensor
) -> None:
    """See :func:`genfast.commit_`."""
    x.copy_(torch.where(selected, tokens, x))
    masked = x == mask_id
    left.copy_(masked.sum(1))
    if eos_id is None:
        finished.copy_(left == 0)
        return
    length = x.shape[1]
    places = torch.arange(length, device=x.device)
    first_mask = torch.where(masked, places, length).amin(1) if length else torch.zeros_like(left)
    first_eos = torch.where(x == eos_id, places, length).amin(1) if length else torch.zeros_like(left)
    finished.copy_((left == 0) | (first_eos < first_mask))
