"""Tokens and confidences from hidden states and the head's weight, in plain PyTorch: the specification of
``lm_head_partials`` and ``merge_head_partials``.

The vocabulary is cut at multiples of ``TILE``. A tile gives, per row, its largest logit and where it is, sums of
exponentials relative to a largest logit, and a draw within the tile: with m the tile's largest logit and v the weights
of ``genfast/reference/token_sampling.py`` at K = ``BITS``, the candidate is the first entry at which the running sum of
v exceeds floor(u v_tile / 2^64), v_tile = sum v, u being 64 bits of the tile's own. A merge then draws a tile: with M
the largest m of T tiles,

    s_t = floor(v_tile w_t / 2^62),    w_t = trunc(2^K 2^((m_t - M) c)),    K = weight_bits(T),

the tile is the first at which the running sum of s exceeds floor(u' S / 2^64), S = sum s, u' being the row's own 64
bits, and its candidate is the token. The probability of entry i is so (s_t / S) (v_i / v_tile): softmax(l / T), but for
one more float32 rounding than a draw over the whole row. Everything is in whole numbers: given the logits, tokens do
not depend on who computes which tile.

Logits are sums in float32 of the exact products of the stored values, in any order, and are not rounded any further.
Then the bias is added, and the cap c tanh(l / c) applied (:func:`capped`), both in float32 to the bit.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from genfast.random import MASK
from genfast.reference.token_sampling import EXP2_P, LOG2_E, LOWEST, high_product, row_words, weight_bits, weights

TILE = 512
BITS = 52
"""K within a tile: the sum of its weights is at most 2^61."""

TANH_P = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925)
"""tanh(x) / x in powers of x^2, below ``TANH_NEAR`` to float32."""
TANH_NEAR = 0.25


def tiles(first: int, size: int) -> list[tuple[int, int]]:
    """[begin, end) of the tiles of the entries [first, first + size), in indices of the whole vocabulary."""
    cuts = [first, *range((first // TILE + 1) * TILE, first + size, TILE), first + size]
    return list(pairwise(cuts))


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap), every operation rounded to float32: 5 roundings in all."""
    z = logits / torch.tensor(cap, dtype=torch.float32, device=logits.device)
    a = z.abs()
    square = a * a
    near = torch.full_like(a, TANH_P[-1])
    for coefficient in TANH_P[-2::-1]:
        near = _fma(near, square, torch.tensor(coefficient, dtype=torch.float32, device=a.device))
    # 2^t for t = -2 |z| log2(e), as in `weights`.
    t = (a * float(torch.tensor(-2 * LOG2_E, dtype=torch.float32))).clamp_min(LOWEST)
    k = torch.round(t)
    p = torch.full_like(a, EXP2_P[-1])
    for coefficient in EXP2_P[-2::-1]:
        p = _fma(p, t - k, coefficient)
    e = torch.ldexp(p, k)
    tanh = torch.where(a < TANH_NEAR, a * near, (1.0 - e) / (1.0 + e))
    return torch.copysign(tanh * float(torch.tensor(cap, dtype=torch.float32)), z)


