"""Tokens and confidences from logits in one Triton kernel per row, or three where rows are few.

With m the largest logit of a row and c = log2(e) / T,

    v_i = trunc(2^K 2^((l_i - m) c)),    token = first i with v_0 + ... + v_i > floor(u W / 2^64),    W = sum v,

in whole numbers: the same token from every tiling and every backend (``genfast.reference.token_sampling`` is the
specification, to the bit). A program reads its row for m, again for the sums (then mostly from the second-level cache),
and the one tile in which the target lies. Where rows are too few to fill the device, a row is split: its parts find
their largest, then their sums, and a last kernel puts them together.

Top-p and top-k need the value at which a running sum over the sorted row crosses a bound: a bisection over the 32 bits
of the logit, one pass over the row each, in place of a sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.order_key import from_key, to_key
from genfast.kernels.philox import philox_words
from genfast.reference import token_sampling as spec

TILE = 2048
"""Entries per step of a program; a power of two. No result depends on it."""

FILL = 264
"""Programs from which on the device counts as full: two for each multiprocessor of the largest there is."""

KINDS = {None: 0, "probability": 1, "tempered": 2, "margin": 3, "entropy": 4, "random": 5}
EXACT = {"num_warps": 8, "enable_fp_fusion": False}
"""No contraction: the written order of operations is the specification's."""

FILTER_TILE, FILTER_WARPS = 1024, 16
"""Of the kernels with top-p or top-k, whose many passes hold more in registers: with these nothing spills."""

_P = tl.constexpr(spec.EXP2_P)
_LOWEST = tl.constexpr(spec.LOWEST)
_LOG2_E = tl.constexpr(spec.LOG2_E)
_LN2 = tl.constexpr(0.6931471805599453)
_FAR = tl.constexpr(2**62)


