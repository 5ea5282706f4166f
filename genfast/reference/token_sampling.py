"""Tokens and confidences from logits, in plain PyTorch: the specification of ``token_sampling``.

A draw is an inverse CDF in whole numbers, so that every backend, tiling and thread count gives the same token. With
m the largest logit of a row and c = log2(e) / temperature, the weight of entry i is

    v_i = trunc(2^K 2^((l_i - m) c)),    K = min(60, 62 - ceil(log2 V)),

computed in float32 by a fixed polynomial (:func:`weights`), and their sum W fits in 63 bits. One 64-bit uniform u per
row gives the target floor(u W / 2^64); the token is the first entry whose running sum exceeds it. A token 30 nats below
the largest still has its share (2^-45 is the finest one at V = 131072), where float32 Gumbel noise would never draw it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genfast.random import MASK, mul_hi_lo, philox_words, signed64

EXP2_P = (
    1.0,
    0.6931471824645996,
    0.24022647738456726,
    0.05550359934568405,
    0.009618505835533142,
    0.0013390807434916496,
    0.00015326470020227134,
)
"""2^r on [-1/2, 1/2], minimax in relative error (1.1 float32 roundings in all), exact at 0."""

LOG2_E = 1.4426950408889634
LOWEST = -80.0
"""Powers of two below this have no weight at any K, and no place in a float32 sum."""


def weight_bits(size: int) -> int:
    """K: the weight of the largest of ``size`` entries is 2^K."""
    return min(60, 62 - max(size - 1, 0).bit_length())


def scale(temperature: Tensor | float) -> Tensor | float:
    """c = log2(e) / temperature as float32, 0 where the temperature is 0: such a row takes the largest."""
    # A temperature near 0 must not make c infinite: infinity times 0 is no number.
    if isinstance(temperature, Tensor):
        t = temperature.double()
        return torch.where(t > 0, (LOG2_E / t).clamp_max(1e30), 0.0).float()
    return float(np.float32(min(LOG2_E / temperature, 1e30))) if temperature else 0.0


def exp2_fraction(r: Tensor) -> Tensor:
    """2^r for float32 r on [-1/2, 1/2], by the polynomial."""
    p = torch.full_like(r, EXP2_P[-1])
    for coefficient in EXP2_P[-2::-1]:
        # The product of two float32 is exact in float64: one rounding remains, as in a fused multiply-add.
        p = (p.double() * r.double() + coefficient).float()
    return p


def weights(logits: Tensor, largest: Tensor, c: Tensor, bits: int) -> Tensor:
    """v, int64, of float32 logits [R, V], the largest of each row [R, 1] and c, broadcast to them."""
    t = ((logits - largest) * c).clamp_min(LOWEST)
    k = torch.round(t)  # to even
    return torch.ldexp(exp2_fraction(t - k).double(), k.double() + bits).long()


def row_words(
    seed: int | Tensor, stream: int, offset: int, rows: Tensor, length: int, ids: Tensor | None, tile: int = 0
) -> tuple[Tensor, ...]:
    """The four Philox words of flat rows, int64 in [0, 2^32): (w0, w1) make u, w2 the random confidence.

    The counter is (position, tile, sample, stream): ``sample`` is ``offset`` plus the sequence's place in the batch (a
    seed per sequence: ``offset`` alone) and ``position`` the place in the sequence; or ``ids`` is
    sample 2^32 + position. ``tile`` is 0 for the row itself (``token_head`` draws within tiles too).
    """
    sequence, position = rows // length, rows % length
    sample = sequence + offset
    if isinstance(seed, Tensor):
        if seed.dim() == 1:
            seed, sample = seed[sequence], torch.full_like(sequence, offset)
    else:
        seed = torch.tensor(signed64(seed), device=rows.device)
    if ids is not None:
        sample, position = (ids >> 32) & MASK, ids & MASK
    return philox_words(seed, position | tile << 32, sample, torch.tensor(stream, device=rows.device))


def high_product(high: Tensor | int, low: Tensor | int, total: Tensor) -> Tensor:
    """floor(u total / 2^64) for u = high 2^32 + low and 0 <= total < 2^63."""
    high, low = (torch.as_tensor(v, device=total.device) for v in (high, low))
    a, b = total >> 32, total & MASK
    (high_b, high_b_low), (low_a, low_a_low) = mul_hi_lo(high, b), mul_hi_lo(low, a)
    carry = (mul_hi_lo(low, b)[0] + high_b_low + low_a_low) >> 32
    return high * a + high_b + low_a + carry


def share(p: float) -> tuple[int, int]:
    """floor(p 2^53) 2^11 as two 32-bit halves: p W is then :func:`high_product` of it, in whole numbers."""
    bits = max(int(p * 2**53), 1) << 11
    return bits >> 32, bits & MASK


def kept(logits: Tensor, v: Tensor, top_k: int, top_p: float, keep_crossing: bool) -> Tensor:
    """Which entries of [R, V] stay: nucleus first, then the k largest of it.

    Nucleus: in falling order, equal logits by index, an entry stays while the sum before it is at most p W
    (``keep_crossing``), or while the sum with it is; the first always. The k largest: those equal to the k-th too.
    """
    keep = torch.ones_like(v, dtype=torch.bool)
    if top_p < 1:
        order = (logits + 0.0).sort(dim=-1, descending=True, stable=True).indices
        running = v.gather(-1, order).cumsum(-1)
        most = high_product(*share(top_p), running[:, -1:])
        stays = (running - v.gather(-1, order) if keep_crossing else running) <= most
        stays[:, 0] = True
        keep = torch.zeros_like(keep).scatter(-1, order, stays)
    if 0 < top_k < logits.shape[-1]:
        left = torch.where(keep, logits, -torch.inf)
        keep &= left >= left.topk(top_k, dim=-1).values[:, -1:]
    return keep


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """uncond + guidance (cond - uncond), every operation rounded to float32."""
    return uncond + guidance * (cond - uncond)


def read(logits: Tensor, uncond: Tensor | None, guidance: float, rows: Tensor, shift: bool) -> Tensor:
    """The rows asked for as float32 [M, V], guided."""
    length = logits.shape[1]
    sequence, position = rows // length, rows % length
    if shift:
        position = (position - 1).clamp_min(0)
    found = logits[sequence, position].float()
    if uncond is not None:
        found = guide(found, uncond[sequence, position].float(), float(torch.tensor(guidance, dtype=torch.float32)))
    return found


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor | float,
    top_k: int,
    top_p: float,
    keep_crossing: bool,
    uncond: Tensor | None,
    guidance: float,
    suppress: Tensor | None,
    suppress_confidence: Tensor | None,
    rows: Tensor | None,
    shift: bool,
    confidence: str | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    ids: Tensor | None,
    tokens: Tensor,
    confidences: Tensor | None,
    logsumexp: Tensor | None,
    entropy: Tensor | None,
    margin: Tensor | None,
) -> None:
    """See :func:`genfast.sample_tokens`; logits and uncond are [B, L, V] here, the outputs [M] and written."""
    if rows is None:
        rows = torch.arange(logits.shape[0] * logits.shape[1], device=logits.device)
    if not rows.numel():
        return
    x = read(logits, uncond, guidance, rows, shift)
    if suppress is not None:
        x[:, suppress] = -torch.inf
    # torch takes NaN for the largest: the token of such a row is its first NaN, and all its figures are NaN.
    top, arg = x.max(dim=-1)
    empty, broken = top == -torch.inf, top.isnan() | (top == torch.inf)
    safe = torch.where((empty | broken)[:, None], 0.0, x)
    largest = safe.amax(-1, keepdim=True)

    c = torch.as_tensor(scale(temperature), dtype=torch.float32, device=x.device).expand(len(x))[:, None]
    tempered = c > 0
    c = torch.where(tempered, c, scale(1.0))
    bits = weight_bits(x.shape[1])
    v = weights(safe, largest, c, bits)
    keep = kept(safe, v, top_k, top_p, keep_crossing)
    v = torch.where(keep, v, 0)
    words = None if seed is None else row_words(seed, stream, offset, rows, logits.shape[1], ids)
    t = torch.as_tensor(temperature, dtype=torch.float64, device=x.device).expand(len(x))[:, None]
    if noise is not None:
        flat = noise.reshape(-1, noise.shape[-1])[rows].double()
        gumbel = torch.where(t > 0, safe.double() - t * (-flat.log()).log(), safe.double())
        drawn = torch.where(keep, gumbel, -torch.inf).argmax(-1)
    elif seed is not None:
        target = high_product(words[0], words[1], v.sum(-1))
        drawn = (v.cumsum(-1) > target[:, None]).int().argmax(-1)
    else:
        drawn = arg
    drawn = torch.where(tempered[:, 0], drawn, arg)
    tokens.copy_(torch.where(empty, 0, torch.where(broken, x.isnan().int().argmax(-1), drawn)))
    tokens.copy_(torch.where(top == torch.inf, arg, tokens))

    exact = x.double()
    judged = exact
    if suppress_confidence is not None:
        judged = exact.clone()
        judged[:, suppress_confidence] = -torch.inf

    def settle(out: Tensor, value: Tensor, of_empty: float) -> None:
        out.copy_(torch.where(broken, torch.nan, torch.where(empty, of_empty, value)))

    if confidences is not None:
        if confidence == "random":
            # Bits that float32 holds, so that every backend rounds alike.
            confidences.copy_((words[2] >> 8).float() * 2.0**-24)
        elif confidence == "probability":
            p = judged.softmax(-1).nan_to_num(0.0)
            settle(confidences, p.gather(-1, tokens[:, None])[:, 0], 0.0)
        else:
            u = torch.where(t > 0, t, 1.0)
            p = torch.where(keep, judged / u, -torch.inf).softmax(-1).nan_to_num(0.0)
            if confidence == "tempered":
                value = p.gather(-1, tokens[:, None])[:, 0]
            elif confidence == "margin":
                value = _margin(p)
            else:
                value = torch.special.xlogy(p, p).sum(-1)
            settle(confidences, value, 0.0)
    if logsumexp is not None:
        settle(logsumexp, exact.logsumexp(-1), -torch.inf)
    p = exact.softmax(-1).nan_to_num(0.0)
    if entropy is not None:
        settle(entropy, -torch.special.xlogy(p, p).sum(-1), 0.0)
    if margin is not None:
        settle(margin, _margin(p), 0.0)


def _margin(p: Tensor) -> Tensor:
    if p.shape[-1] == 1:
        return p[:, 0]
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    return first - second
