"""What the ops of ``scalar_quantize`` compute, in plain PyTorch: the specification.

**FSQ** (Mentzer et al. 2023, arXiv:2309.15505). A number z becomes one of L levels. With h = (L - 1)(1 + 1e-3) / 2, and
o = 1/2 for even L, 0 for odd L, the level is k = round(tanh(z + atanh(o / h)) h - o) + floor(L / 2), the code
(k - floor(L / 2)) / floor(L / 2). The form that preserves symmetry (Parker et al. 2024, arXiv:2411.19842) has
k = floor((L - 1)(tanh(z) + 1) / 2 + 1/2) and the code 2 k / (L - 1) - 1. Both are steps of z, so k is computed as the
number of steps at or below z: ``steps`` has them in float64, rounded up to z's precision. So every backend finds the
level of the exact formula. The gradient is that of the formula without rounding. The index is sum_d k_d prod_{i<d} L_i.

**LFQ** (Yu et al. 2023, arXiv:2310.05737) and **BSQ** (Zhao et al. 2024, arXiv:2406.07548). A number u becomes m where
it is positive, else -m; the first of D bits is the highest of the index. BSQ's u are of a row divided by its length.
With the temperature's inverse T, softmax over all codes c of 2 T u.c is a product over bits, of
q_d = sigmoid(4 T m u_d):

* entropy of a row: the sum of those of its bits. With a least probability e > 0 it is - sum_c p_c log max(p_c, e)
  (lucidrains, vector-quantize-pytorch), which is no sum over bits;
* mean probability: of each code over the rows, codes being those of a block of ``block`` bits. Each row's is the outer
  product of its bits', so that the mean over N rows is made from N small factors and never from N x 2^block numbers;
* commitment: the mean of (u - code)^2.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

STRETCH = 1e-3
"""By how much FSQ's outer levels are within reach."""
SHORTEST = 1e-12
"""What a row's length is at least, where it divides."""
_CHUNK = 1 << 22


# --- FSQ -------------------------------------------------------------------------------------------------------------


@functools.cache
def shape_of(levels: int, symmetric: bool, clamp: bool) -> tuple[float, float, float]:
    """(shift, height, offset) of bounded(z) = f(z + shift) height - offset, f being tanh or a clamp to [-1, 1]; k is
    round(bounded + floor(L / 2)), or with symmetry floor(bounded)."""
    if symmetric:
        return 0.0, (levels - 1) / 2, -levels / 2
    height = (levels - 1) * (1 + STRETCH) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    return (offset / height if clamp else math.atanh(offset / height)), height, offset


@functools.cache
def steps(levels: int, symmetric: bool, clamp: bool, dtype: torch.dtype = torch.float32) -> tuple[float, ...]:
    """The least z of levels 1 ... L - 1, in a precision."""
    shift, height, offset = shape_of(levels, symmetric, clamp)
    found = []
    for k in range(1, levels):
        bounded = k if symmetric else k - levels // 2 - 0.5
        y = (bounded + offset) / height
        z = (y if clamp else math.atanh(y)) - shift
        if dtype != torch.float64:
            near = np.float32(z)
            z = float(near if float(near) >= z else np.nextafter(near, np.float32(np.inf)))
        found.append(z)
    return tuple(found)