@triton.jit
def _tile(
    logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(entries, their indices); -inf where an entry is beyond the row, suppressed or filtered."""
    at = tl.arange(0, TILE).to(tl.int64) + first
    x = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
    if GUIDED:
        other = tl.load(uncond + at, mask=at < size, other=0.0).to(tl.float32)
        x = tl.where(at < size, other + guidance * (x - other), float("-inf"))
    for s in range(suppressed):
        x = tl.where(at == tl.load(suppress + s), float("-inf"), x)
    for s in range(quieted):
        x = tl.where(at == tl.load(quiet + s), float("-inf"), x)
    if FILTER:
        x = tl.where((x > cut) | ((x == cut) & (at < ties_end)), x, float("-inf"))
    return x, at


@triton.jit
def _exp2_parts(d, c):
    """2^(d c) as (p, n, t): p 2^n, and the exponent t."""
    t = d * c
    t = tl.where(t < _LOWEST, _LOWEST, t)
    big = t + 12582912.0
    r = t - (big - 12582912.0)
    n = big.to(tl.int32, bitcast=True) - 0x4B400000
    p = tl.fma(r, _P[6], _P[5])
    for k in tl.static_range(5):
        p = tl.fma(p, r, _P[4 - k])
    return p, n, t


@triton.jit
def _times_power(p, n):
    return (p.to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, m, c, bits):
    p, n, _ = _exp2_parts(x - m, c)
    return _times_power(p, n + bits).to(tl.int64)


@triton.jit
def _exponential(x, m, c):
    return tl.exp((x.to(tl.float64) - m.to(tl.float64)) * c.to(tl.float64) * _LN2)


@triton.jit
def _largest(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(the largest entry, its first index, the index of the first NaN or 2^62) of tiles [begin, end)."""
    best = tl.full((TILE,), float("-inf"), tl.float32)
    where = tl.zeros((TILE,), tl.int64)
    nan = tl.full((TILE,), _FAR, tl.int64)
    for first in range(begin, end, TILE):
        x, at = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
        nan = tl.where((x != x) & (nan == _FAR), at, nan)
        more = x > best
        best = tl.where(more, x, best)
        where = tl.where(more, at, where)
    m = tl.max(best, 0)
    return m, tl.min(tl.where(best == m, where, _FAR), 0), tl.min(nan, 0)


@triton.jit
def _second(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end, first_index,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest entry at another index than ``first_index``."""
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for first in range(begin, end, TILE):
        x, at = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
        best = tl.where((x > best) & (at != first_index), x, best)
    return tl.max(best, 0)


@triton.jit
def _whole_sum(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end, m, c, bits,
    least, COUNT: tl.constexpr, ABOVE: tl.constexpr,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum of the weights (COUNT: the number) of entries of at least ``least`` (ABOVE: above it)."""
    total = tl.zeros((TILE,), tl.int64)
    for first in range(begin, end, TILE):
        x, _ = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
        if ABOVE:
            taken = x > least
        else:
            taken = x >= least
        if COUNT:
            total += tl.where(taken & (x > float("-inf")), 1, 0)
        else:
            total += tl.where(taken, _weights(x, m, c, bits), 0)
    return tl.sum(total, 0)


@triton.jit
def _tile_sums(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end, m, c, bits,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums of the weights per tile, int64 [TILES]."""
    sums = tl.zeros((TILES,), tl.int64)
    for first in range(begin, end, TILE):
        x, _ = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
        s = tl.sum(_weights(x, m, c, bits), 0)
        sums = tl.where(tl.arange(0, TILES) == (first - begin) // TILE, s, sums)
    return sums


@triton.jit
def _float_sums(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end, m, c,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """float64 (sum e, sum e t) for e = 2^t, t = (x - m) c."""
    e, et = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for first in range(begin, end, TILE):
        x, _ = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
        p, n, t = _exp2_parts(x - m, c)
        value = _times_power(p, n)
        e += value
        et += value * t
    return tl.sum(e.to(tl.float64), 0), tl.sum(et.to(tl.float64), 0)


@triton.jit
def _cross(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end, m, c, bits, most,
    COUNT: tl.constexpr, GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest value such that what is at least it comes to more than ``most``; -inf if nothing does."""
    low, high = tl.full((), 0x007FFFFF, tl.int64), to_key(m) + 1  # low: -inf
    for _ in range(32):
        if high - low > 1:
            middle = (low + high) // 2
            found = _whole_sum(
                logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end,
                m, c, bits, from_key(middle), COUNT, False, GUIDED, FILTER, TILE,
            )  # fmt: skip
            enough = found > most
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return from_key(low)


@triton.jit
def _end_of_ties(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, value, wanted,
    GUIDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The index after the ``wanted``-th entry that equals ``value``; the row's size if there are fewer."""
    found = size.to(tl.int64)
    seen = tl.full((), 0, tl.int64)
    for first in range(begin, end, TILE):
        x, at = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, 0.0, 0,
            GUIDED, False, TILE,
        )  # fmt: skip
        equal = tl.where(x == value, 1, 0).to(tl.int64)
        running = seen + tl.cumsum(equal, 0)
        found = tl.minimum(found, tl.min(tl.where((running == wanted) & (equal == 1), at + 1, _FAR), 0))
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def _gumbel(
    logits, uncond, guidance, begin, end, size, suppress, suppressed, quiet, quieted, cut, ties_end, noise, temperature,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """argmax of x - T log(-log u) in float64."""
    best = tl.full((TILE,), float("-inf"), tl.float64)
    where = tl.zeros((TILE,), tl.int64)
    for first in range(begin, end, TILE):
        x, at = _tile(
            logits, uncond, guidance, first, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
        u = tl.load(noise + at, mask=at < size, other=0.5).to(tl.float64)
        value = x.to(tl.float64) - temperature * tl.log(-tl.log(u))
        more = value > best
        best = tl.where(more, value, best)
        where = tl.where(more, at, where)
    return tl.min(tl.where(best == tl.max(best, 0), where, _FAR), 0)


@triton.jit
def _place(rows, r, length, SHIFT: tl.constexpr, ROWS: tl.constexpr):
    """(flat row, sequence, position, position whose logits are read) of the r-th row asked for."""
    flat = r.to(tl.int64)
    if ROWS:
        flat = tl.load(rows + r)
    sequence = flat // length
    position = flat - sequence * length
    source = position
    if SHIFT:
        source = tl.where(position > 0, position - 1, 0)
    return flat, sequence, position, source


@triton.jit
def _words(
    seeds, seed_low, seed_high, ids, r, sequence, position, stream, offset,
    SEED: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """The four Philox words of a row; SEED: 1 a number, 2 a tensor of one, 3 one per sequence."""
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    if SEED > 1:
        seed = tl.load(seeds + (sequence if SEED == 3 else 0))
        k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    sample = offset.to(tl.int64)
    if SEED != 3:
        sample += sequence
    if IDS:
        own = tl.load(ids + r)
        sample, position = (own >> 32) & 0xFFFFFFFF, own & 0xFFFFFFFF
    c0 = (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = (sample & 0xFFFFFFFF).to(tl.uint32)
    return philox_words(k0, k1, c0, c0 * 0, c2, c0 * 0 + stream.to(tl.uint32))


@triton.jit
def _draw(
    logits, uncond, guidance, size, suppress, suppressed, cut, ties_end, m, c, bits, sums, w0, w1,
    GUIDED: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token, given the sums of the weights of all tiles."""
    running = tl.cumsum(sums, 0)
    total = tl.sum(sums, 0)
    u = (w0.to(tl.uint64) << 32) | w1.to(tl.uint64)
    target = tl.umulhi(u, total.to(tl.uint64)).to(tl.int64)
    tile = tl.sum(tl.where(running <= target, 1, 0), 0)
    left = target - tl.sum(tl.where(running <= target, sums, 0), 0)
    first = tile.to(tl.int64) * TILE
    x, _ = _tile(
        logits, uncond, guidance, first, size, suppress, suppressed, suppress, 0, cut, ties_end, GUIDED, FILTER, TILE
    )
    inside = tl.cumsum(_weights(x, m, c, bits), 0)
    return first + tl.sum(tl.where(inside <= left, 1, 0), 0)


@triton.jit
def _bounds(
    logits, uncond, guidance, size, suppress, suppressed, m, c, bits, share, top_k,
    TOP_P: tl.constexpr, CROSSING: tl.constexpr, TOP_K: tl.constexpr, GUIDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(cut, ties_end) of the filter: entries above the cut stay, and those equal to it before ties_end."""
    cut = tl.full((), float("-inf"), tl.float32)
    ties_end = size.to(tl.int64)
    if TOP_P:
        total = _whole_sum(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, 0.0, 0, m, c, bits,
            float("-inf"), False, False, GUIDED, False, TILE,
        )  # fmt: skip
        most = tl.umulhi(share.to(tl.uint64), total.to(tl.uint64)).to(tl.int64)
        cut = _cross(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, 0.0, 0, m, c, bits, most,
            False, GUIDED, False, TILE,
        )  # fmt: skip
        above = _whole_sum(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, 0.0, 0, m, c, bits,
            cut, False, True, GUIDED, False, TILE,
        )  # fmt: skip
        v = _weights(cut, m, c, bits)
        # In float64 and put right, since a division of int64 is a call that costs a stack frame; the quotient is small.
        rest = most - above
        ties = (rest.to(tl.float64) / v.to(tl.float64)).to(tl.int64)
        ties = tl.where(ties * v > rest, ties - 1, ties)
        ties = tl.where((ties + 1) * v <= rest, ties + 1, ties)
        if CROSSING:
            ties += 1
        ties = tl.where((ties == 0) & (cut == m), 1, ties)
        ties_end = _end_of_ties(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, cut, ties, GUIDED, TILE
        )
        ties_end = tl.where(ties == 0, 0, ties_end)
    if TOP_K:
        value = _cross(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, cut, ties_end, m, c, bits,
            top_k - 1, True, GUIDED, True, TILE,
        )  # fmt: skip
        ties_end = tl.where(value > cut, size.to(tl.int64), ties_end)
        cut = tl.where(value > cut, value, cut)
    return cut, ties_end


@triton.jit
def _store_row(
    r, token, value, lse, entropy, margin, tokens, confidences, logsumexp, entropies, margins,
    KIND: tl.constexpr, LSE: tl.constexpr, ENTROPY: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    tl.store(tokens + r, token)
    if KIND > 0:
        tl.store(confidences + r, value.to(tl.float32))
    if LSE:
        tl.store(logsumexp + r, lse.to(tl.float32))
    if ENTROPY:
        tl.store(entropies + r, entropy.to(tl.float32))
    if MARGIN:
        tl.store(margins + r, margin.to(tl.float32))


_NUMBERS = [
    "guidance", "length", "size", "count", "scale", "temperature", "top_k", "share_high", "share_low", "suppressed",
    "quieted", "seed_low", "seed_high", "stream", "offset", "bits",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def row_kernel(
    logits, sequence_stride, position_stride, uncond, uncond_sequence_stride, uncond_position_stride, guidance,
    length, size, rows, scales, scale, temperatures, temperature, top_k, share_high, share_low,
    suppress, suppressed, quiet, quieted, noise, seeds, seed_low, seed_high, stream, offset, ids, bits,
    tokens, confidences, logsumexp, entropies, margins,
    GUIDED: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, SCALES: tl.constexpr, HOT: tl.constexpr,
    TOP_P: tl.constexpr, CROSSING: tl.constexpr, TOP_K: tl.constexpr, QUIET: tl.constexpr, NOISE: tl.constexpr,
    SEED: tl.constexpr, IDS: tl.constexpr, KIND: tl.constexpr, LSE: tl.constexpr, ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Everything for one row. HOT: some row has a temperature above 0."""
    FILTER: tl.constexpr = TOP_P or TOP_K
    OF_LEFT: tl.constexpr = (KIND >= 2) and (KIND <= 4)
    r = tl.program_id(0)
    flat, sequence, position, source = _place(rows, r, length, SHIFT, ROWS)
    logits += sequence * sequence_stride + source * position_stride
    if GUIDED:
        uncond += sequence * uncond_sequence_stride + source * uncond_position_stride
    m, token, nan = _largest(
        logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, 0.0, 0, GUIDED, False, TILE
    )
    top = token
    empty = m == float("-inf")
    broken = (m == float("inf")) | (nan < _FAR)
    token = tl.where(nan < _FAR, nan, tl.where(empty, 0, token))
    # What follows has a meaning for other rows only, but must end for these too.
    odd = empty | broken
    m = tl.where(odd, 0.0, m)

    c = scale
    if SCALES:
        c = tl.load(scales + r)
    c = c.to(tl.float32)
    tempered = c > 0
    c = tl.where(tempered, c, tl.full((), _LOG2_E, tl.float32))
    one = tl.full((), _LOG2_E, tl.float32)

    cut = tl.full((), float("-inf"), tl.float32)
    ties_end = size.to(tl.int64)
    # Its passes are for rows with a distribution, and only where it changes something.
    if FILTER and (HOT or NOISE or OF_LEFT):  # noqa: SIM102 (known to the compiler, unlike the next)
        if odd == 0:
            share = (share_high.to(tl.uint64) << 32) | share_low.to(tl.uint64)
            cut, ties_end = _bounds(
                logits, uncond, guidance, size, suppress, suppressed, m, c, bits, share, top_k,
                TOP_P, CROSSING, TOP_K, GUIDED, TILE,
            )  # fmt: skip
    value = tl.full((), 0.0, tl.float64)
    if SEED > 0:
        w0, w1, w2, _ = _words(seeds, seed_low, seed_high, ids, r, sequence, position, stream, offset, SEED, IDS)
        if KIND == 5:
            value = ((w2 >> 8).to(tl.float32) * 5.9604644775390625e-08).to(tl.float64)
    drawn = token
    if NOISE:
        t = temperature
        if SCALES:
            t = tl.load(temperatures + r)
        drawn = _gumbel(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, cut, ties_end,
            noise + flat * size, t.to(tl.float64), GUIDED, FILTER, TILE,
        )  # fmt: skip
    elif HOT:
        sums = _tile_sums(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, cut, ties_end, m, c, bits,
            GUIDED, FILTER, TILE, TILES,
        )  # fmt: skip
        drawn = _draw(
            logits, uncond, guidance, size, suppress, suppressed, cut, ties_end, m, c, bits, sums, w0, w1,
            GUIDED, FILTER, TILE,
        )  # fmt: skip
    if HOT or NOISE:
        token = tl.where(tempered & (odd == 0), drawn, token)

    x = tl.load(logits + token).to(tl.float32)
    if GUIDED:
        other = tl.load(uncond + token).to(tl.float32)
        x = other + guidance * (x - other)
    is_quiet = tl.full((), 0, tl.int32)
    if QUIET:
        for s in range(quieted):
            is_quiet = tl.where(token == tl.load(quiet + s), 1, is_quiet)

    lse, entropy, margin = value * 0, value * 0, value * 0
    sum_e = value * 0
    if LSE or ENTROPY or MARGIN or (KIND == 1 and not QUIET):
        sum_e, sum_et = _float_sums(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, 0.0, 0, m, one,
            GUIDED, False, TILE,
        )  # fmt: skip
        lse = m.to(tl.float64) + tl.log(sum_e)
        entropy = tl.log(sum_e) - sum_et / sum_e * _LN2
        entropy = tl.where(entropy > 0, entropy, 0.0)
        if MARGIN:
            second = _second(
                logits, uncond, guidance, 0, size, size, suppress, suppressed, suppress, 0, 0.0, 0, top,
                GUIDED, False, TILE,
            )  # fmt: skip
            margin = (1 - _exponential(second, m, one)) / sum_e
    if KIND == 1 and not QUIET:
        value = _exponential(x, m, one) / sum_e
    if (KIND == 1 and QUIET) or OF_LEFT:
        # Of what is left the largest may be another one.
        base, base_at, _ = _largest(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, quiet, quieted, cut, ties_end,
            GUIDED, FILTER and OF_LEFT, TILE,
        )  # fmt: skip
        nothing = base == float("-inf")
        base = tl.where(nothing | odd, 0.0, base)
        rate = c if OF_LEFT else one
        e, et = _float_sums(
            logits, uncond, guidance, 0, size, size, suppress, suppressed, quiet, quieted, cut, ties_end, base, rate,
            GUIDED, FILTER and OF_LEFT, TILE,
        )  # fmt: skip
        if KIND <= 2:
            value = tl.where(is_quiet == 1, 0.0, _exponential(x, base, rate) / e)
        if KIND == 3:
            second = _second(
                logits, uncond, guidance, 0, size, size, suppress, suppressed, quiet, quieted, cut, ties_end, base_at,
                GUIDED, FILTER, TILE,
            )  # fmt: skip
            value = (1 - _exponential(second, base, rate)) / e
        if KIND == 4:
            value = et / e * _LN2 - tl.log(e)
            value = tl.where(value < 0, value, 0.0)
        value = tl.where(nothing, 0.0, value)

    none = float("nan")
    if KIND != 5:
        value = tl.where(broken, none, tl.where(empty, 0.0, value))
    lse = tl.where(broken, none, tl.where(empty, float("-inf"), lse))
    entropy = tl.where(broken, none, tl.where(empty, 0.0, entropy))
    margin = tl.where(broken, none, tl.where(empty, 0.0, margin))
    _store_row(
        r, token, value, lse, entropy, margin, tokens, confidences, logsumexp, entropies, margins,
        KIND, LSE, ENTROPY, MARGIN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["guidance", "length", "size", "suppressed"])
def part_largest_kernel(
    logits, sequence_stride, position_stride, uncond, uncond_sequence_stride, uncond_position_stride, guidance,
    length, size, rows, suppress, suppressed, part_tops, part_places, part_nans,
    GUIDED: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The largest of PART tiles of a row."""
    r, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    _, sequence, _, source = _place(rows, r, length, SHIFT, ROWS)
    logits += sequence * sequence_stride + source * position_stride
    if GUIDED:
        uncond += sequence * uncond_sequence_stride + source * uncond_position_stride
    begin = part * PART * TILE
    m, at, nan = _largest(
        logits, uncond, guidance, begin, tl.minimum(begin + PART * TILE, size), size, suppress, suppressed,
        suppress, 0, 0.0, 0, GUIDED, False, TILE,
    )  # fmt: skip
    tl.store(part_tops + r * parts + part, m)
    tl.store(part_places + r * parts + part, at)
    tl.store(part_nans + r * parts + part, nan)


@triton.jit
def _of_parts(part_tops, part_places, part_nans, r, parts, PARTS: tl.constexpr):
    lanes = tl.arange(0, PARTS)
    tops = tl.load(part_tops + r * parts + lanes, mask=lanes < parts, other=float("-inf"))
    places = tl.load(part_places + r * parts + lanes, mask=lanes < parts, other=_FAR)
    nans = tl.load(part_nans + r * parts + lanes, mask=lanes < parts, other=_FAR)
    m = tl.max(tops, 0)
    return m, tl.min(tl.where(tops == m, places, _FAR), 0), tl.min(nans, 0)


@triton.jit(do_not_specialize=["guidance", "length", "size", "suppressed", "scale", "bits", "parts"])
def part_sum_kernel(
    logits, sequence_stride, position_stride, uncond, uncond_sequence_stride, uncond_position_stride, guidance,
    length, size, rows, suppress, suppressed, scales, scale, bits, parts, part_tops, part_places, part_nans,
    sums, part_e, part_et,
    GUIDED: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, SCALES: tl.constexpr, HOT: tl.constexpr,
    FLOAT: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of PART tiles of a row: whole ones per tile, float ones together."""
    r, part = tl.program_id(0), tl.program_id(1)
    _, sequence, _, source = _place(rows, r, length, SHIFT, ROWS)
    logits += sequence * sequence_stride + source * position_stride
    if GUIDED:
        uncond += sequence * uncond_sequence_stride + source * uncond_position_stride
    m, _, _ = _of_parts(part_tops, part_places, part_nans, r, parts, PARTS)
    m = tl.where((m == float("-inf")) | (m == float("inf")), 0.0, m)
    begin = part * PART * TILE
    end = tl.minimum(begin + PART * TILE, size)
    if HOT:
        c = scale
        if SCALES:
            c = tl.load(scales + r)
        c = c.to(tl.float32)
        c = tl.where(c > 0, c, tl.full((), _LOG2_E, tl.float32))
        found = _tile_sums(
            logits, uncond, guidance, begin, end, size, suppress, suppressed, suppress, 0, 0.0, 0, m, c, bits,
            GUIDED, False, TILE, PART,
        )  # fmt: skip
        tl.store(sums + (r * parts + part) * PART + tl.arange(0, PART), found)
    if FLOAT:
        e, et = _float_sums(
            logits, uncond, guidance, begin, end, size, suppress, suppressed, suppress, 0, 0.0, 0,
            m, tl.full((), _LOG2_E, tl.float32), GUIDED, False, TILE,
        )  # fmt: skip
        tl.store(part_e + r * parts + part, e)
        tl.store(part_et + r * parts + part, et)


@triton.jit(do_not_specialize=[*_NUMBERS, "parts"])
def finish_kernel(
    logits, sequence_stride, position_stride, uncond, uncond_sequence_stride, uncond_position_stride, guidance,
    length, size, rows, suppress, suppressed, scales, scale, bits, parts, part_tops, part_places, part_nans,
    sums, part_e, part_et, seeds, seed_low, seed_high, stream, offset, ids,
    tokens, confidences, logsumexp, entropies,
    GUIDED: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, SCALES: tl.constexpr, HOT: tl.constexpr,
    FLOAT: tl.constexpr, SEED: tl.constexpr, IDS: tl.constexpr, KIND: tl.constexpr, LSE: tl.constexpr,
    ENTROPY: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row out of its parts."""
    r = tl.program_id(0)
    _, sequence, position, source = _place(rows, r, length, SHIFT, ROWS)
    logits += sequence * sequence_stride + source * position_stride
    if GUIDED:
        uncond += sequence * uncond_sequence_stride + source * uncond_position_stride
    m, token, nan = _of_parts(part_tops, part_places, part_nans, r, parts, PARTS)
    empty = m == float("-inf")
    broken = (m == float("inf")) | (nan < _FAR)
    odd = empty | broken
    token = tl.where(nan < _FAR, nan, tl.where(empty, 0, token))
    m = tl.where(odd, 0.0, m)
    value = tl.full((), 0.0, tl.float64)
    if SEED > 0:
        w0, w1, w2, _ = _words(seeds, seed_low, seed_high, ids, r, sequence, position, stream, offset, SEED, IDS)
        if KIND == 5:
            value = ((w2 >> 8).to(tl.float32) * 5.9604644775390625e-08).to(tl.float64)
    if HOT:
        c = scale
        if SCALES:
            c = tl.load(scales + r)
        c = c.to(tl.float32)
        tempered = c > 0
        c = tl.where(tempered, c, tl.full((), _LOG2_E, tl.float32))
        lanes = tl.arange(0, TILES)
        row_sums = tl.load(sums + r * parts * PART + lanes, mask=lanes < parts * PART, other=0)
        drawn = _draw(
            logits, uncond, guidance, size, suppress, suppressed, 0.0, 0, m, c, bits, row_sums, w0, w1,
            GUIDED, False, TILE,
        )  # fmt: skip
        token = tl.where(tempered & (odd == 0), drawn, token)
    lse, entropy = value * 0, value * 0
    if FLOAT:
        lanes = tl.arange(0, PARTS)
        e = tl.sum(tl.load(part_e + r * parts + lanes, mask=lanes < parts, other=0.0), 0)
        et = tl.sum(tl.load(part_et + r * parts + lanes, mask=lanes < parts, other=0.0), 0)
        lse = m.to(tl.float64) + tl.log(e)
        entropy = tl.log(e) - et / e * _LN2
        entropy = tl.where(entropy > 0, entropy, 0.0)
        if KIND == 1:
            x = tl.load(logits + token).to(tl.float32)
            if GUIDED:
                other = tl.load(uncond + token).to(tl.float32)
                x = other + guidance * (x - other)
            value = _exponential(x, m, tl.full((), _LOG2_E, tl.float32)) / e
    none = float("nan")
    if KIND != 5:
        value = tl.where(broken, none, tl.where(empty, 0.0, value))
    lse = tl.where(broken, none, tl.where(empty, float("-inf"), lse))
    entropy = tl.where(broken, none, tl.where(empty, 0.0, entropy))
    _store_row(
        r, token, value, lse, entropy, value, tokens, confidences, logsumexp, entropies, tokens,
        KIND, LSE, ENTROPY, False,
    )  # fmt: skip


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def split_of(count: int, size: int, fill: int = FILL) -> int:
    """Tiles per part of a row, a power of two: as many as leave enough programs to fill the device."""
    tiles = -(-size // TILE)
    part = power_of_two(tiles)
    while part > 1 and count * -(-tiles // part) < fill:
        part //= 2
    return part


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
    fill: int = FILL,
) -> None:
    """See :func:`genfast.sample_tokens`; logits and uncond are [B, L, V] here, the outputs [M] and written."""
    count, size = tokens.numel(), logits.shape[2]
    if not count:
        return
    per_row = isinstance(temperature, Tensor)
    scales = spec.scale(temperature)
    hot = noise is None and (per_row or temperature > 0)
    high, low = spec.share(top_p) if top_p < 1 else (0, 0)
    number = seed if isinstance(seed, int) else 0
    kind = KINDS[confidence]
    quiet = suppress_confidence is not None
    top_k = top_k if top_k < size else 0
    # Unused pointers need something to point at.
    place = dict(
        logits=logits,
        sequence_stride=logits.stride(0),
        position_stride=logits.stride(1),
        uncond=logits if uncond is None else uncond,
        uncond_sequence_stride=0 if uncond is None else uncond.stride(0),
        uncond_position_stride=0 if uncond is None else uncond.stride(1),
        guidance=guidance,
        length=logits.shape[1],
        size=size,
        rows=tokens if rows is None else rows,
        suppress=tokens if suppress is None else suppress,
        suppressed=0 if suppress is None else suppress.numel(),
        GUIDED=uncond is not None,
        ROWS=rows is not None,
        SHIFT=shift,
        TILE=TILE,
    )
    warm = dict(scales=scales if per_row else tokens, scale=0.0 if per_row else scales, SCALES=per_row, HOT=hot)
    draw = dict(
        seeds=seed if isinstance(seed, Tensor) else tokens,
        seed_low=number & 0xFFFFFFFF,
        seed_high=(number >> 32) & 0xFFFFFFFF,
        stream=stream & 0xFFFFFFFF,
        offset=offset,
        ids=tokens if ids is None else ids,
        SEED=0 if seed is None else 1 if isinstance(seed, int) else 2 + seed.dim(),
        IDS=ids is not None,
        KIND=kind,
    )
    bits = spec.weight_bits(size)
    part = split_of(count, size, fill)
    tiles = -(-size // TILE)
    parts = -(-tiles // part)
    written = dict(
        tokens=tokens,
        confidences=tokens if confidences is None else confidences,
        logsumexp=tokens if logsumexp is None else logsumexp,
        entropies=tokens if entropy is None else entropy,
        LSE=logsumexp is not None,
        ENTROPY=entropy is not None,
    )
    options = EXACT
    if top_k or top_p < 1:
        place["TILE"], options = FILTER_TILE, {**EXACT, "num_warps": FILTER_WARPS}
    needs_row = noise is not None or top_k or top_p < 1 or quiet or margin is not None or 2 <= kind <= 4
    if parts == 1 or needs_row:
        row_kernel[(count,)](
            **place,
            **warm,
            **draw,
            **written,
            temperatures=temperature.double() if per_row and noise is not None else tokens,
            temperature=0.0 if per_row else temperature,
            top_k=top_k,
            share_high=high,
            share_low=low,
            quiet=suppress_confidence if quiet else tokens,
            quieted=suppress_confidence.numel() if quiet else 0,
            noise=tokens if noise is None else noise,
            bits=bits,
            margins=tokens if margin is None else margin,
            TOP_P=top_p < 1,
            CROSSING=keep_crossing,
            TOP_K=top_k > 0,
            QUIET=quiet,
            NOISE=noise is not None and (per_row or temperature > 0),
            MARGIN=margin is not None,
            TILES=power_of_two(-(-size // place["TILE"])),
            **options,
        )
        return
    floats = logits.new_empty((2, count, parts), dtype=torch.float64)
    tops = logits.new_empty((count, parts), dtype=torch.float32)
    places = tokens.new_empty((2, count, parts))
    sums = tokens.new_empty((count, parts, part))
    use_floats = logsumexp is not None or entropy is not None or kind == 1
    between = dict(part_tops=tops, part_places=places[0], part_nans=places[1])
    part_largest_kernel[(count, parts)](**place, **between, PART=part, **EXACT)
    combined = dict(
        **place, **warm, **between, bits=bits, parts=parts, sums=sums, part_e=floats[0], part_et=floats[1],
        FLOAT=use_floats, PART=part, PARTS=power_of_two(parts),
    )  # fmt: skip
    part_sum_kernel[(count, parts)](**combined, **EXACT)
    # With 8 warps a register spills on sm_90.
    finish = {**EXACT, "num_warps": 4}
    finish_kernel[(count,)](**combined, **draw, **written, TILES=power_of_two(parts * part), **finish)