def first_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and its first index; a NaN counts as the largest."""
    top, arg = x.max(dim=-1)
    return top, torch.where(top.isnan(), x.isnan().int().argmax(-1), arg)


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    return (a.double() * b.double() + c).float()


def lm_head_partials(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    first: int,
    scale: Tensor | None,
    judged_scale: Tensor | None,
    suppress: Tensor | None,
    suppress_confidence: Tensor | None,
    softcap: float,
    rows: Tensor | None,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    ids: Tensor | None,
    largest: Tensor,
    index: Tensor,
    exponentials: Tensor | None,
    judged_largest: Tensor | None,
    judged_sum: Tensor | None,
    judged_logit: Tensor | None,
    mass: Tensor | None,
    candidate: Tensor | None,
    uniform: Tensor | None,
) -> None:
    """See :func:`genfast.lm_head_partials`. hidden is [B, L, d]; the outputs, [M, tiles] and uniform [M], are written.

    ``scale`` and ``judged_scale`` are c = log2(e) / temperature, float32 [M]: of the draw (0: none) and of the
    confidence (None: temperature 1).
    """
    length = hidden.shape[1]
    if rows is None:
        rows = torch.arange(hidden.shape[0] * length, device=hidden.device)
    if not rows.numel():
        return
    found = hidden[rows // length, rows % length].float()
    c = judged_c = torch.full((len(rows), 1), LOG2_E, device=hidden.device)
    if judged_scale is not None:
        judged_c = judged_scale[:, None]
    if scale is not None:
        c = torch.where(scale > 0, scale, LOG2_E)[:, None]
    if uniform is not None:
        words = row_words(seed, stream, offset, rows, length, ids)
        uniform.copy_(words[0] << 32 | words[1])

    for t, (begin, end) in enumerate(tiles(first, weight.shape[0])):
        x = found @ weight[begin - first : end - first].float().T
        if bias is not None:
            x = x + bias[begin - first : end - first].float()
        if softcap:
            x = capped(x, softcap)
        if suppress is not None:
            x[:, suppress[(suppress >= begin) & (suppress < end)] - begin] = -torch.inf
        judged = x
        if suppress_confidence is not None:
            quiet = suppress_confidence[(suppress_confidence >= begin) & (suppress_confidence < end)] - begin
            judged = x.clone()
            judged[:, quiet] = -torch.inf
        top, arg = first_largest(x)
        odd = top.isnan() | top.isinf()
        largest[:, t], index[:, t] = top, (arg + begin).int()
        safe, judged = torch.where(odd[:, None], 0.0, x), torch.where(odd[:, None], 0.0, judged)
        m, base = safe.amax(-1, keepdim=True), judged.amax(-1, keepdim=True)
        of_nothing = odd | (base[:, 0] == -torch.inf)
        chosen = arg
        if exponentials is not None:
            exponentials[:, t] = torch.where(odd, 0.0, ((safe - m).double().exp()).sum(-1))
        if judged_largest is not None:
            judged_largest[:, t] = torch.where(of_nothing, -torch.inf, base[:, 0])
        if judged_sum is not None:
            e = torch.where(of_nothing[:, None], -torch.inf, (judged - base).double() * judged_c * (1 / LOG2_E)).exp()
            judged_sum[:, t] = e.sum(-1)
        if mass is not None:
            v = weights(safe, m, c, BITS)
            words = row_words(seed, stream, offset, rows, length, ids, tile=begin // TILE + 1)
            target = high_product(words[0], words[1], v.sum(-1))
            drawn = (v.cumsum(-1) > target[:, None]).int().argmax(-1)
            chosen = torch.where(odd | (scale <= 0), arg, drawn)
            mass[:, t] = torch.where(odd, 0, v.sum(-1))
            candidate[:, t] = (chosen + begin).int()
        if judged_logit is not None:
            judged_logit[:, t] = torch.where(odd, top, judged.gather(-1, chosen[:, None])[:, 0])


def merge_head_partials(
    largest: Tensor,
    index: Tensor,
    *,
    exponentials: Tensor | None,
    judged_largest: Tensor | None,
    judged_sum: Tensor | None,
    judged_logit: Tensor | None,
    mass: Tensor | None,
    candidate: Tensor | None,
    uniform: Tensor | None,
    scale: Tensor | None,
    judged_scale: Tensor | None,
    tokens: Tensor,
    confidences: Tensor | None,
    logsumexp: Tensor | None,
) -> None:
    """See :func:`genfast.merge_head_partials`; the outputs, [M], are written."""
    count, size = largest.shape
    if not count:
        return
    top, tile = first_largest(largest)
    empty, broken = top == -torch.inf, top.isnan() | (top == torch.inf)
    odd = empty | broken
    safe = torch.where(odd[:, None], 0.0, largest)
    token = index.gather(-1, tile[:, None])[:, 0].long()
    if mass is not None:
        c = torch.where(scale > 0, scale, LOG2_E)[:, None]
        w = weights(safe, safe.amax(-1, keepdim=True), c, weight_bits(size))
        u = mass << 2
        s = high_product((u >> 32) & MASK, u & MASK, w)
        target = high_product((uniform >> 32) & MASK, uniform & MASK, s.sum(-1))
        drawn = (s.cumsum(-1) > target[:, None]).int().argmax(-1)
        hot = (scale > 0) & ~odd
        tile = torch.where(hot, drawn, tile)
        token = torch.where(hot, candidate.gather(-1, tile[:, None])[:, 0].long(), token)
    tokens.copy_(torch.where(empty, 0, token))

    def settle(out: Tensor, value: Tensor, of_empty: float) -> None:
        out.copy_(torch.where(broken, torch.nan, torch.where(empty, of_empty, value)))

    if logsumexp is not None:
        wide = safe.double()
        m = wide.amax(-1)
        settle(logsumexp, m + ((wide - m[:, None]).exp() * exponentials).sum(-1).log(), -torch.inf)
    if confidences is not None:
        c = (LOG2_E if judged_scale is None else judged_scale.double()[:, None]) / LOG2_E
        top = (largest if judged_largest is None else judged_largest).double()
        base = top.amax(-1, keepdim=True)
        logit = (largest if judged_logit is None else judged_logit).double().gather(-1, tile[:, None])
        total = (((top - base) * c).exp() * judged_sum).sum(-1)
        value = ((logit - base) * c).exp()[:, 0] / total
        settle(confidences, torch.where(base[:, 0] == -torch.inf, 0.0, value), 0.0)
