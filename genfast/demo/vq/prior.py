"""Stage two: a small transformer that writes codes one after the other, given a class (VQGAN, Esser et al. 2021).

It is trained on the codes of the digits with ``attention`` under the causal mask, and sampled with ``attention`` over
the keys and values kept so far and ``sample_tokens``: guidance, top-p, top-k and the draw in one pass.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genfast.attention_mask import AttentionMask
from genfast.demo.data import CLASSES, Digits
from genfast.demo.vq.autoencoder import CODES, SIDE, Autoencoder
from genfast.ops.attention import attention
from genfast.ops.token_sampling import sample_tokens

LENGTH = SIDE * SIDE
BATCH = 96
NOISE = 0.1
"""Of the images whose codes are learned: fourteen hundred digits would soon be known by heart."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, heads, n, width] of one layer to what they see."""


@dataclass(frozen=True)
class Choice:
    """How the next code is drawn: with guidance, and among the ``top_k`` most likely of what ``top_p`` leaves."""

    guidance: float
    top_k: int | None
    top_p: float | None


class Kept:
    """Attention over all keys and values so far, which are as many for every row: a place for each, and no copies."""

    def __init__(self, batch: int, heads: int, width: int):
        self.keys, self.values = torch.empty(2, batch, heads, LENGTH, width)
        self.length = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, begin : self.length], self.values[:, :, begin : self.length] = k, v
        return attention(q, self.keys[:, :, : self.length], self.values[:, :, : self.length])


class Layer(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(0.2)

    def forward(self, h: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norms[0](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.dropout(self.out(attend(q, k, v).transpose(1, 2).flatten(2)))
        return h + self.dropout(self.feed(self.norms[1](h)))


class Prior(nn.Module):
    """Logits of the next code, given a class and the codes before; class CLASSES means "any"."""

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 3):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.label = nn.Embedding(CLASSES + 1, width)
        self.code = nn.Embedding(CODES, width)
        self.row, self.column = nn.Embedding(SIDE, width), nn.Embedding(SIDE, width)
        for table in (self.label, self.code, self.row, self.column):
            nn.init.normal_(table.weight, std=0.3)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CODES)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, labels: Tensor, codes: Tensor, attends: list[Attend], cached: int = 0) -> Tensor:
        """
        Args:
            labels: int64 [B].
            codes: int64 [B, n], those before the positions that are asked for; fewer by one than those, if the first
                position is among them.
            attends: what attention is, for every layer.
            cached: positions that ``attends`` know already.

        Returns:
            logits [B, positions, CODES] of positions ``cached`` and on.
        """
        # The class goes to every position, and stands in the place of a code before the first.
        h = self.label(labels)[:, None]
        positions = torch.arange(cached, codes.shape[1] + cached + (cached == 0))
        before = self.code(codes)
        if cached == 0:
            before = F.pad(before, (0, 0, 1, 0))
        h = self.dropout(h + before + self.row(positions // SIDE) + self.column(positions % SIDE))
        for layer, attend in zip(self.layers, attends):
            h = layer(h, attend)
        return self.head(self.norm(h))

    def loss(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Mean -log p (nats) of codes [B, 16]."""
        seen = partial(attention, mask=AttentionMask.causal(LENGTH))
        logits = self(labels, codes[:, :-1], [seen] * len(self.layers))
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def train(auto: Autoencoder, digits: Digits, steps: int, seed: int, progress) -> tuple[Prior, list[float]]:
    """The transformer with averaged weights, and the loss of every step; labels dropped one time in ten."""
    torch.manual_seed(seed)
    net = Prior()
    averaged = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses = []
    with progress(steps, "stage two") as bar:
        for step in range(steps):
            at = torch.randint(len(digits.train), (BATCH,))
            images = digits.train[at]
            codes = auto.encode(images + NOISE * torch.randn_like(images))
            labels = torch.where(torch.rand(BATCH) < 0.1, CLASSES, digits.train_labels[at])
            loss = net.loss(labels, codes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                keep = min(0.99, (1 + step) / (10 + step))
                for mean, p in zip(averaged.parameters(), net.parameters()):
                    mean.lerp_(p, 1 - keep)
            losses.append(loss.item())
            bar.update()
    return averaged, losses


@torch.no_grad()
def sample(net: Prior, labels: Tensor, choice: Choice, seed: int) -> tuple[Tensor, float]:
    """Codes int64 [B, 16] of classes [B], and the seconds outside of the network."""
    start, inside = time.perf_counter(), 0.0
    codes = labels.new_empty(len(labels), LENGTH)
    guided = choice.guidance != 1
    asked = torch.cat([labels, torch.full_like(labels, CLASSES)]) if guided else labels
    attends = [Kept(len(asked), net.heads, net.head_dim) for _ in net.layers]
    before = asked.new_empty(len(asked), 0)
    for i in range(LENGTH):
        began = time.perf_counter()
        logits = net(asked, before, attends, cached=i)[:, -1]
        inside += time.perf_counter() - began
        logits, *others = logits.chunk(2) if guided else [logits]
        codes[:, i] = sample_tokens(
            logits,
            uncond=others[0] if guided else None,
            guidance=choice.guidance if guided else None,
            temperature=1.0,
            top_k=choice.top_k,
            top_p=choice.top_p,
            confidence=None,
            seed=seed,
            stream=i,
        ).tokens
        before = codes[:, i : i + 1].repeat(1 + guided, 1)
    return codes, time.perf_counter() - start - inside
