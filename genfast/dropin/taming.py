"""The vector quantiser of CompVis taming-transformers (``taming/modules/vqvae/quantize.py``), with no tensor of
vectors by codes:

    from genfast.dropin.taming import VectorQuantizer2

VQGAN of taming-transformers and of latent diffusion are trained and loaded with it: the only key of the state dict is
``embedding.weight`` (and ``used`` with ``remap``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from genfast.dropin.codes import nearest
from genfast.ops.code_update import quantize


class VectorQuantizer2(nn.Module):
    """Nearest code, losses and straight-through gradient of [B, C, H, W].

    Args:
        n_e, e_dim: how many codes, and of how many numbers.
        beta: the weight of the commitment loss; with ``legacy`` of the codebook loss instead.
        remap: a file of ``numpy.save`` with the codes that are used; indices are then positions in it.
        unknown_index: what an unused code's index becomes: ``"random"``, ``"extra"`` for one more, or a number.
        sane_index_shape: indices [B, H, W] instead of [B H W] (with ``remap`` [B H W, 1]).
        legacy: whether ``beta`` is on the codebook loss, as in models trained so far.
    """

    def __init__(
        self, n_e, e_dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True
    ):  # fmt: skip
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.remap, self.sane_index_shape = remap, sane_index_shape
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.tensor(np.load(remap)))
            self.re_embed = len(self.used) + (unknown_index == "extra")
            self.unknown_index = len(self.used) if unknown_index == "extra" else unknown_index

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        """(z_q like z, loss, (None, None, indices)): perplexity and one-hot matrix are not computed, as in the peer.

        Raises:
            ValueError: an option of the Gumbel quantiser is asked for.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("temp, rescale_logits and return_logits are for Gumbel quantisation only")
        codes = self.embedding.weight
        out = quantize(
            z, codes, dim=1, indices=nearest(z, codes, dim=1), return_usage=False,
            commitment_weight=1.0 if self.legacy else self.beta, codebook_weight=self.beta if self.legacy else 1.0,
        )  # fmt: skip
        indices = out.indices
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.reshape(-1) if self.remap is None else indices.reshape(-1, 1)
        return out.z_q.contiguous(), out.loss.to(z.dtype), (None, None, indices)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Positions in ``used`` of codes, of the same shape; see ``unknown_index`` for codes that are not there."""
        used, places = self.used.to(inds), torch.arange(len(self.used), device=inds.device)
        # The first place of a code that is there twice, as of an argmax.
        first = torch.full((self.n_e,), len(used), device=inds.device).scatter_reduce_(0, used, places, "amin")
        found = first[inds]
        unknown = found == len(used)
        if self.unknown_index == "random":
            found[unknown] = torch.randint(0, self.re_embed, found[unknown].shape, device=inds.device)
            return found
        return found.masked_fill_(unknown, self.unknown_index)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Codes of positions in ``used``; of the extra one the first."""
        used = self.used.to(inds)
        return used[torch.where(inds < len(used), inds, 0)]

    def get_codebook_entry(self, indices, shape):
        """The codes of indices, [..., C]; of ``shape`` (batch, height, width, channels) as [B, C, H, W]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2).contiguous()
