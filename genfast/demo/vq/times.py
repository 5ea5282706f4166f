"""Times of fused ops beside plain PyTorch: a training step of the quantiser and a draw, here and at published sizes.

A step of the quantiser is lookup, losses, gradient and moving averages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from genfast.demo.vq import eager
from genfast.demo.vq.autoencoder import COMMITMENT, DEAD, DECAY
from genfast.ops.code_update import ema_update_, quantize
from genfast.ops.token_sampling import sample_tokens


def compare(z: Tensor, codebook: Tensor, seed: int) -> None:
    """Print what a step of the quantiser takes with the demo's vectors z and codes, and at larger sizes; and a draw."""
    print("\nfused and eager, this demo's sizes and larger ones (random vectors and logits); medians, ms")
    row = "{:<72} {:>8} {:>8} {:>7}"
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(16, 256, 16, 16, generator=generator), torch.randn(1024, 256, generator=generator)
    logits = 3 * torch.randn(64, 16384, generator=generator)
    for title, ours, theirs in (
        (
            f"a training step of the quantiser, {_sizes(z, codebook)}",
            fused_step(z, codebook, seed),
            eager_step(z, codebook, seed),
        ),
        (f"a training step of the quantiser, {_sizes(*large)}", fused_step(*large, seed), eager_step(*large, seed)),
        (
            "a draw with top-k 2000 and top-p 0.95, 64 rows of 16384 codes",
            lambda: sample_tokens(logits, temperature=1.0, top_k=2000, top_p=0.95, confidence=None, seed=seed),
            lambda: torch.multinomial(eager.filtered(logits, 2000, 0.95).softmax(-1), 1, generator=generator),
        ),
    ):
        runs = [(timed(ours)[1], timed(theirs)[1]) for _ in range(5)]
        fused, plain = (1000 * statistics.median(seconds) for seconds in zip(*runs))
        print(row.format(title, f"{fused:.2f}", f"{plain:.2f}", f"{plain / fused:.1f}x"), flush=True)


def _sizes(z: Tensor, codebook: Tensor) -> str:
    return f"{z.numel() // z.shape[1]} vectors of {z.shape[1]}, {len(codebook)} codes"


def fused_step(z: Tensor, codebook: Tensor, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """A training step of the quantiser: (codes' indices, gradient of the sum of z_q plus the loss, codebook)."""

    def step() -> tuple[Tensor, ...]:
        x, state = z.clone().requires_grad_(), _state(codebook)
        found = quantize(x, state[0], dim=1, gradient="rotation", commitment_weight=COMMITMENT, codebook_weight=0.0)
        (found.z_q.sum() + found.loss).backward()
        ema_update_(*state, x, found.indices, decay=DECAY, dim=1, threshold=DEAD, reset_cluster_size=1.0, seed=seed)
        return found.indices, x.grad, state[0]

    return step


def eager_step(z: Tensor, codebook: Tensor, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """The same in plain PyTorch."""

    def step() -> tuple[Tensor, ...]:
        x, state = z.clone().requires_grad_(), _state(codebook)
        found = eager.quantize(x, state[0], COMMITMENT)
        (found.z_q.sum() + found.loss).backward()
        eager.ema_update_(*state, x, found.indices, DECAY, DEAD, torch.Generator().manual_seed(seed))
        return found.indices, x.grad, state[0]

    return step


def _state(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A codebook with moving averages that agree with it."""
    return codebook.clone(), torch.ones(len(codebook)), codebook.clone()


def timed(function: Callable):
    """(what it returns, seconds)"""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
