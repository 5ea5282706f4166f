"""``ResidualVQ`` and ``GroupedResidualVQ`` of vector-quantize-pytorch."""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import residual_vq as peer
from vector_quantize_pytorch import vector_quantize_pytorch as layers

from genfast.dropin.vector_quantize_pytorch.vector_quantize import VectorQuantize
from genfast.ops.residual_quantize import residual_quantize


class ResidualVQ(peer.ResidualVQ):
    """A stack of quantisers, each of what those before left over: the peer's class over our :class:`VectorQuantize`.

    Image feature maps may have any height and width. The peer's own loop runs, over our layers, for beam search,
    ``indices``, ``implicit_neural_codebook`` and ``diveq``.
    """

    @functools.wraps(peer.ResidualVQ.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        x,
        mask=None,
        indices=None,
        return_all_codes=False,
        sample_codebook_temp=None,
        freeze_codebook=False,
        beam_size=None,
        rand_quantize_dropout_fixed_seed=None,
    ):
        """As the peer's: (quantized, indices [..., Q], losses [Q]), and all codes if they are asked for."""
        beams = beam_size or (self.beam_size if self.training else self.eval_beam_size)
        if indices is not None or (beams or 1) > 1 or self.implicit_neural_codebook or self.diveq:
            return super().forward(
                x, mask, indices, return_all_codes, sample_codebook_temp, freeze_codebook, beam_size,
                rand_quantize_dropout_fixed_seed,
            )  # fmt: skip
        depth = self.num_quantizers
        if self.training and self.quantize_dropout:
            depth = self._kept(x, rand_quantize_dropout_fixed_seed)
        residual = self.project_in(x)
        if mask is None and not self.training:
            at_once = self._at_once(residual)
            if at_once is not None:
                total, found = at_once
                ret = (self.project_out(total), found, torch.stack([layer.zero for layer in self.layers]))
                return (*ret, self.get_codes_from_indices(found)) if return_all_codes else ret
        expiring = self.training and self.shared_codebook and self.layers[0]._codebook.has_dead_code_replacement
        total, residuals, found, losses = None, [], [], []
        for layer in self.layers[:depth]:
            if expiring:
                residuals.append(residual)
            codes, index, loss = layer(
                residual, mask=mask, sample_codebook_temp=sample_codebook_temp, freeze_codebook=freeze_codebook
            )
            if total is None:
                residual, total = residual - peer.frac_gradient(codes, self.quant_grad_frac), codes
            elif self.training or residual.requires_grad or codes.requires_grad:
                residual, total = residual - peer.frac_gradient(codes, self.quant_grad_frac), total + codes
            else:
                residual.sub_(codes)
                total.add_(codes)
            found.append(index)
            losses.append(loss)
        missing = self.num_quantizers - depth
        found += [torch.full_like(found[0], -1)] * missing
        losses += [torch.zeros_like(losses[0])] * missing

        if self.training and self.shared_codebook:
            if self.vq_is_ema_updating:
                self.layers[0]._codebook.update_ema()
                self.layers[0].update_in_place_optimizer()
            if expiring:
                self.layers[0].expire_codes_(self._joined(residuals))
        total = self.project_out(total)
        if mask is not None:
            total = torch.where(mask[..., None], total, 0 if self.return_zeros_for_masked_padding else x)
        ret = (total, torch.stack(found, -1), torch.stack(losses))
        return (*ret, self.get_codes_from_indices(ret[1])) if return_all_codes else ret

    def _at_once(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(sum of the codes, indices [..., Q]) of the whole stack in one call; None where a layer does more than take
        away the nearest of its codes, or a vector is not finite."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return None
        if not all(type(layer) is VectorQuantize and layer.only_looks_up(x) for layer in self.layers):
            return None
        books = [layer._codebook.embed[0] for layer in self.layers]
        if torch.is_grad_enabled() and any(book.requires_grad for book in books):
            return None
        indices, total = residual_quantize(x, books, dim=self.layers[0].channel(x), nonfinite="index")
        return None if int(indices.min()) < 0 else (total, indices)

    def _kept(self, x: Tensor, seed) -> int:
        """How many quantisers this training step has, drawn as the peer does."""
        seed = peer.get_maybe_sync_seed(x.device) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        kept = last + 1 if multiple == 1 else peer.round_up_multiple(last + 1, multiple)
        return min(kept, self.num_quantizers)

    def _joined(self, residuals: list[Tensor]) -> Tensor:
        """What every layer was given, [B, N Q, D], a position's next to each other, as the peer orders them."""
        if self.accept_image_fmap:
            residuals = [t.flatten(2).mT for t in residuals]
        return torch.stack(residuals, -2).flatten(-3, -2)


class GroupedResidualVQ(peer.GroupedResidualVQ):
    """A :class:`ResidualVQ` for each group of channels."""

    @functools.wraps(peer.GroupedResidualVQ.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        adopt(self)


OURS = {
    layers.VectorQuantize: VectorQuantize,
    peer.ResidualVQ: ResidualVQ,
    peer.GroupedResidualVQ: GroupedResidualVQ,
}


def adopt(model: nn.Module) -> nn.Module:
    """Make the peer's quantisers within a model ours, in place; parameters and buffers stay what they are.

    Returns:
        ``model``.
    """
    for module in model.modules():
        module.__class__ = OURS.get(type(module), type(module))
    return model