def slope_unit(levels: int, symmetric: bool) -> float:
    """Of a code by the bounded number."""
    return 2 / (levels - 1) if symmetric else 1 / (levels // 2)


def level_codes(k: Tensor, levels: int, symmetric: bool) -> Tensor:
    """The codes of levels, in k's floating dtype."""
    if symmetric:
        return k * (2 / (levels - 1)) - 1
    return (k - levels // 2) / (levels // 2)


def _level_of(z: Tensor, levels: int, symmetric: bool, clamp: bool) -> Tensor:
    """int64, of finite or infinite z."""
    table = torch.tensor(steps(levels, symmetric, clamp, z.dtype), dtype=z.dtype, device=z.device)
    return torch.searchsorted(table, z.contiguous(), right=True)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def fsq_quantize(z: Tensor, *, levels, symmetric, clamp, noise, quantized, indices) -> None:
    """z [B, S, G, D] to codes alike and to indices int64 [B, S, G].

    A row with NaN has -1 and NaN where z has it. ``noise``, alike, is added to the codes, which stay in [-1, 1].
    """
    z = _wide(z)
    bad = z.isnan()
    total, basis = torch.zeros_like(indices), 1
    for d, count in enumerate(levels):
        k = _level_of(z[..., d], count, symmetric, clamp)
        total += k * basis
        basis *= count
        code = level_codes(k.to(z.dtype), count, symmetric).masked_fill(bad[..., d], torch.nan)
        if noise is not None:
            code = (code + noise[..., d]).clamp(-1, 1)
        quantized[..., d] = code
    indices.copy_(total.masked_fill(bad.any(-1), -1))


def fsq_backward(grad: Tensor, z: Tensor, *, levels, symmetric, clamp, noise, grad_z) -> None:
    """The gradient of z from that of the codes: straight through the rounding, through the bound of noisy codes."""
    wide = _wide(z)
    for d, count in enumerate(levels):
        shift, height, _ = shape_of(count, symmetric, clamp)
        u = wide[..., d] + shift
        slope = (u.abs() <= 1).to(u.dtype) if clamp else 1 - torch.tanh(u).square()
        found = grad[..., d].to(u.dtype) * slope * (height * slope_unit(count, symmetric))
        if noise is not None:
            k = _level_of(wide[..., d], count, symmetric, clamp)
            code = level_codes(k.to(u.dtype), count, symmetric) + noise[..., d]
            found = torch.where(code.abs() <= 1, found, 0.0)
        grad_z[..., d] = torch.where(wide[..., d].isnan(), torch.nan, found)


def fsq_codes(indices: Tensor, levels, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """The codes [..., D] of indices; NaN for an index that no code has."""
    rest, codes = indices.long(), []
    wide = torch.promote_types(dtype, torch.float32)
    for count in levels:
        codes.append(level_codes((rest % count).to(wide), count, symmetric))
        rest = rest // count
    known = ((indices >= 0) & (rest == 0))[..., None]
    return torch.stack(codes, -1).masked_fill(~known, torch.nan).to(dtype)


# --- LFQ and BSQ -----------------------------------------------------------------------------------------------------


def bit_codes(indices: Tensor, bits: int, magnitude: float, dtype: torch.dtype) -> Tensor:
    """The codes [..., D] of indices; NaN for an index that no code has."""
    shifts = torch.arange(bits - 1, -1, -1, device=indices.device)
    indices = indices.long()[..., None]
    known = (indices >= 0) & (indices >> bits == 0)
    codes = (indices >> shifts & 1).to(torch.promote_types(dtype, torch.float32)) * (2 * magnitude) - magnitude
    return codes.masked_fill(~known, torch.nan).to(dtype)


def entropy(p: Tensor, least: float) -> Tensor:
    """- sum p log max(p, least) over the last dimension; its gradient is finite where p is 0."""
    return -(p * p.clamp_min(max(least, torch.finfo(p.dtype).tiny)).log()).sum(-1)


def _unit(z: Tensor, radius: float | None) -> Tensor:
    """Rows of the given length, or as they are."""
    z = _wide(z)
    return z if radius is None else z / z.square().sum(-1, keepdim=True).sqrt().clamp_min(SHORTEST) * radius


def _block_logs(logits: Tensor) -> Tensor:
    """log p [N, 2^block] of logits [N, block]; the first bit is the highest."""
    logs = torch.zeros_like(logits[:, :1])
    for d in range(logits.shape[1] - 1, -1, -1):
        bit = torch.nn.functional.logsigmoid(torch.stack([-logits[:, d], logits[:, d]], 1))
        logs = (bit[:, :, None] + logs[:, None]).flatten(1)
    return logs


def _smooth(z: Tensor, radius, magnitude, sharpness, block, least):
    """Sums over rows [N, G, D]: entropies, probabilities [G, D / block, 2^block], squares (u - code)^2."""
    u = _unit(z, radius)
    code = torch.where(u > 0, magnitude, -magnitude).to(u.dtype)
    logits = u * (4 * sharpness * magnitude)
    size = logits.abs()
    entropies = (torch.nn.functional.softplus(-size) + size * torch.sigmoid(-size)).sum()
    if block is None:
        return entropies, None, (u - code).square().sum()
    parts = logits.unflatten(-1, (-1, block)).movedim(0, 2).flatten(0, 1)
    logs = [_block_logs(part) for part in parts]
    if least:
        entropies = -sum((log.exp() * log.clamp_min(math.log(least))).sum() for log in logs)
    sums = torch.stack([log.exp().sum(0) for log in logs]).unflatten(0, (z.shape[1], -1))
    return entropies, sums, (u - code).square().sum()


def _chunks(z: Tensor, mask: Tensor | None, block: int | None):
    """Rows [N, G, D] that count, some at a time, and where they are in z."""
    rows = z.flatten(0, 1)
    chosen = torch.arange(len(rows), device=z.device) if mask is None else mask.flatten().nonzero()[:, 0]
    width = z.shape[2] * z.shape[3] * (1 if block is None else (2**block) // block + 1)
    return [(rows[at], at) for at in chosen.split(max(_CHUNK // width, 1))]


def binary_quantize(
    z: Tensor, *, radius, magnitude, sharpness, block, least, mask, quantized, indices, entropies, mean, commitment
) -> None:
    """z [B, S, G, D] to codes alike, to indices int64 [B, S, G], and with ``entropies``, ``mean`` [G, D / block,
    2^block] and ``commitment`` given to the means over the rows of ``mask`` [B, S], NaN without any.

    ``radius`` is the length that rows are given, None for rows as they are; ``block`` None leaves ``mean`` out.
    ``sharpness`` is the inverse of the temperature. A row with NaN has the index -1 and NaN where u has it.
    """
    u = _unit(z, radius)
    bad, bits = u.isnan(), u > 0
    quantized.copy_(torch.where(bits, magnitude, -magnitude).masked_fill(bad, torch.nan))
    shifts = torch.arange(z.shape[3] - 1, -1, -1, device=z.device)
    indices.copy_((bits.long() << shifts).sum(-1).masked_fill(bad.any(-1), -1))
    if entropies is None:
        return
    wide = torch.float64
    totals = [torch.zeros(t.shape, dtype=wide, device=z.device) for t in (entropies, mean, commitment)]
    counted = torch.zeros((), dtype=wide, device=z.device)
    for rows, _ in _chunks(z, mask, block):
        counted += len(rows)
        for total, found in zip(totals, _smooth(rows, radius, magnitude, sharpness, block, least)):
            if found is not None:
                total += found.to(wide)
    entropies.copy_(totals[0] / (counted * z.shape[2]))
    mean.copy_(totals[1] / counted)
    commitment.copy_(totals[2] / (counted * z.shape[2] * z.shape[3]))


def _unit_backward(grad: Tensor, z: Tensor, radius: float | None) -> Tensor:
    if radius is None:
        return grad
    length = z.square().sum(-1, keepdim=True).sqrt()
    n = z / length.clamp_min(SHORTEST)
    along = torch.where(length >= SHORTEST, (n * grad).sum(-1, keepdim=True), 0.0)
    return (grad - n * along) * (radius / length.clamp_min(SHORTEST))


def _block_backward(logits: Tensor, grad_mean: Tensor, grad_entropy, least: float) -> Tensor:
    """The gradient of logits [N, block], from that of the codes' probabilities [2^block] and of the row's entropy."""
    logs = _block_logs(logits)
    grad_p = grad_mean
    if least:
        low = math.log(least)
        grad_p = grad_p - grad_entropy * (logs.clamp_min(low) + (logs >= low))
    weighted = logs.exp() * grad_p
    found = torch.empty_like(logits)
    for d in range(logits.shape[1]):
        # The codes that have the bit, and those that have not; then the two are one for the bits that follow.
        zero, one = weighted.unflatten(1, (2, -1)).unbind(1)
        found[:, d] = torch.sigmoid(-logits[:, d]) * one.sum(1) - torch.sigmoid(logits[:, d]) * zero.sum(1)
        weighted = zero + one
    return found


def binary_backward(
    grad, grad_entropies, grad_mean, grad_commitment, z: Tensor, *,
    radius, magnitude, sharpness, block, least, mask, grad_z,
) -> None:  # fmt: skip
    """The gradient of z from those of the codes (straight through to u) and of the three means.

    Any of them may be None, but ``grad_entropies`` and ``grad_commitment`` only together, and not beside a
    ``grad_mean``. ``block`` None says that no code needs to be enumerated: there is no ``grad_mean``, and no ``least``
    or no ``grad_entropies``.
    """
    wide = _wide(z)
    total = torch.zeros(z.shape, dtype=wide.dtype, device=z.device)
    if grad is not None:
        total += grad
    chunks = [] if grad_entropies is None else _chunks(wide, mask, block)
    count, (groups, bits) = sum(len(rows) for rows, _ in chunks), z.shape[2:]
    for rows, at in chunks:
        u = _unit(rows, radius)
        code = torch.where(u > 0, magnitude, -magnitude).to(u.dtype)
        found = (u - code) * (2 * grad_commitment / (count * groups * bits))
        logits = u * (4 * sharpness * magnitude)
        grad_entropy = grad_entropies / (count * groups)
        grad_logits = torch.zeros_like(u)
        if not least:
            grad_logits = -logits * torch.sigmoid(logits) * torch.sigmoid(-logits) * grad_entropy
        for g in range(groups):
            for first in range(0, bits if block else 0, block or 1):
                here = (slice(None), g, slice(first, first + block))
                grad_p = u.new_zeros(()) if grad_mean is None else grad_mean[g, first // block].to(u.dtype) / count
                grad_logits[here] += _block_backward(logits[here], grad_p, grad_entropy, least)
        total.flatten(0, 1).index_add_(0, at, found + grad_logits * (4 * sharpness * magnitude))
    grad_z.copy_(_unit_backward(total, wide, radius))
