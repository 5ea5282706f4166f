"""``LFQ`` of vector-quantize-pytorch, which with ``spherical`` is BSQ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import lookup_free_quantization as peer

from genfast.dropin.vector_quantize_pytorch.rows import FUSED_DTYPES, channel_last, restored
from genfast.ops.scalar_quantize import MOST_BLOCK_BITS, BinaryLosses, bsq_quantize, lfq_quantize

LEAST = 1e-5
"""The least argument of the peer's logarithms."""


class LFQ(peer.LFQ):
    """Lookup-free quantisation: the peer's class with :func:`lfq_quantize` in the place of its arithmetic, and no
    tensor of rows by codes.

    Fused for float32, and for half precision where it is quantised in float32 (``force_quantization_f32``, the
    default). The peer's own code runs where only a fraction of the rows counts in the entropy
    (``frac_per_sample_entropy``), under another ``straight_through_activation``, and beyond 2^22 codes.
    """

    def forward(self, x, inv_temperature=100.0, return_loss_breakdown=False, mask=None):
        """As the peer's: (quantized, indices, entropy_aux_loss), and the losses one by one if they are asked for."""
        move = x.ndim >= 4 if self.channel_first is None else self.channel_first
        known = x.ndim >= 3 and (move or x.ndim == 3) and x.shape[1 if move else -1] == self.dim
        if not known or not self._fused(inv_temperature, mask):
            return super().forward(x, inv_temperature, return_loss_breakdown, mask)
        rows = self.project_in(channel_last(x, move))
        if rows.dtype not in FUSED_DTYPES or not (self.force_quantization_f32 or rows.dtype == torch.float32):
            return super().forward(x, inv_temperature, return_loss_breakdown, mask)
        if self.soft_clamp_input_value is not None:
            rows = (rows / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        split = (self.num_codebooks, self.codebook_dim)
        if self.orthogonal_rotation:
            rows = (rows.unflatten(-1, split) @ self.orthogonal_rot).flatten(2)

        quantize = bsq_quantize if self.spherical else lfq_quantize
        options = dict(groups=self.num_codebooks, scale=self.codebook_scale)
        if self.training:
            codes, indices, losses = quantize(
                rows, return_losses=True, inv_temperature=inv_temperature, least_probability=LEAST, mask=mask, **options
            )
            breakdown, aux_loss = self._losses(losses, mask)
        else:
            codes, indices = quantize(rows.detach(), **options)
            breakdown, aux_loss = (self.zero,) * 3, self.zero * self.entropy_loss_weight

        if self.orthogonal_rotation:
            codes = (codes.unflatten(-1, split) @ self.orthogonal_rot.t()).flatten(2)
        out = restored(self.project_out(codes), x.shape, move)
        if move:
            indices = indices.unflatten(1, x.shape[2:])
        found = peer.Return(out, indices if self.keep_num_codebooks_dim else indices.squeeze(-1), aux_loss)
        return (found, peer.LossBreakdown(*breakdown)) if return_loss_breakdown else found

    def _fused(self, inv_temperature, mask) -> bool:
        plain = type(self.activation) is nn.Identity and self.frac_per_sample_entropy == 1.0
        fits = self.codebook_dim <= MOST_BLOCK_BITS and inv_temperature > 0 and self.codebook_scale > 0
        masked = mask is not None and (mask.dtype != torch.bool or mask.ndim != 2 or peer.is_distributed())
        return plain and fits and not masked

    def _losses(self, losses: BinaryLosses, mask) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """((per-sample entropy, codebook entropy, commitment), their weighted sum), over all processes as the peer."""
        batch = losses.batch_entropy
        if mask is not None:
            # The peer then averages over no rows: each row's probabilities are taken for a codebook's.
            batch = losses.per_sample_entropy
        elif peer.is_distributed():
            batch = peer.entropy(peer.maybe_distributed_mean(losses.mean_probability[:, 0])).mean()
        entropy = losses.per_sample_entropy - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            entropy = F.softplus(entropy + self.entropy_loss_offset)
        commitment = losses.commitment if self.commitment_loss_weight > 0 else self.zero
        aux_loss = entropy * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        return (losses.per_sample_entropy, batch, commitment), aux_loss
