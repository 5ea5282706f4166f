"""``VectorQuantize`` of vector-quantize-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor
from vector_quantize_pytorch import vector_quantize_pytorch as peer

from genfast.dropin.codes import nearest
from genfast.dropin.vector_quantize_pytorch import codebook
from genfast.dropin.vector_quantize_pytorch.rows import channel_last, restored
from genfast.ops._codes import grouped
from genfast.ops.code_update import quantize


class VectorQuantize(peer.VectorQuantize):
    """Vector quantisation: the peer's class with the nearest code, losses, gradients and moving averages in passes over
    the vectors, and no tensor of vectors by codes.

    Where codes are nearer to each other than the peer's rounding, ours is the nearest. Dead codes and k-means take
    their vectors by PyTorch's generator in the peer's order.

    The peer's own code runs for codes that are drawn (``stochastic_sample_codes``, ``straight_through``), for
    ``affine_param``, ``vq_bridge``, ``topk``, ``indices``, ``codebook_transform_fn``, and weights and accumulation of
    moving averages; in training also for ``directional_reparam``, ``sync_update_v``, orthogonality, diversity and
    cross entropy losses, an optimizer of the codebook, and a mask together with heads, projections or cosines.
    """

    def forward(
        self,
        x,
        indices=None,
        mask=None,
        lens=None,
        topk=None,
        sample_codebook_temp=None,
        freeze_codebook=None,
        return_loss_breakdown=False,
        codebook_transform_fn=None,
        ema_update_weight=None,
        accum_ema_update=False,
        ema_update=None,
    ):
        """As the peer's: (quantized, indices, loss), and the losses one by one if they are asked for."""

        def by_peer():
            return super(VectorQuantize, self).forward(
                x, indices, mask, lens, topk, sample_codebook_temp, freeze_codebook, return_loss_breakdown,
                codebook_transform_fn, ema_update_weight, accum_ema_update, ema_update,
            )  # fmt: skip

        special = (indices, topk, codebook_transform_fn, ema_update_weight, ema_update)
        dim = self.channel(x)
        if dim is None or accum_ema_update or any(option is not None for option in special):
            return by_peer()
        if lens is not None and (mask is not None or x.ndim != 3):
            return by_peer()
        there = mask if lens is None else peer.lens_to_mask(lens, x.shape[1])
        if not self._takes(x, there, dim):
            return by_peer()
        flat = channel_last(x, dim == 1 and x.ndim > 2) if self.has_projections else x
        rows, at = self._split(self.project_in(flat), flat.ndim - 1 if self.has_projections else dim)
        if rows.dtype != x.dtype:  # autocast
            return by_peer()

        z_q, found, commitment = self._quantized(
            rows, at, there, x.requires_grad and self.route_gradients_to_input,
            self.freeze_codebook if freeze_codebook is None else freeze_codebook,
        )  # fmt: skip
        if self.heads > 1 and not self.separate_codebook_per_head:
            found = found.movedim(at - 1, -1)
            z_q = z_q.flatten(at - 1, at)
        z_q = self.project_out(z_q)
        if self.has_projections and dim == 1 and x.ndim > 2:
            z_q, found = restored(z_q, x.shape, True), found.unflatten(1, x.shape[2:])
        if there is not None and not self.training:
            z_q = torch.where(there.unsqueeze(dim), z_q, 0 if self.return_zeros_for_masked_padding else x)
            found = torch.where(there if self.heads == 1 else there[..., None], found, -1)

        loss = self.zero
        if self.training:
            loss.requires_grad_()  # as the peer's, which has no gradient to give otherwise
        if self.training and self.has_commitment_loss:
            loss = loss + commitment * self.commitment_weight
        else:
            commitment = self.zero
        if not return_loss_breakdown:
            return z_q, found, loss
        return z_q, found, loss, peer.LossBreakdown(commitment, self.zero, self.zero, self.zero)

    def only_looks_up(self, x: Tensor) -> bool:
        """Whether ``forward(x)`` would only replace the vectors by their nearest codes, with nobody watching."""
        dim = self.channel(x)
        plain = self.heads == 1 and not self.has_projections and not self.use_cosine_sim and not self.training
        if dim is None or not plain or self._forward_hooks or self._forward_pre_hooks:
            return False
        return self._takes(x, None, dim) and not codebook.needs_init(self._codebook)

    def channel(self, x) -> int | None:
        """The dimension of x that holds the vectors; None where x is not what the arguments promise."""
        wanted = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else 3
        if not isinstance(x, Tensor) or (x.ndim != wanted and (x.ndim, wanted) != (2, 3)):
            return None
        dim = x.ndim - 1 if x.ndim == 2 or (wanted == 3 and self.channel_last) else 1
        return dim if x.shape[dim] == self.dim else None

    def _takes(self, x: Tensor, mask: Tensor | None, dim: int) -> bool:
        book = self._codebook
        if book.training != self.training or not codebook.takes(book, x):
            return False
        if mask is not None:
            lead = [n for d, n in enumerate(x.shape) if d != dim]
            if x.ndim != 3 or mask.dtype != torch.bool or list(mask.shape) != lead or mask.device != x.device:
                return False
        if not self.training:
            return True
        if mask is not None and (self.heads > 1 or self.has_projections or self.use_cosine_sim):
            return False
        if self.directional_reparam or self.sync_update_v or self.in_place_codebook_optimizer is not None:
            return False
        if self.has_codebook_orthogonal_loss or self.has_codebook_diversity_loss:
            return False
        cross_entropy = self.has_commitment_loss and self.commitment_use_cross_entropy_loss
        return not cross_entropy and codebook.plain_training(book)

    def _split(self, x: Tensor, dim: int) -> tuple[Tensor, int]:
        """The vectors of all heads, of length 1 for cosines, and their dimension. Heads with codebooks of their own lie
        in it one after the other; else they have the dimension before it."""
        at = dim
        if self.heads > 1:
            x, at = x.unflatten(dim, (self.heads, -1)), dim + 1
        if self.use_cosine_sim:
            x = peer.l2norm(x, dim=at)
        if at > dim and self.separate_codebook_per_head:
            x, at = x.flatten(dim, at), dim
        return x, at

    def _samples(self, rows: Tensor, at: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(float32 [G, N, D], mask [G, N] or None): the vectors as the peer orders them, heads outside positions."""
        if self.heads > 1 and not self.separate_codebook_per_head:
            vectors = rows.movedim(at, -1).movedim(at - 1, 1).flatten(0, -2)[None]
            if mask is not None:
                mask = mask[:, None].expand(-1, self.heads, -1)
        else:
            vectors = grouped(rows, at, self._codebook.num_codebooks).flatten(0, 1).transpose(0, 1)
        vectors = vectors.detach().float()
        return vectors, None if mask is None else mask.reshape(1, -1).expand(vectors.shape[0], -1)

    def _quantized(self, rows: Tensor, at: int, mask, routed: bool, frozen: bool):
        """(codes like rows, indices, commitment loss or None)."""
        book = self._codebook
        if codebook.needs_init(book):
            samples, there = self._samples(rows, at, mask)
            if there is not None:
                samples = samples[there].unflatten(0, (samples.shape[0], -1))
            codebook.init_by_kmeans(book, samples)
        codes = book.embed if book.num_codebooks > 1 else book.embed[0]
        if not book.learnable_codebook:
            codes = codes.detach()
        found = nearest(rows, codes, dim=at, metric="dot" if self.use_cosine_sim else "l2")
        if not self.training:
            out = quantize(rows.detach(), codes, dim=at, gradient="none", indices=found, return_usage=False)
            return out.z_q, found, None
        gradient = "none" if not routed else "rotation" if self.rotation_trick else "straight_through"
        without_code = "zeros" if self.return_zeros_for_masked_padding else "input"
        out = quantize(
            rows, codes, dim=at, gradient=gradient, mask=mask, without_code=without_code, indices=found,
            return_usage=False,
        )  # fmt: skip
        if not frozen:
            codebook.update(book, rows, found, at, mask, lambda: self._samples(rows, at, mask))
        commitment = out.commitment_loss
        if self.learnable_codebook and not frozen:
            commitment = commitment + (out.codebook_loss - out.codebook_loss.detach())
        return out.z_q, out.indices, commitment
