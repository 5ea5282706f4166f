"""The multi-scale quantiser of VAR (``models/quant.py``), with no tensor of vectors by codes:

    from genfast.dropin.var import VectorQuantizer2

in ``models/vqvae.py``. Parameters, buffers and the keys of the state dict (``embedding.weight``, ``quant_resi...``,
``ema_vocab_hit_SV``) are VAR's, so that its published checkpoints load.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.ops.multiscale_quantize import (
    MultiscaleQuantized,
    multiscale_inputs,
    multiscale_residual_quantize,
    multiscale_step,
)
from genfast.reference.multiscale_quantize import place_of

__all__ = ["VectorQuantizer2"]


class Phi(nn.Conv2d):
    """A 3 x 3 convolution of which the share ``quant_resi`` counts; the rest of the map stays as it is."""

    def __init__(self, embed_dim, quant_resi):
        super().__init__(embed_dim, embed_dim, kernel_size=3, padding=1)
        self.resi_ratio = abs(quant_resi)

    def forward(self, h_BChw):
        return h_BChw * (1 - self.resi_ratio) + super().forward(h_BChw) * self.resi_ratio


class PhiShared(nn.Module):
    """One for all scales."""

    def __init__(self, qresi):
        super().__init__()
        self.qresi = qresi

    def all(self) -> list[nn.Module]:
        return [self.qresi]

    def __getitem__(self, at_from_0_to_1: float) -> nn.Module:
        return self.qresi


class PhiPartiallyShared(nn.Module):
    """Each for some neighbouring scales."""

    def __init__(self, qresi_ls):
        super().__init__()
        self.qresi_ls = qresi_ls

    def all(self) -> list[nn.Module]:
        return list(self.qresi_ls)

    def __getitem__(self, at_from_0_to_1: float) -> nn.Module:
        return self.qresi_ls[place_of(at_from_0_to_1, len(self.qresi_ls))]


class PhiNonShared(nn.ModuleList):
    """One for each scale."""

    def all(self) -> list[nn.Module]:
        return list(self)

    def __getitem__(self, at_from_0_to_1: float) -> nn.Module:
        return super().__getitem__(place_of(at_from_0_to_1, len(self)))


class VectorQuantizer2(nn.Module):
    """Codes of a map from coarse to fine, with VAR's arguments, methods and returns.

    The code is the nearest of the vectors as float32 has them, where VAR's distances are rounded; an image of which a
    number is not finite has code 0 everywhere. ``forward`` returns the sum of the codes itself, which VAR rounds to the
    bits that are left beside its input.

    Args:
        vocab_size, Cvae: how many codes, and of how many numbers.
        using_znorm: compare directions instead of distances.
        beta: the weight of the commitment loss.
        v_patch_nums: the sides of the scales, from small to large.
        quant_resi: the share of the convolutions; 0 for none.
        share_quant_resi: how many convolutions the scales share; 0 for one each, or ``default_qresi_counts``.
    """

    def __init__(
        self, vocab_size, Cvae, using_znorm, beta: float = 0.25, default_qresi_counts=0, v_patch_nums=None,
        quant_resi=0.5, share_quant_resi=4,
    ):  # fmt: skip
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums, self.quant_resi_ratio = v_patch_nums, quant_resi
        count = share_quant_resi or default_qresi_counts or len(v_patch_nums)
        phis = [Phi(Cvae, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity() for _ in range(count)]
        if share_quant_resi == 0:
            self.quant_resi = PhiNonShared(phis)
        elif share_quant_resi == 1:
            self.quant_resi = PhiShared(phis[0])
        else:
            self.quant_resi = PhiPartiallyShared(nn.ModuleList(phis))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(v_patch_nums), vocab_size))
        self.record_hit = 0
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.prog_si = -1

    def eini(self, eini):
        """Draw the codes anew: normal of that deviation, or below 0 uniform of that over ``vocab_size``."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight.data, std=eini)
        elif eini < 0:
            self.embedding.weight.data.uniform_(eini / self.vocab_size, -eini / self.vocab_size)

    def extra_repr(self) -> str:
        scales = f"S={len(self.v_patch_nums)}, quant_resi={self.quant_resi_ratio}"
        return f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}  |  {scales}"

    def forward(self, f_BChw, ret_usages=False):
        """(f_hat float32, how much of the codebook each scale uses in percent or None, loss)."""
        out = self._quantized(f_BChw.float(), self.v_patch_nums, return_usage=True)
        if self.training and dist.is_initialized():
            self._record(out.usage.float())
        usages = None
        if ret_usages:
            world = dist.get_world_size() if dist.is_initialized() else 1
            margin = world * (f_BChw.numel() / f_BChw.shape[1]) / self.vocab_size * 0.08
            usages = [(hits >= margin).float().mean().item() * 100 for hits in self.ema_vocab_hit_SV]
        return out.z_q, usages, out.loss

    def embed_to_fhat(self, ms_h_BChw: list[Tensor], all_to_max_scale=True, last_one=False) -> list[Tensor] | Tensor:
        """The map after each scale, or after the last, of the scales' codes [B, C, h, w]."""
        maps, f_hat = [], None
        for si, (h_BChw, pn) in enumerate(zip(ms_h_BChw, self.v_patch_nums)):
            if all_to_max_scale:
                f_hat, _ = multiscale_step(f_hat, h_BChw, si, self.v_patch_nums, phi=self.quant_resi.all())
            else:
                h = self.quant_resi[self._position(si)](h_BChw.float())
                f_hat = h if f_hat is None else F.interpolate(f_hat, size=(pn, pn), mode="bicubic") + h
            maps.append(f_hat)
        return maps[-1] if last_one else maps

    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums=None) -> list[Tensor]:
        """For each scale the map so far, or int64 [B, h w]."""
        scales = v_patch_nums or self.v_patch_nums
        out = self._quantized(f_BChw.detach(), scales, return_usage=False, return_partial=to_fhat)
        kept = len(scales) if self.prog_si < 0 else self.prog_si + 1
        if to_fhat:
            return list(out.partial[:kept])
        return [index.flatten(1).clamp_min(0) for index in out.indices[:kept]]

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[Tensor]) -> Tensor | None:
        """[B, L, C] float32: what VAR is given in training, for all scales but the first; None if there are none."""
        kept = len(self.v_patch_nums) - 1
        if self.prog_si >= 0:
            kept = min(kept, self.prog_si)
        if kept == 0:
            return None
        inputs = multiscale_inputs(
            gt_ms_idx_Bl, self.embedding.weight, self.v_patch_nums, phi=self.quant_resi.all()
        )  # fmt: skip
        return inputs[:, : sum(pn * pn for pn in self.v_patch_nums[1 : kept + 1])]

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """(f_hat with scale ``si``, written in its place; the next scale's input).

        Raises:
            ValueError: ``SN`` is not the number of scales.
        """
        if len(self.v_patch_nums) != SN:
            raise ValueError(f"SN is {SN}; expected {len(self.v_patch_nums)}, as v_patch_nums has")
        total, following = multiscale_step(f_hat, h_BChw, si, self.v_patch_nums, phi=self.quant_resi.all())
        f_hat.copy_(total)
        return f_hat, f_hat if si + 1 == SN else following

    def _position(self, si: int) -> float:
        return si / max(len(self.v_patch_nums) - 1, 1)

    def _quantized(self, f: Tensor, scales, **options) -> MultiscaleQuantized:
        return multiscale_residual_quantize(
            f, self.embedding.weight, scales, phi=self.quant_resi.all(), nonfinite="index",
            metric="cosine" if self.using_znorm else "l2", commitment_weight=self.beta, **options,
        )  # fmt: skip

    def _record(self, hits: Tensor) -> None:
        """Moving averages of how often each scale takes each code, over all ranks."""
        dist.all_reduce(hits)
        for average, new in zip(self.ema_vocab_hit_SV, hits):
            keep = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
            average.mul_(keep).add_(new, alpha=1 - keep)
            self.record_hit += 1
