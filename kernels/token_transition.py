"""One reverse step of a discrete diffusion, a Triton program per row.

A token stays with weight H, or goes to another id with the whole-number weight of the draw: ``jump``, ``uniform`` and
``posterior`` of ``genfast.reference.token_transition``, the specification, to the bit. A program whose row cannot
change (not masked, not active, or left masked by its random number) writes its token and ends. The others read their
row as in ``genfast.kernels.token_sampling``: for the largest entry, then, mostly from the second-level cache, for the
sums (the uniform law adds twice), and the tile of the target once more. The token itself is left out of its row as the
one suppressed entry, which is found where the state is. Rows are not split: a state has a thousand positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.token_sampling import (
    _FAR,
    _LOG2_E,
    _P,
    EXACT,
    FILTER_TILE,
    FILTER_WARPS,
    TILE,
    _bounds,
    _draw,
    _largest,
    _tile,
    _tile_sums,
    _weights,
    _whole_sum,
    _words,
    power_of_two,
)
from genfast.reference import token_sampling as weights_spec
from genfast.reference import token_transition as spec

_MINUS_LOG2_E = tl.constexpr(-weights_spec.LOG2_E)
_FARTHEST = tl.constexpr(spec.FARTHEST)
_EPS = tl.constexpr(spec.EPS)
_ROUND = tl.constexpr(1.5 * 2.0**52)
_JUMP, _UNIFORM, _POSTERIOR = (tl.constexpr(k) for k in range(3))


@triton.jit
def _inverse_exponential(m, bits):
    """2^bits e^-m in float64."""
    # A number in the source is float32 where it fits, and these must not be.
    farthest = tl.full((), _FARTHEST, tl.float64)
    t = m.to(tl.float64) * tl.full((), _MINUS_LOG2_E, tl.float64)
    t = tl.minimum(tl.maximum(t, -farthest), farthest)
    n = (t + tl.full((), _ROUND, tl.float64)) - tl.full((), _ROUND, tl.float64)  # to even
    r = (t - n).to(tl.float32)
    p = tl.fma(r, _P[6], _P[5])
    for k in tl.static_range(5):
        p = tl.fma(p, r, _P[4 - k])
    return p.to(tl.float64) * ((n.to(tl.int64) + bits + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _fraction(w2, w3):
    """float64 in [0, 1) with 53 bits."""
    whole = (w2.to(tl.int64) << 21) | (w3.to(tl.int64) >> 11)
    return whole.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _floored(x, m, c, bits, floor):
    v = _weights(x, m, c, bits)
    return tl.where(v > floor, v - floor, 0)


@triton.jit
def _floored_sums(output, size, own, m, c, bits, floor, TILE: tl.constexpr, TILES: tl.constexpr):
    """Sums per tile of what is left of the weights of the other ids, int64 [TILES]."""
    sums = tl.zeros((TILES,), tl.int64)
    for first in range(0, size, TILE):
        x, _ = _tile(output, output, 1.0, first, size, own, 1, own, 0, 0.0, 0, False, False, TILE)
        s = tl.sum(_floored(x, m, c, bits, floor), 0)
        sums = tl.where(tl.arange(0, TILES) == first // TILE, s, sums)
    return sums


@triton.jit
def _draw_floored(output, size, own, m, c, bits, floor, sums, w0, w1, TILE: tl.constexpr):
    running = tl.cumsum(sums, 0)
    u = (w0.to(tl.uint64) << 32) | w1.to(tl.uint64)
    target = tl.umulhi(u, tl.sum(sums, 0).to(tl.uint64)).to(tl.int64)
    tile = tl.sum(tl.where(running <= target, 1, 0), 0)
    left = target - tl.sum(tl.where(running <= target, sums, 0), 0)
    first = tile.to(tl.int64) * TILE
    x, _ = _tile(output, output, 1.0, first, size, own, 1, own, 0, 0.0, 0, False, False, TILE)
    inside = tl.cumsum(_floored(x, m, c, bits, floor), 0)
    return first + tl.sum(tl.where(inside <= left, 1, 0), 0)


@triton.jit
def _gumbel(u):
    eps = tl.full((), _EPS, tl.float64)
    return eps - tl.log((u + eps.to(u.dtype)).to(tl.float64))


@triton.jit
def _noisy_argmax(
    output, size, own, token, m, c, bits, floor, stay, cut, ties_end, noise, noise_width,
    FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """argmax of weight / (eps - log(u + eps)); the token itself has the weight ``stay``."""
    best = tl.full((TILE,), -1.0, tl.float64)
    where = tl.zeros((TILE,), tl.int64)
    for first in range(0, size, TILE):
        x, at = _tile(output, output, 1.0, first, size, own, 1, own, 0, cut, ties_end, False, FILTER, TILE)
        u = tl.load(noise + at, mask=at < noise_width, other=0.5)
        value = _floored(x, m, c, bits, floor).to(tl.float64) / _gumbel(u)
        more = (value > best) & (at < size) & (at != token)
        best = tl.where(more, value, best)
        where = tl.where(more, at, where)
    most = tl.max(best, 0)
    found = tl.min(tl.where(best == most, where, _FAR), 0)
    staying = stay / _gumbel(tl.load(noise + token, mask=token < noise_width, other=0.5))
    stays = (stay > 0) & ((staying > most) | ((staying == most) & (token < found)))
    return tl.where(stays | (stay != stay), token, found)


@triton.jit(
    do_not_specialize=[
        "length", "size", "mask_id", "scale", "bits", "share_high", "share_low", "noise_width",
        "seed_low", "seed_high", "stream", "offset",
    ]
)  # fmt: skip
def transition_kernel(
    x, x_sequence_stride, x_position_stride, output, sequence_stride, position_stride,
    active, active_sequence_stride, active_position_stride, length, size, mask_id,
    a_values, a: tl.float64, b_values, b: tl.float64, scale, bits, share_high, share_low, noise, noise_width,
    seeds, seed_low, seed_high, stream, offset, ids, out, out_sequence_stride, out_position_stride, changed,
    LAW: tl.constexpr, MASKED: tl.constexpr, ACTIVE: tl.constexpr, PER_SEQUENCE: tl.constexpr, GREEDY: tl.constexpr,
    TOP_P: tl.constexpr, CROSSING: tl.constexpr, NOISE: tl.constexpr, SEED: tl.constexpr, IDS: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The next token of one position."""
    r = tl.program_id(0).to(tl.int64)
    sequence = r // length
    position = r - sequence * length
    output += sequence * sequence_stride + position * position_stride
    own = x + sequence * x_sequence_stride + position * x_position_stride
    token = tl.load(own)
    new = token
    goes = tl.full((), 1, tl.int1)
    if MASKED:
        goes = token == mask_id
    if ACTIVE:
        here = tl.load(active + sequence * active_sequence_stride + position * active_position_stride)
        goes = goes & (here != 0)
    first = tl.full((), a, tl.float64)
    second = tl.full((), b, tl.float64)
    if PER_SEQUENCE:
        first, second = tl.load(a_values + sequence), tl.load(b_values + sequence)
    w0 = tl.full((), 0, tl.uint32)
    w1, w2, w3 = w0, w0, w0
    if SEED > 0:
        w0, w1, w2, w3 = _words(seeds, seed_low, seed_high, ids, r, sequence, position, stream, offset, SEED, IDS)
        if LAW == _POSTERIOR:
            goes = goes & (_fraction(w2, w3) >= first)
    if goes:
        suppressed: tl.constexpr = 0 if LAW == _UNIFORM else 1
        m, top, nan = _largest(output, output, 1.0, 0, size, size, own, suppressed, own, 0, 0.0, 0, False, False, TILE)
        odd = (m == float("-inf")) | (m == float("inf")) | (nan < _FAR)
        m = tl.where(odd, 0.0, m)
        c = tl.full((), scale, tl.float32)
        c = tl.where(c > 0, c, tl.full((), _LOG2_E, tl.float32))
        floor = tl.full((), 0, tl.int64)
        cut = tl.full((), float("-inf"), tl.float32)
        ties_end = size.to(tl.int64)
        if TOP_P:
            share = (share_high.to(tl.uint64) << 32) | share_low.to(tl.uint64)
            if odd == 0:
                cut, ties_end = _bounds(
                    output, output, 1.0, size, own, 1, m, c, bits, share, 0, True, CROSSING, False, False, TILE
                )
        if GREEDY:
            found = top
        else:
            if LAW == _UNIFORM:
                total = _whole_sum(
                    output, output, 1.0, 0, size, size, own, 0, own, 0, 0.0, 0, m, c, bits, float("-inf"),
                    False, False, False, False, TILE,
                )  # fmt: skip
                floor = (first * total.to(tl.float64)).to(tl.int64)
                inside = (token >= 0) & (token < size)
                mine = tl.load(output + token, mask=inside, other=float("-inf")).to(tl.float32)
                left = _floored(mine, m, c, bits, floor).to(tl.float64)
                stay = tl.where(second == float("inf"), second, second * left)
                sums = _floored_sums(output, size, own, m, c, bits, floor, TILE, TILES)
            else:
                sums = _tile_sums(
                    output, output, 1.0, 0, size, size, own, 1, own, 0, cut, ties_end, m, c, bits,
                    False, TOP_P, TILE, TILES,
                )  # fmt: skip
            going = tl.sum(sums, 0).to(tl.float64)
            if LAW == _JUMP:
                whole = _inverse_exponential(m, bits) * first
                stay = whole - going
                stay = tl.where(stay < 0, stay * 0, stay)
            elif LAW == _UNIFORM:
                whole = going + stay
            else:
                whole = going * 0
                stay = first * going / (1 - first)
            if NOISE:
                found = _noisy_argmax(
                    output, size, own, token, m, c, bits, floor, stay, cut, ties_end, noise + r * noise_width,
                    noise_width, TOP_P, TILE,
                )  # fmt: skip
            else:
                if LAW == _UNIFORM:
                    found = _draw_floored(output, size, own, m, c, bits, floor, sums, w0, w1, TILE)
                else:
                    found = _draw(
                        output, output, 1.0, size, own, 1, cut, ties_end, m, c, bits, sums, w0, w1,
                        False, TOP_P, TILE,
                    )  # fmt: skip
                if LAW != _POSTERIOR:
                    found = tl.where(_fraction(w2, w3) * whole < going, found, token)
        new = tl.where(odd, token, found)
    tl.store(out + sequence * out_sequence_stride + position * out_position_stride, new)
    if new != token:
        tl.store(changed + sequence, tl.full((), 1, tl.int8))


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
    """See :func:`genfast.discrete_transition`; a and b are numbers or float64 [B], ``changed`` is False beforehand."""
    if not x.numel():
        return
    size = output.shape[2]
    per_sequence = isinstance(a, Tensor)
    number = seed if isinstance(seed, int) else 0
    high, low = weights_spec.share(top_p) if top_p < 1 else (0, 0)
    tile, options = TILE, EXACT
    if top_p < 1:
        tile, options = FILTER_TILE, {**EXACT, "num_warps": FILTER_WARPS}
    elif law == "posterior":
        options = {**EXACT, "num_warps": 4}  # with 8 a register spills on sm_90
    # Unused pointers need something to point at.
    transition_kernel[(x.numel(),)](
        x=x,
        x_sequence_stride=x.stride(0),
        x_position_stride=x.stride(1),
        output=output,
        sequence_stride=output.stride(0),
        position_stride=output.stride(1),
        active=changed.view(torch.int8) if active is None else active.view(torch.int8),
        active_sequence_stride=0 if active is None else active.stride(0),
        active_position_stride=0 if active is None else active.stride(1),
        length=x.shape[1],
        size=size,
        mask_id=0 if mask_id is None else mask_id,
        a_values=a if per_sequence else x,
        a=0.0 if per_sequence else a,
        b_values=b if per_sequence else x,
        b=0.0 if per_sequence else b,
        scale=weights_spec.scale(temperature),
        bits=weights_spec.weight_bits(size),
        share_high=high,
        share_low=low,
        noise=x if noise is None else noise,
        noise_width=0 if noise is None else noise.shape[2],
        seeds=seed if isinstance(seed, Tensor) else x,
        seed_low=number & 0xFFFFFFFF,
        seed_high=(number >> 32) & 0xFFFFFFFF,
        stream=stream & 0xFFFFFFFF,
        offset=offset,
        ids=x if ids is None else ids,
        out=out,
        out_sequence_stride=out.stride(0),
        out_position_stride=out.stride(1),
        changed=changed.view(torch.int8),
        LAW=spec.LAWS.index(law),
        MASKED=mask_id is not None,
        ACTIVE=active is not None,
        PER_SEQUENCE=per_sequence,
        GREEDY=temperature == 0,
        TOP_P=top_p < 1,
        CROSSING=keep_crossing,
        NOISE=noise is not None,
        SEED=0 if noise is not None else 1 if isinstance(seed, int) else 2 + seed.dim(),
        IDS=ids is not None,
        TILE=tile,
        TILES=power_of_two(-(-size // tile)),
        **options,
    )
