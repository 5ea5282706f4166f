"""Training by two objectives in turn, so that one network serves every sampler.

A batch is either whole texts with one level of noise each, as LLaDA and MDLM are trained, or noisy blocks that see the
clean text before them, as block diffusion is.
"""

from __future__ import annotations

import functools
import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from genfast.attention_mask import AttentionMask
from genfast.demo.text.data import MASK, Corpus
from genfast.demo.text.network import BLOCK, LENGTH, Network
from genfast.demo.text.optimizer import Muon
from genfast.demo.text.transformer import whole
from genfast.ops.token_masking import forward_mask

BATCH = 16
STEPS = {True: 2600, False: 1000}
"""By default, with and without fast bfloat16: what two cores do in about two minutes."""


def train(corpus: Corpus, steps: int, seed: int, progress, bfloat16: bool = False) -> Network:
    """A network trained on random windows of the corpus, whole texts and blocks in turn."""
    torch.manual_seed(seed)
    net = Network()
    net.bfloat16 = bfloat16
    counts = torch.bincount(corpus.train, minlength=MASK) + 1.0
    net.head.bias.data = (counts / counts.sum()).log()
    matrices = [part.weight for layer in net.layers for part in (layer.qkv, layer.out, layer.up, layer.down)]
    others = [p for p in net.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
        Muon(matrices, lr=0.02, dtype=torch.bfloat16 if bfloat16 else torch.float32),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    with progress(steps, "training") as bar:
        for step in range(steps):
            factor = min(1.0, (step + 1) / (0.03 * steps), (1 - step / steps) / 0.6)
            for rate, group in zip(rates, (g for optimizer in optimizers for g in optimizer.param_groups)):
                group["lr"] = rate * factor
            blocks = step % 2 == 1
            at = torch.randint(len(corpus.train) - LENGTH, (BATCH // 2 if blocks else BATCH, 1))
            x0 = corpus.train[at + torch.arange(LENGTH)]
            noisy = forward_mask(
                x0, mask_id=MASK, block_size=BLOCK if blocks else None, antithetic=True, seed=seed, stream=step
            )
            # Half the bound, whose weight 1 / p favours little noise, half all masked characters alike: that learns
            # faster than either.
            weight = noisy.weight[noisy.mask] / x0.numel() + 1 / noisy.mask.sum()
            loss = (cross_entropy(net, x0, noisy.x, noisy.mask, blocks) * weight).sum() / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            net.zero_grad(set_to_none=True)
            bar.update()
    return net.eval()


@functools.cache
def block_diffusion(length: int) -> AttentionMask:
    return AttentionMask.block_diffusion(length, BLOCK)


def cross_entropy(net: Network, x0: Tensor, x: Tensor, mask: Tensor, blocks: bool) -> Tensor:
    """-log p (nats) of the masked characters of x [B, L], in the order of ``x0[mask]``.

    With ``blocks`` a block sees itself and the clean blocks before it, by one pass over x followed by x0.
    """
    if blocks:
        length = x0.shape[1]
        attend = whole(net.rope, torch.arange(length).repeat(2), block_diffusion(length))
        logits = net.logits(torch.cat([x, x0], 1), attend)[:, :length]
    else:
        logits = net(x).logits
    return F.cross_entropy(logits[mask], x0[mask], reduction="none")


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices at least twice as fast as float32 ones."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(2048, 128, dtype=dtype), torch.ones(512, 128, dtype=dtype)
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            F.linear(a, b)
            best = min(best, time.perf_counter() - start)
        return best

    return 2 * seconds(torch.bfloat16) < seconds(torch.float32)
