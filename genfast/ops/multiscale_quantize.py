"""Multi-scale residual quantisation (VAR) of the family ``vector_quantize``: ``quantize`` on maps of growing size.

It has no kernels of its own, only those of ``vector_quantize`` and ``code_update``: between them stand PyTorch's area
and bicubic interpolation and a function of the caller's. Its cases are with ``residual_quantize``. It has not been
timed as a whole; of its parts ``nearest_code`` and ``quantize`` have benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast._registry import export
from genfast.ops._codes import check_vectors
from genfast.ops.code_update import quantize
from genfast.reference.multiscale_quantize import place_of

FAMILY = "vector_quantize"
Phi = Callable[[Tensor], Tensor]
Scales = Sequence[int | tuple[int, int]]


@export(FAMILY)
class MultiscaleQuantized(NamedTuple):
    """What :func:`multiscale_residual_quantize` returns: the sum of all scales, their codes, losses and usage."""

    z_q: Tensor
    """[B, C, H, W] of z's dtype: the sum of what the scales add."""
    indices: tuple[Tensor, ...]
    """For each scale int64 [B, h, w]."""
    loss: Tensor
    """commitment_weight commitment_loss + codebook_weight codebook_loss, float32 (float64 of float64)."""
    commitment_loss: Tensor
    """The mean over scales of mean (z - sg(sum so far))^2."""
    codebook_loss: Tensor
    """The mean over scales of mean (sg(z) - sum so far)^2: the same number, whose gradient goes to codebook and phi."""
    usage: Tensor | None
    """int64 [S, K]: how often each scale took each code."""
    partial: tuple[Tensor, ...] | None
    """The sums after each scale, [B, C, H, W] of z's dtype, without gradients."""


@export(FAMILY)
def multiscale_residual_quantize(
    z: Tensor,
    codebook: Tensor,
    scales: Scales,
    *,
    phi: Phi | Sequence[Phi] | None = None,
    metric: str = "l2",
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    precision: str = "exact",
    nonfinite: str = "raise",
    return_usage: bool = True,
    return_partial: bool = False,
) -> MultiscaleQuantized:
    """A map as a pyramid of codes, from coarse to fine: each scale quantises what the scales before have left.

    For each scale (h, w): what is left, averaged down to h x w; the nearest code of each place, exactly as
    :func:`nearest_code` has it; the codes, interpolated (bicubic) to H x W and passed through phi, are added to the sum
    and taken from what is left. All of it in float32 (float64 of float64), under autocast too.

    Args:
        z: [B, C, H, W], with any dtype and strides.
        codebook: [K, C], which all scales share.
        scales: h or (h, w) of each scale. The last is z's own (H, W).
        phi: a function of maps [B, C, H, W], such as VAR's convolution; or several of them (a ``ModuleList``), spread
            evenly over the scales: as many as there are scales, or fewer. None adds the codes as they are.
        metric: ``"cosine"`` compares directions, and adds the codes as they are stored.
        precision, nonfinite: as in :func:`nearest_code`. With ``"index"`` the whole image of a number that is not
            finite has -1 and NaN.
        commitment_weight, codebook_weight: of ``loss``; by default VAR's.
        return_usage: whether to count.
        return_partial: whether to keep the sums after each scale.

    Returns:
        :class:`MultiscaleQuantized`. Differentiable: z_q hands its gradient to z as it is (straight-through), the
        losses theirs to z, to the codebook, and to what phi learns.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; a vector that is not
            finite (on the CPU).
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Tian et al. 2024 (VAR, arXiv:2404.02905), algorithm 1. The arithmetic:
    ``genfast/reference/multiscale_quantize.py``.
    """
    check_vectors("z", z)
    if z.dim() != 4:
        raise ValueError(f"z is {list(z.shape)}; expected [B, C, H, W]")
    size = tuple(z.shape[2:])
    scales, functions = _checked_scales(scales), _checked_phi(phi)
    if scales[-1] != size:
        raise ValueError(f"scales must end with z's own size {size}; got {scales[-1]}")
    _check_book(codebook, z.device, z.shape[1])
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    left = target = wide.detach()
    total: Tensor | float = 0.0
    commitment = of_codes = wide.new_zeros(())
    indices, usage, partial = [], [], []
    with torch.autocast(z.device.type, enabled=False):
        for s, scale in enumerate(scales):
            found = quantize(
                _averaged(left, scale), codebook, dim=1, metric=metric, gradient="none", precision=precision,
                nonfinite=nonfinite, return_usage=return_usage,
            )  # fmt: skip
            codes = found.z_q
            if nonfinite == "index" or z.device.type != "cpu":
                codes = codes.masked_fill((found.indices < 0)[:, None], torch.nan)
            added = _of_scale(functions, s, len(scales))(_enlarged(codes, size))
            total = total + added
            left = left - added.detach()
            of_codes = of_codes + F.mse_loss(total, target)
            commitment = commitment + F.mse_loss(wide, total.detach())
            indices.append(found.indices)
            usage.append(found.usage)
            if return_partial:
                partial.append(total.detach().to(z.dtype))
    commitment, of_codes = commitment / len(scales), of_codes / len(scales)
    # The difference of z from itself is 0 and has the gradient: not a bit of the sum is lost to z's rounding.
    z_q = total.detach() + (wide - target) if wide.requires_grad else total.detach()
    return MultiscaleQuantized(
        z_q.to(z.dtype),
        tuple(indices),
        commitment_weight * commitment + codebook_weight * of_codes,
        commitment,
        of_codes,
        torch.stack(usage) if return_usage else None,
        tuple(partial) if return_partial else None,
    )


