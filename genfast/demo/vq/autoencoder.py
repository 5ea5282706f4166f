"""Stage one: an autoencoder whose bottleneck is a 4 x 4 grid of codes (VQ-VAE, van den Oord et al. 2017).

The codebook begins with k-means and follows moving averages of the encoder's vectors (VQ-VAE-2); a code that nobody
uses gets a vector of the batch. Gradients pass the bottleneck by the rotation trick (Fifty et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genfast.demo.data import Digits
from genfast.ops.code_update import Quantized, ema_update_, quantize
from genfast.ops.kmeans import kmeans
from genfast.ops.vector_quantize import nearest_code

CODES, SIZE, SIDE = 64, 8, 4
"""Codes in the codebook, numbers in a code, codes along a side of the grid."""
BATCH = 128
COMMITMENT = 0.25
DECAY, DEAD = 0.9, 0.5
"""Of the moving averages, over some ten steps only as the training is short; the vectors of a batch below which a code
is dead."""


class Residual(nn.Module):
    """Two convolutions over the grid, added to what goes in."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(F.silu(self.norm(h)))))


class Autoencoder(nn.Module):
    """Images [B, 1, 8, 8] to vectors [B, SIZE, 4, 4], vectors to codes, and codes back to images."""

    def __init__(self, width: int = 48, blocks: int = 2):
        super().__init__()

        def body() -> list[nn.Module]:
            return [Residual(width) for _ in range(blocks)]

        self.encoder = nn.Sequential(nn.Conv2d(1, width, 2, stride=2), *body(), nn.Conv2d(width, SIZE, 1))
        leave = nn.Conv2d(width, 4, 1), nn.PixelShuffle(2)
        self.decoder = nn.Sequential(nn.Conv2d(SIZE, width, 1), *body(), *leave)
        self.register_buffer("codebook", torch.zeros(CODES, SIZE))
        self.register_buffer("cluster_size", torch.zeros(CODES))
        self.register_buffer("embed_avg", torch.zeros(CODES, SIZE))

    @torch.no_grad()
    def initialise_codes(self, images: Tensor, seed: int) -> None:
        """Codes in the middle of clusters of what the encoder says of ``images`` now."""
        centres, sizes = kmeans(self.encoder(images), CODES, seed=seed, dim=1)
        # As if the averages had been of batches so far.
        self.cluster_size.copy_(sizes * (BATCH / len(images)))
        self.embed_avg.copy_(centres * self.cluster_size[:, None])
        self.codebook.copy_(centres)

    def quantize(self, z: Tensor) -> Quantized:
        return quantize(z, self.codebook, dim=1, gradient="rotation", commitment_weight=COMMITMENT, codebook_weight=0.0)

    def update_codes(self, z: Tensor, indices: Tensor, seed: int, step: int) -> None:
        """The moving averages a batch further."""
        ema_update_(
            self.codebook, self.cluster_size, self.embed_avg, z, indices,
            decay=DECAY, dim=1, threshold=DEAD, reset_cluster_size=1.0, seed=seed, offset=step,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """int64 [B, 16]: the codes of images, row by row of the grid."""
        return nearest_code(self.encoder(images), self.codebook, dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] in [-1, 1] of codes [B, 16]."""
        return self.decoder(self.codebook[codes].mT.unflatten(2, (SIDE, SIDE))).clamp(-1, 1)


def train(digits: Digits, steps: int, seed: int, progress) -> tuple[Autoencoder, list[float]]:
    """The autoencoder, and the squared error of every step. An eighth of the steps goes by without codes, so that
    k-means finds vectors that mean something."""
    torch.manual_seed(seed)
    net = Autoencoder()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    errors = []
    with progress(steps, "stage one") as bar:
        for step in range(steps):
            if step == steps // 8:
                net.initialise_codes(digits.train, seed)
            coded = step >= steps // 8
            x = digits.train[torch.randint(len(digits.train), (BATCH,))]
            z = net.encoder(x)
            found = net.quantize(z) if coded else None
            error = (net.decoder(found.z_q if coded else z) - x).square().mean()
            optimizer.zero_grad(set_to_none=True)
            (error + found.loss if coded else error).backward()
            optimizer.step()
            schedule.step()
            if coded:
                net.update_codes(z, found.indices, seed, step)
            errors.append(error.item())
            bar.update()
    return net.eval(), errors


def perplexity(counts: Tensor) -> float:
    """How many codes used alike would be as varied as these: exp of the entropy of ``counts`` [K]."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp().item()


def psnr(images: Tensor, originals: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return -10 * ((images - originals).square().mean() / 4).log10().item()
