"""One reverse step of a discrete diffusion, in plain PyTorch: the specification of ``token_transition``.

Written out over a row of V entries the published laws are sparse: a token stays with one weight H, and goes to another
id y with a weight proportional to v_y, the whole-number weight of :func:`genfast.reference.token_sampling.weights`.
With e^m 2^-K v_y the score s_y (m the largest log score of the row), own id x, W the sum of v over the other ids:

``jump`` (absorbing graph; Euler on the uniform one): p_y = c s_y for y != x, p_x = 1 - c sum s, never below 0. So
    H = max(0, X - W) with X = 2^K e^-m / c, and the token goes if u X < W.

``uniform`` (analytic): p_y is proportional to max(0, s_y - f sum(s) / V) for y != x with f = 1 - e^-dsigma, and the
    share of x itself is 1 + V / expm1(dsigma) times that. In whole numbers g_y = max(0, v_y - floor(f W / V)), W being
    the sum over all ids here; H = (1 + V / expm1(dsigma)) g_x.

``posterior`` (MDLM): H = r W / (1 - r), r the probability of staying masked; decided without a look at the row.

The uniform u has 53 bits, from the Philox words 2 and 3 of the position; words 0 and 1 make the 64-bit number that
draws y by inverse CDF. All sums are of whole numbers; X, f W / V and u (H + W) are float64 products and sums, each
rounded once, in the order written here, and e^-m comes from the float32 polynomial of the weights: with the same
coefficients every backend takes the same token, to the bit. The coefficients are functions of ``amount`` alone
(:func:`coefficients`): of a number they are computed on the host; of a tensor on its device, whose ``expm1`` may differ
in the last place from another device's. With ``noise`` the logarithm is the device's too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.reference.token_sampling import LOG2_E, exp2_fraction, high_product, kept, row_words, scale, weight_bits
from genfast.reference.token_sampling import weights as weights_of

LAWS = ("jump", "uniform", "posterior")
EPS = 1e-10
"""Of the published ``sample_categorical``: argmax p / (EPS - log(u + EPS))."""
FARTHEST = 900.0
"""Powers of two beyond it are cut off, so that 2^K times one is a normal float64."""


def coefficients(graph: str, rule: str, amount: Tensor | float, size: int):
    """(law, a, b), a and b numbers or float64 tensors like ``amount``: 1 / c; f / V and 1 + V / expm1; r. Where a law
    has one coefficient, b is a again."""
    if rule == "posterior":
        return "posterior", amount, amount
    if graph == "uniform" and rule != "euler":
        grown = _expm1(amount)
        return "uniform", -_expm1(-amount) / size, 1 + _over(size, grown)
    if rule == "denoise":  # c is infinite: the mask has no share
        rate = amount * 0 + math.inf
    elif rule == "analytic":
        rate = _expm1(amount)
    else:
        rate = amount / size if graph == "uniform" else amount
    inverse = _over(1.0, rate)
    return "jump", inverse, inverse


def _expm1(x: Tensor | float) -> Tensor | float:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x) if x < 700 else math.inf


def _over(a: float, b: Tensor | float) -> Tensor | float:
    return a / b if isinstance(b, Tensor) or b else math.inf


def power_of_two(n: Tensor) -> Tensor:
    """2^n in float64 of int64 n in [-1022, 1023]."""
    return ((n + 1023) << 52).view(torch.float64)


def inverse_exponential(m: Tensor, bits: int) -> Tensor:
    """2^bits e^-m, float64, of float32 m."""
    t = (m.double() * -LOG2_E).clamp(-FARTHEST, FARTHEST)
    n = torch.round(t)
    return exp2_fraction((t - n).float()).double() * power_of_two(n.long() + bits)


def fraction(words: tuple[Tensor, ...]) -> Tensor:
    """u, float64 in [0, 1) with 53 bits."""
    return ((words[2] << 21) | (words[3] >> 11)).double() * 2.0**-53


def discrete_transition(
    x: Tensor,
    output: Tensor,
    *,
    law: str,
    a: Tensor | float,
    b: Tensor | float,
    mask_id: int | None,
    temperature: float,
    top_p: float,
    keep_crossing: bool,
    active: Tensor | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    ids: Tensor | None,
    out: Tensor,
    changed: Tensor,
) -> None:
    """See :func:`genfast.discrete_transition`; a and b are numbers or float64 [B], noise is [B, L, V or less]."""
    if not x.numel():
        return
    batch, length, size = output.shape
    a, b = (torch.as_tensor(k, dtype=torch.float64, device=x.device).expand(batch) for k in (a, b))
    a, b = (k[:, None].expand(batch, length).reshape(-1) for k in (a, b))
    flat = torch.arange(batch * length, device=x.device)
    own = x.reshape(-1).clamp(0, size - 1)[:, None]
    s = output.reshape(-1, size).float()
    if law != "uniform":
        s = s.scatter(1, own, -torch.inf)
    top = s.amax(-1, keepdim=True)
    no_law = ~top.isfinite()
    s, m = torch.where(no_law, 0.0, s), torch.where(no_law, 0.0, top)
    c = torch.tensor(scale(temperature) or scale(1.0), device=x.device)
    bits = weight_bits(size)
    v = weights_of(s, m, c, bits)
    if top_p < 1:
        v = torch.where(kept(s, v, 0, top_p, keep_crossing), v, 0)
    if law == "jump":
        sum_v = v.sum(-1)
        all_v = inverse_exponential(m[:, 0], bits) * a
        stay = (all_v - sum_v.double()).clamp_min(0)
    elif law == "uniform":
        v = (v - (a * v.sum(-1).double()).long()[:, None]).clamp_min(0)
        stay = torch.where(b.isinf(), b, b * v.gather(1, own)[:, 0].double())
        v = v.scatter(1, own, 0)
        sum_v = v.sum(-1)
        all_v = sum_v.double() + stay
    else:
        sum_v = v.sum(-1)
        stay = a * sum_v.double() / (1 - a)
    if noise is None:
        words = row_words(seed, stream, offset, flat, length, ids)
        u = fraction(words)
        moves = u >= a if law == "posterior" else u * all_v < sum_v.double()
        target = high_product(words[0], words[1], sum_v)
        token = (v.cumsum(-1) > target[:, None]).int().argmax(-1)
        if temperature == 0:
            token = s.argmax(-1)
    else:
        # Where noise has no column for the mask, the mask has no weight.
        noise = torch.nn.functional.pad(noise, (0, size - noise.shape[-1]), value=0.5).reshape(-1, size)
        gumbel = EPS - (noise + EPS).double().log()
        value = v.double().scatter(1, own, stay[:, None]) / gumbel
        token = value.argmax(-1)
        moves = (token != own[:, 0]) & ~stay.isnan()
    moves = (moves & ~no_law[:, 0]).view(batch, length)
    if mask_id is not None:
        moves &= x == mask_id
    if active is not None:
        moves &= active
    changed.copy_(moves.any(1))
    out.copy_(torch.where(moves, token.view(batch, length), x))