@export(FAMILY)
def multiscale_codes(
    indices: Sequence[Tensor],
    codebook: Tensor,
    scales: Scales,
    *,
    phi: Phi | Sequence[Phi] | None = None,
    return_partial: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The map of the indices of :func:`multiscale_residual_quantize`, for a decoder.

    Args:
        indices: for each scale int64 [B, h, w] or [B, h w]; of fewer scales than there are, the sum of these.
        codebook, scales, phi: as they were.
        return_partial: the maps after each scale instead, a tuple.

    Returns:
        [B, C, H, W], float32 (float64 of a float64 codebook). Differentiable with respect to the codebook.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
    """
    scales, functions = _checked_scales(scales), _checked_phi(phi)
    found = _sums(_checked_indices(indices, codebook, scales), codebook, scales, functions)
    return tuple(found) if return_partial else found[-1]


@export(FAMILY)
def multiscale_inputs(
    indices: Sequence[Tensor], codebook: Tensor, scales: Scales, *, phi: Phi | Sequence[Phi] | None = None
) -> Tensor:
    """What a transformer that writes the scales of a map one by one is given in training (teacher forcing).

    Its input for a scale is the sum of the scales before it, averaged down to that scale. The first scale has none.

    Args:
        indices, codebook, scales, phi: as in :func:`multiscale_codes`; the last scale's indices may be left out.

    Returns:
        [B, L, C], L the places of all scales but the first; float32 (float64 of a float64 codebook).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
    """
    scales, functions = _checked_scales(scales), _checked_phi(phi)
    if len(indices) < len(scales) - 1:
        raise ValueError(f"indices has {len(indices)} scales; expected at least {len(scales) - 1}")
    maps = _checked_indices(indices, codebook, scales)[: len(scales) - 1]
    inputs = [_averaged(total, scale) for total, scale in zip(_sums(maps, codebook, scales, functions), scales[1:])]
    if not inputs:
        return codebook.new_empty(len(indices[0]), 0, codebook.shape[1], dtype=_wide(codebook))
    return torch.cat([t.flatten(2) for t in inputs], 2).mT.contiguous()


@export(FAMILY)
def multiscale_step(
    f_hat: Tensor | None, codes: Tensor, scale: int, scales: Scales, *, phi: Phi | Sequence[Phi] | None = None
) -> tuple[Tensor, Tensor]:
    """A map with one more scale, and what a transformer is given to write the next one.

    Args:
        f_hat: [B, C, H, W], the sum of the scales before; None for the first.
        codes: [B, C, h, w], codes of scale number ``scale``, or mixtures of codes.
        scales, phi: as in :func:`multiscale_codes`.

    Returns:
        (f_hat with this scale, the input of the next: it averaged down to that scale, after the last scale itself).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
    """
    scales, functions = _checked_scales(scales), _checked_phi(phi)
    if isinstance(scale, bool) or not isinstance(scale, int) or not 0 <= scale < len(scales):
        raise ValueError(f"scale must be a whole number from 0 to {len(scales) - 1}, got {scale!r}")
    check_vectors("codes", codes)
    if codes.dim() != 4 or tuple(codes.shape[2:]) != scales[scale]:
        raise ValueError(f"codes is {list(codes.shape)}; expected [B, C, {', '.join(map(str, scales[scale]))}]")
    with torch.autocast(codes.device.type, enabled=False):
        added = _enlarged(codes.to(_wide(codes)), scales[-1])
        added = _of_scale(functions, scale, len(scales))(added)
        if f_hat is not None:
            check_vectors("f_hat", f_hat)
            if f_hat.shape != added.shape:
                raise ValueError(f"f_hat is {list(f_hat.shape)}; expected {list(added.shape)}")
            added = f_hat + added
        return added, added if scale + 1 == len(scales) else _averaged(added, scales[scale + 1])


# --- what they share -------------------------------------------------------------------------------------------------


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _averaged(t: Tensor, size: tuple[int, int]) -> Tensor:
    return t if tuple(t.shape[2:]) == size else F.interpolate(t, size=size, mode="area")


def _enlarged(t: Tensor, size: tuple[int, int]) -> Tensor:
    return t if tuple(t.shape[2:]) == size else F.interpolate(t, size=size, mode="bicubic")


def _of_scale(functions: list[Phi], s: int, scales: int) -> Phi:
    return functions[place_of(s / max(scales - 1, 1), len(functions))] if functions else lambda t: t


def _sums(maps: list[Tensor], codebook: Tensor, scales, functions) -> list[Tensor]:
    """The map after each scale."""
    found: list[Tensor] = []
    book = codebook.to(_wide(codebook))
    for s, index in enumerate(maps):
        codes = F.embedding(index, book).movedim(-1, 1)
        found.append(multiscale_step(found[-1] if found else None, codes, s, scales, phi=functions)[0])
    return found


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked_scales(scales) -> list[tuple[int, int]]:
    found = [(s, s) if isinstance(s, int) else tuple(s) for s in scales]
    fits = all(len(s) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in s) for s in found)
    if not found or not fits:
        raise ValueError(f"scales must be whole numbers h or pairs (h, w), at least one of them; got {list(scales)!r}")
    return found


def _checked_phi(phi) -> list[Phi]:
    found = [] if phi is None else [phi] if callable(phi) and not isinstance(phi, torch.nn.ModuleList) else list(phi)
    if not all(callable(function) for function in found):
        raise TypeError("phi must be a function of maps, or several of them")
    return found


def _check_book(codebook, device, size: int | None = None) -> None:
    check_vectors("codebook", codebook)
    if codebook.dim() != 2 or 0 in codebook.shape or size not in (None, codebook.shape[1]):
        expected = "[K, C], none of them 0" if size is None else f"[K, {size}], as z has channels"
        raise ValueError(f"codebook is {list(codebook.shape)}; expected {expected}")
    if codebook.device != device:
        raise ValueError(f"codebook is on {codebook.device}; expected {device}")


def _checked_indices(indices, codebook, scales) -> list[Tensor]:
    """As [B, h, w] each."""
    if not 0 < len(indices) <= len(scales):
        raise ValueError(f"indices has {len(indices)} scales; expected from 1 to {len(scales)}")
    found = []
    for s, (index, (h, w)) in enumerate(zip(indices, scales)):
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"indices[{s}] must be an int64 tensor")
        _check_book(codebook, index.device)
        if tuple(index.shape[1:]) not in ((h, w), (h * w,)) or len(index) != len(indices[0]):
            raise ValueError(f"indices[{s}] is {list(index.shape)}; expected [{len(indices[0])}, {h}, {w}]")
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
            low, high = (int(n) for n in index.aminmax())
            if low < 0 or high >= len(codebook):
                raise ValueError(f"indices[{s}] is out of range: {low} to {high} for {len(codebook)} codes")
        found.append(index.reshape(-1, h, w))
    return found
