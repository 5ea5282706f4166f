"""Training of the denoiser, on one rank or many, that differs in nothing but how gradients are summed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from genfast.demo.data import Digits
from genfast.demo.network import Denoiser, noisy_batch

BATCH = 128


@dataclass
class Curve:
    """How one training went; ``losses`` are those of the whole batches."""

    losses: list[float]
    step_ms: float
    sent_bytes: int = 0
    same_bits: bool = True

    @property
    def final(self) -> float:
        """The mean of the last tenth."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


def denoiser(seed: int) -> Denoiser:
    """Without dropout, whose draws would be others on half of a batch."""
    torch.manual_seed(seed)
    net = Denoiser()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def train(
    net: nn.Module, digits: Digits, steps: int, seed: int, rank: int = 0, ranks: int = 1,
    mean: Callable[[list[float]], list[float]] = list,
) -> Curve:  # fmt: skip
    """Every rank draws the whole batch and takes its share; ``mean`` averages losses over the ranks."""
    torch.manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses, seconds = [], []
    for _ in range(steps):
        x, lam, label, target = (t[rank::ranks] for t in noisy_batch(digits, BATCH))
        start = time.perf_counter()
        loss = (net(x, lam, label) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return Curve(mean(losses), 1e3 * statistics.median(seconds))
