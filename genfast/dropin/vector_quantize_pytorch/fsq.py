"""``FSQ`` of vector-quantize-pytorch."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from vector_quantize_pytorch import finite_scalar_quantization as peer

from genfast.dropin.vector_quantize_pytorch.rows import FUSED_DTYPES, channel_last, restored
from genfast.ops.scalar_quantize import MOST_BITS, fsq_quantize

MOST_LEVELS = 1000
"""From 1001 on, the peer's tanh reaches beyond the outer level."""


class FSQ(peer.FSQ):
    """Finite scalar quantisation: the peer's class with :func:`fsq_quantize` in the place of its arithmetic.

    Fused for float32, and for half precision where it is quantised in float32 (``force_quantization_f32``, the
    default). Noise comes from PyTorch's generator in the peer's order.
    """

    @functools.wraps(peer.FSQ.__init__)
    def __init__(self, levels, *args, **kwargs):
        super().__init__(levels, *args, **kwargs)
        self._counts = [int(count) for count in levels]
        self._fits = math.prod(self._counts) <= 1 << MOST_BITS and max(self._counts) <= MOST_LEVELS

    def forward(self, z):
        """As the peer's: (quantized, indices)."""
        move = z.ndim >= 4 or self.channel_first
        if not self._fits or z.ndim < 3 or (z.ndim > 3 and not move) or z.shape[1 if move else -1] != self.dim:
            return super().forward(z)
        x = self.project_in(channel_last(z, move))
        wide = x.dtype == torch.float32
        widened = x.dtype in FUSED_DTYPES and x.dtype not in self.allowed_dtypes and self.force_quantization_f32
        if not wide and not widened:
            return super().forward(z)
        split = (self.num_codebooks, self.codebook_dim)
        if self.orthogonal_rotation:
            x = (x.unflatten(-1, split) @ self.orthogonal_rot).flatten(2)
        codes, indices = fsq_quantize(
            x, self._counts, groups=self.num_codebooks, symmetric=self.preserve_symmetry, clamp=self.bound_hard_clamp,
            noise=self._noise(x, split, move) if self.training and self.noise_dropout > 0 else None,
        )  # fmt: skip
        if self.orthogonal_rotation:
            codes = (codes.unflatten(-1, split) @ self.orthogonal_rot.t()).flatten(2)
        out = restored(self.project_out(codes), z.shape, move)
        if not self.return_indices:
            return out, None
        indices = indices.int()
        if move:
            indices = indices.unflatten(1, z.shape[2:])
        return out, indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def _noise(self, x: Tensor, split: tuple[int, int], move: bool) -> Tensor:
        """The peer's draws for x [B, N, C D], whose order is that of memory; the peer copies what it moves."""
        kept = torch.contiguous_format if move else torch.preserve_format
        like = torch.empty_like(x.unflatten(-1, split), dtype=torch.float32, memory_format=kept)
        chosen = torch.full_like(like, self.noise_dropout).bernoulli_().bool()
        return torch.where(chosen, torch.rand_like(like) - 0.5, 0.0).flatten(2)
