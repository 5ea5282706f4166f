"""A small class-conditional denoiser, and how one network serves every noise schedule.

The network sees the variance-preserving form of a noisy image, x_t / sqrt(alpha^2 + sigma^2), and the log
signal-to-noise ratio lambda = log(alpha / sigma), and predicts v = a eps - s x0 for the normalised pair (a, s)
(Salimans and Ho 2022). Any schedule can be brought to that form, so one training run is enough for all samplers
(Karras et al. 2022).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from genfast.demo.data import CLASSES, Digits


class Denoiser(nn.Module):
    """A residual network on the 64 pixels, modulated by lambda and the label; label CLASSES means "any"."""

    def __init__(self, width: int = 256, blocks: int = 3):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.1), math.log(10.0), 32)))
        self.level = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)
        self.enter = nn.Linear(64, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(blocks))
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))
        nn.init.zeros_(self.leave[1].weight)

    def forward(self, x: Tensor, lam: Tensor, label: Tensor) -> Tensor:
        """v for x [B, 1, 8, 8] at log signal-to-noise ratios lam [B]."""
        phase = lam[:, None] * self.frequencies
        condition = nn.functional.silu(self.level(torch.cat([phase.sin(), phase.cos()], 1)) + self.label(label))
        h = self.enter(x.flatten(1))
        for norm, modulation, block in zip(self.norms, self.modulations, self.blocks):
            scale, shift = modulation(condition).chunk(2, dim=1)
            h = h + block(norm(h) * (1 + scale) + shift)
        return self.leave(h).view_as(x)


def train(digits: Digits, steps: int, seed: int, progress) -> Denoiser:
    """Train by v-prediction at levels of the cosine schedule, labels dropped one time in ten; averaged weights."""
    torch.manual_seed(seed)
    net = Denoiser()
    averaged = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    with progress(steps, "training") as bar:
        for step in range(steps):
            x, lam, label, target = noisy_batch(digits, 128)
            loss = (net(x, lam, label) - target).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                keep = min(0.995, (1 + step) / (10 + step))
                for mean, p in zip(averaged.parameters(), net.parameters()):
                    mean.lerp_(p, 1 - keep)
            bar.update()
    return averaged


def noisy_batch(digits: Digits, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, lam, label, target): random digits at levels of the cosine schedule, labels dropped one time in ten."""
    at = torch.randint(len(digits.train), (size,))
    x0, label = digits.train[at], digits.train_labels[at]
    label = torch.where(torch.rand(len(label)) < 0.1, CLASSES, label)
    # Stratified angles: every batch covers the whole schedule evenly.
    angle = (torch.rand(1) + torch.arange(len(at)) / len(at)).remainder(1).clamp(1e-3, 1 - 1e-3) * (math.pi / 2)
    a, s = angle.cos().view(-1, 1, 1, 1), angle.sin().view(-1, 1, 1, 1)
    eps = torch.randn_like(x0)
    return a * x0 + s * eps, (a / s).log().flatten(), label, a * eps - s * x0


class Model:
    """The network as a sampler's ``model(x, t)``: a pair (conditional, unconditional) in the sampler's prediction.

    Args:
        net: the denoiser.
        labels: [B] classes to generate.
        levels: function t [B] -> (alpha, sigma), each [B].
        prediction: ``"v_prediction"`` (variance-preserving schedules), ``"sample"`` or ``"flow_prediction"``.

    ``seconds`` and ``calls`` add up what the network itself costs.
    """

    def __init__(
        self, net: Denoiser, labels: Tensor, levels: Callable[[Tensor], tuple[Tensor, Tensor]], prediction: str
    ):
        self.net, self.levels, self.prediction = net, levels, prediction
        self.labels = torch.cat([labels, torch.full_like(labels, CLASSES)])
        self.seconds, self.calls = 0.0, 0

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # Around the whole evaluation, so that freeing its temporaries counts as the network's time too.
        start = time.perf_counter()
        pair = self._evaluate(x, t)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return pair

    def _evaluate(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.levels(t)
        norm = torch.hypot(alpha, sigma)
        lam = (alpha.clamp_min(1e-4) / sigma.clamp_min(1e-4)).log()
        normalised = (x / norm.view(-1, 1, 1, 1)).repeat(2, 1, 1, 1)
        v = self.net(normalised, lam.repeat(2), self.labels)
        if self.prediction != "v_prediction":
            a, s = ((w / norm).repeat(2).view(-1, 1, 1, 1) for w in (alpha, sigma))
            x0, eps = a * normalised - s * v, s * normalised + a * v
            v = x0 if self.prediction == "sample" else eps - x0
        conditional, unconditional = v.chunk(2)
        return conditional, unconditional
