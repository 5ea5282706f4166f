"""The quantiser's training step and stage two's sampling once more, as they are usually written in PyTorch.

The quantiser follows VQ-VAE's published steps: all distances by the expanded square, a one-hot matrix for the sums, the
rotation trick as its authors have it. Sampling sorts the logits for top-p and keeps keys and values by concatenation.
"""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genfast.demo.data import CLASSES
from genfast.demo.vq.prior import LENGTH, Choice, Prior


class Quantized(NamedTuple):
    z_q: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor


def quantize(z: Tensor, codebook: Tensor, commitment_weight: float) -> Quantized:
    """Nearest codes of channel-first vectors z [B, D, H, W], with the rotation trick and the commitment loss."""
    rows = z.movedim(1, -1).reshape(-1, z.shape[1])
    distance = rows.square().sum(1, keepdim=True) - 2 * rows @ codebook.T + codebook.square().sum(1)
    indices = distance.argmin(1)
    codes = codebook[indices]
    loss = commitment_weight * F.mse_loss(rows, codes.detach())
    with torch.no_grad():
        length, reach = (t.norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (rows, codes))
        u, q = rows / length, codes / reach
        w = F.normalize(u + q, dim=1)
    turned = rows - 2 * (rows * w).sum(1, keepdim=True) * w + 2 * (rows * u).sum(1, keepdim=True) * q
    z_q = (turned * (reach / length)).view(*z.shape[:1], *z.shape[2:], -1).movedim(-1, 1)
    p = F.one_hot(indices, len(codebook)).float().mean(0)
    perplexity = torch.exp(-(p * (p + 1e-10).log()).sum())
    return Quantized(z_q, indices.view(z.shape[0], *z.shape[2:]), loss, perplexity)


@torch.no_grad()
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    z: Tensor,
    indices: Tensor,
    decay: float,
    dead: float,
    generator: torch.Generator,
    eps: float = 1e-5,
) -> None:
    """Moving averages of channel-first vectors, Laplace smoothing, and vectors of the batch for dead codes."""
    rows = z.movedim(1, -1).reshape(-1, z.shape[1])
    onehot = F.one_hot(indices.flatten(), len(codebook)).to(rows.dtype)
    cluster_size.lerp_(onehot.sum(0), 1 - decay)
    embed_avg.lerp_(onehot.T @ rows, 1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + eps) / (total + len(codebook) * eps) * total
    codebook.copy_(embed_avg / smoothed[:, None])
    gone = cluster_size < dead
    if gone.any():
        drawn = rows[torch.randperm(len(rows), generator=generator)[: int(gone.sum())]]
        codebook[gone], embed_avg[gone], cluster_size[gone] = drawn, drawn, 1.0


@torch.no_grad()
def sample(net: Prior, labels: Tensor, choice: Choice, generator: torch.Generator) -> tuple[Tensor, float]:
    """As ``prior.sample``: codes [B, 16] of classes [B], and the seconds outside of the network."""
    start, inside = time.perf_counter(), 0.0
    guided = choice.guidance != 1
    asked = torch.cat([labels, torch.full_like(labels, CLASSES)]) if guided else labels
    attends = [partial(_attend_and_store, []) for _ in net.layers]
    codes = labels.new_empty(len(labels), 0)
    before = asked.new_empty(len(asked), 0)
    for i in range(LENGTH):
        began = time.perf_counter()
        logits = net(asked, before, attends, cached=i)[:, -1]
        inside += time.perf_counter() - began
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + choice.guidance * (conditional - unconditional)
        p = filtered(logits, choice.top_k, choice.top_p).softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        codes = torch.cat([codes, drawn], 1)
        before = drawn.repeat(1 + guided, 1)
    return codes, time.perf_counter() - start - inside


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [B, V] with minus infinity where top-p, then top-k, leaves nothing."""
    if top_p is not None:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        gone = p.cumsum(-1) - p > top_p
        logits = logits.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _attend_and_store(stored: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    stored[:] = [torch.cat(pair, 2) for pair in zip(stored, (k, v))] if stored else [k, v]
    return F.scaled_dot_product_attention(q, *stored)
