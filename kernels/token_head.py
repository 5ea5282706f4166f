"""Tokens from hidden states and the head's weight: a Triton kernel per tile of the vocabulary, and a merge per row.

A program multiplies some rows of hidden with the 512 rows of a tile on the tensor cores, and takes from the product,
which never leaves the registers, what ``genfast.reference.token_head`` (the specification, to the bit) asks of a tile:
the largest logit, sums of exponentials, and with v the whole-number weights a candidate at which their running sum
exceeds floor(u V / 2^64). Programs of one tile are neighbours in the grid, so that its weights come from memory once.

Whole-number sums of 62 bits would fill the registers twice over. Each weight is a float of at most 2^52, split into
three whole numbers of 18 bits or less, whose sums over 32 neighbours fit in 32 bits; the candidate is found among the
16 sums, and then among the 32 neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.backends import interpreting
from genfast.kernels.philox import philox_words
from genfast.kernels.token_sampling import _exp2_parts, _exponential, _place, _times_power, _weights, power_of_two
from genfast.reference import token_head as spec
from genfast.reference.token_sampling import LOG2_E, weight_bits

ROWS_AT_ONCE = 32
"""Rows of hidden per program where there are that many and the largest is all that is asked for; 16 otherwise, the
least that tensor cores take. A draw, a cap or a second largest hold so much more that twice the rows spill."""

DEPTH, STAGES = 16, {2: 4, 4: 2}
"""Elements of a row per step, and steps in flight by bytes of an element: what 64 KiB of shared memory hold."""

WARPS = {16: 8, 32: 16}
"""By rows per program: with these nothing spills."""

EXACT = {"enable_fp_fusion": False}
"""No contraction: the written order of operations is the specification's."""

_TILE = tl.constexpr(spec.TILE)
_BITS = tl.constexpr(spec.BITS)
_GROUP = tl.constexpr(32)
_LOG2_E = tl.constexpr(LOG2_E)
_MINUS_TWO_LOG2_E = tl.constexpr(-2 * LOG2_E)
_TANH_P = tl.constexpr(spec.TANH_P)
_TANH_NEAR = tl.constexpr(spec.TANH_NEAR)
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _capped(x, cap):
    z = tl.div_rn(x, cap + tl.zeros_like(x))
    a = tl.abs(z)
    square = a * a
    near = tl.zeros_like(a) + _TANH_P[5]
    for k in tl.static_range(5):
        near = tl.fma(near, square, tl.zeros_like(a) + _TANH_P[4 - k])
    p, n, _ = _exp2_parts(a, tl.full((), _MINUS_TWO_LOG2_E, tl.float32))
    e = _times_power(p, n)
    tanh = tl.where(a < _TANH_NEAR, a * near, tl.div_rn(1.0 - e, 1.0 + e))
    value = (tanh * cap).to(tl.int32, bitcast=True) | (z.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(x == x, value.to(tl.float32, bitcast=True), x)


@triton.jit
def _without(x, at, ids, count, begin, end):
    for k in range(count):
        one = tl.load(ids + k)
        if (one >= begin) & (one < end):
            x = tl.where(at == one - begin, float("-inf"), x)
    return x


@triton.jit
def _over_tile(x, OP: tl.constexpr):
    """The maximum (OP 0), minimum (1) or sum (2) of each row: neighbours first."""
    if OP == 0:
        found = tl.max(tl.max(x, 2), 1)
    elif OP == 1:
        found = tl.min(tl.min(x, 2), 1)
    else:
        found = tl.sum(tl.sum(x, 2), 1)
    return found


@triton.jit
def _largest(x, at):
    """(the largest of each row, its first place); the first NaN where there is one."""
    m = _over_tile(x, 0)
    place = _over_tile(tl.where(x == m[:, None, None], at, _FAR), 1)
    nan = _over_tile(tl.where(x != x, at, _FAR), 1)
    return tl.where(nan < _FAR, float("nan"), m), tl.where(nan < _FAR, nan, place)


@triton.jit
def _sum_of_exponentials(x, m, c):
    p, n, _ = _exp2_parts(x - m[:, None, None], c[:, None, None])
    return _over_tile(_times_power(p, n), 2)


@triton.jit
def _group_sums(x, m, c):
    """int64: sums of the weights over groups of neighbours, the last dimension."""
    p, n, _ = _exp2_parts(x - m[:, None, None], c[:, None, None])
    f = _times_power(p, n + _BITS)
    high = (f * 1.4551915228366852e-11).to(tl.int32)  # 2^-36
    rest = f - high.to(tl.float32) * 68719476736.0
    middle = (rest * 3.814697265625e-06).to(tl.int32)  # 2^-18
    low = (rest - middle.to(tl.float32) * 262144.0).to(tl.int32)
    high, middle, low = tl.sum(high, 2).to(tl.int64), tl.sum(middle, 2).to(tl.int64), tl.sum(low, 2).to(tl.int64)
    return (high << 36) + (middle << 18) + low


@triton.jit
def _row_words(
    seeds, seed_low, seed_high, ids, r, sequence, position, tile, stream, offset,
    SEED: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """64 bits for each row; SEED: 1 a number, 2 a tensor of one, 3 one per sequence."""
    zero = (position * 0).to(tl.uint32)
    k0, k1 = zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32)
    if SEED > 1:
        seed = tl.load(seeds + (sequence if SEED == 3 else sequence * 0))
        k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    sample = position * 0 + offset.to(tl.int64)
    if SEED != 3:
        sample += sequence
    if IDS:
        own = tl.load(ids + r)
        sample, position = (own >> 32) & 0xFFFFFFFF, own & 0xFFFFFFFF
    c0 = (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = (sample & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, _, _ = philox_words(k0, k1, c0, zero + tile.to(tl.uint32), c2, zero + stream.to(tl.uint32))
    return (w0.to(tl.uint64) << 32) | w1.to(tl.uint64)


@triton.jit(
    do_not_specialize=[
        "length", "size", "count", "first", "tiles", "suppressed", "quieted", "seed_low", "seed_high", "stream",
        "offset",
    ]
)  # fmt: skip
def partial_kernel(
    hidden, sequence_stride, position_stride, weight, weight_stride, bias, length, depth, size, count, first, tiles,
    rows, suppress, suppressed, quiet, quieted, cap, scale, judged_scale, seeds, seed_low, seed_high, stream, offset,
    ids, largest, index, exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform,
    BIAS: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, QUIET: tl.constexpr, HOT: tl.constexpr,
    JUDGED_SCALE: tl.constexpr, SEED: tl.constexpr, IDS: tl.constexpr, EXPONENTIALS: tl.constexpr,
    JUDGED_SUM: tl.constexpr, JUDGED_LOGIT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK rows and one tile."""
    tile = tl.program_id(1)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < count
    r = tl.minimum(lane, count - 1).to(tl.int64)
    _, sequence, position, _ = _place(rows, r, length, False, ROWS)
    # Tiles are cut at multiples of _TILE of the whole vocabulary; the first one here may be short.
    number = (first // _TILE + tile).to(tl.int64)
    begin = tl.maximum(number * _TILE, first)
    end = tl.minimum((number + 1) * _TILE, first.to(tl.int64) + size)
    entry = tl.arange(0, _TILE)
    here = entry < end - begin
    # Rows of weight beyond the tile are read as the first one and forgotten.
    source = tl.where(here, entry, 0) + (begin - first)
    k = tl.arange(0, DEPTH)
    a = hidden + (sequence * sequence_stride + position * position_stride)[:, None] + k[None, :]
    b = weight + (source * weight_stride)[None, :] + k[:, None]
    x = tl.zeros((BLOCK, _TILE), tl.float32)
    for done in range(0, depth, DEPTH):
        h = tl.load(a + done, mask=k[None, :] < depth - done, other=0.0)
        w = tl.load(b + done, mask=k[:, None] < depth - done, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision="ieee")
    if BIAS:
        x += tl.load(bias + source).to(tl.float32)[None, :]
    if CAP:
        x = _capped(x, cap)
    # Groups of neighbours as a dimension of their own. This one block stays in registers, all else is small or passing.
    x = tl.reshape(tl.where(here[None, :], x, float("-inf")), (BLOCK, _TILE // _GROUP, _GROUP))
    group_at, near = tl.arange(0, _TILE // _GROUP), tl.arange(0, _GROUP)
    at = (group_at * _GROUP)[None, :, None] + near[None, None, :]
    x = _without(x, at, suppress, suppressed, begin, end)
    out = r * tiles + tile

    top, place = _largest(x, at)
    odd = (top != top) | (top == float("inf")) | (top == float("-inf"))
    m = tl.where(odd, 0.0, top)
    tl.store(largest + out, top, mask=inside)
    tl.store(index + out, (begin + place).to(tl.int32), mask=inside)
    unit = tl.zeros((BLOCK,), tl.float32) + _LOG2_E
    if EXPONENTIALS:
        tl.store(exponentials + out, tl.where(odd, 0.0, _sum_of_exponentials(x, m, unit)), mask=inside)
    chosen, logit = place, top
    if HOT:
        c = tl.load(scale + r)
        hot = (c > 0) & (odd == 0)
        c = tl.where(c > 0, c, _LOG2_E)
        groups = tl.where(odd[:, None], 0, _group_sums(x, m, c))
        running = tl.cumsum(groups, 1)
        total = tl.sum(groups, 1)
        u = _row_words(
            seeds, seed_low, seed_high, ids, r, sequence, position, number + 1, stream, offset, SEED, IDS
        )  # fmt: skip
        target = tl.umulhi(u, total.to(tl.uint64)).to(tl.int64)[:, None]
        passed = running <= target
        group = tl.sum(tl.where(passed, 1, 0), 1)
        left = target - tl.sum(tl.where(passed, groups, 0), 1)[:, None]
        mine = tl.sum(tl.where(group_at[None, :, None] == group[:, None, None], x, 0.0), 1)
        v = _weights(mine, m[:, None], c[:, None], _BITS)
        drawn = tl.sum(tl.where(tl.cumsum(v, 1) <= left, 1, 0), 1)
        logit = tl.where(hot, tl.sum(tl.where(near[None, :] == drawn[:, None], mine, 0.0), 1), top)
        chosen = tl.where(hot, group * _GROUP + drawn, place)
        tl.store(mass + out, total, mask=inside)
        tl.store(candidate + out, (begin + chosen).to(tl.int32), mask=inside)
        if tile == 0:
            u = _row_words(
                seeds, seed_low, seed_high, ids, r, sequence, position, number * 0, stream, offset, SEED, IDS
            )  # fmt: skip
            tl.store(uniform + r, u.to(tl.int64, bitcast=True), mask=inside)
    base = m
    if QUIET:
        x = _without(x, at, quiet, quieted, begin, end)
        logit = tl.where(odd, top, _without(logit, chosen, quiet, quieted, begin, end))
        base = tl.where(odd, float("-inf"), _over_tile(x, 0))
        tl.store(judged_largest + out, base, mask=inside)
    nothing = odd | (base == float("-inf"))
    if JUDGED_SUM:
        c = unit
        if JUDGED_SCALE:
            c = tl.load(judged_scale + r)
        found = _sum_of_exponentials(x, tl.where(nothing, 0.0, base), c)
        tl.store(judged_sum + out, tl.where(nothing, 0.0, found), mask=inside)
    if JUDGED_LOGIT:
        tl.store(judged_logit + out, logit, mask=inside)


@triton.jit(do_not_specialize=["tiles", "bits"])
def merge_kernel(
    largest, index, tiles, bits, exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform,
    scale, judged_scale, tokens, confidences, logsumexp,
    HOT: tl.constexpr, QUIET: tl.constexpr, JUDGED: tl.constexpr, JUDGED_LOGIT: tl.constexpr,
    JUDGED_SCALE: tl.constexpr, LSE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row out of all its tiles."""
    r = tl.program_id(0)
    at = tl.arange(0, TILES)
    here = at < tiles
    row = r.to(tl.int64) * tiles
    x = tl.load(largest + row + at, mask=here, other=float("-inf"))
    m = tl.max(x, 0)
    nan = tl.min(tl.where(x != x, at, _FAR), 0)
    tile = tl.min(tl.where(x == m, at, _FAR), 0)
    tile = tl.where(nan < _FAR, nan, tile)
    empty = (m == float("-inf")) & (nan == _FAR)
    broken = (m == float("inf")) | (nan < _FAR)
    odd = empty | broken
    m = tl.where(odd, 0.0, m)
    token = tl.load(index + row + tile).to(tl.int64)
    if HOT:
        c = tl.load(scale + r)
        hot = (c > 0) & (odd == 0)
        c = tl.where(c > 0, c, _LOG2_E)
        w = _weights(tl.where(odd, 0.0, x), m, c, bits)
        v = tl.load(mass + row + at, mask=here, other=0)
        shares = tl.umulhi((v << 2).to(tl.uint64), w.to(tl.uint64)).to(tl.int64)
        shares = tl.where(here, shares, 0)
        u = tl.load(uniform + r).to(tl.uint64, bitcast=True)
        target = tl.umulhi(u, tl.sum(shares, 0).to(tl.uint64)).to(tl.int64)
        drawn = tl.sum(tl.where(tl.cumsum(shares, 0) <= target, 1, 0), 0)
        tile = tl.where(hot, drawn, tile)
        token = tl.where(hot, tl.load(candidate + row + tile, mask=hot, other=0).to(tl.int64), token)
    tl.store(tokens + r, tl.where(empty, 0, token))
    none = float("nan")
    if LSE:
        e = tl.load(exponentials + row + at, mask=here, other=0.0)
        unit = tl.full((), _LOG2_E, tl.float32)
        sums = tl.where(here & (odd == 0), _exponential(x, m, unit) * e.to(tl.float64), 0.0)
        value = m.to(tl.float64) + tl.log(tl.where(odd, 1.0, tl.sum(sums, 0)))
        value = tl.where(broken, none, tl.where(empty, float("-inf"), value))
        tl.store(logsumexp + r, value.to(tl.float32))
    if JUDGED:
        c = tl.full((), _LOG2_E, tl.float32)
        if JUDGED_SCALE:
            c = tl.load(judged_scale + r)
        base = m
        if QUIET:
            x = tl.load(judged_largest + row + at, mask=here, other=float("-inf"))
            base = tl.max(x, 0)
        nothing = odd | (base == float("-inf"))
        base = tl.where(nothing, 0.0, base)
        if JUDGED_LOGIT:
            logit = tl.load(judged_logit + row + tile)
        else:
            logit = tl.load(largest + row + tile)
        e = tl.load(judged_sum + row + at, mask=here, other=0.0)
        total = tl.sum(tl.where(here & (nothing == 0), _exponential(x, base, c) * e.to(tl.float64), 0.0), 0)
        value = _exponential(tl.where(nothing, 0.0, logit), base, c) / tl.where(nothing, 1.0, total)
        value = tl.where(broken, none, tl.where(nothing, 0.0, value))
        tl.store(confidences + r, value.to(tl.float32))


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
    """See :func:`genfast.lm_head_partials`; hidden is [B, L, d], the outputs are written."""
    count, tiles = largest.shape
    if not count:
        return
    number = seed if isinstance(seed, int) else 0
    plain = mass is None and judged_largest is None and not softcap
    block = ROWS_AT_ONCE if count > 16 and plain else 16

    def given(t):  # unused pointers need something to point at
        return largest if t is None else t

    partial_kernel[(triton.cdiv(count, block), tiles)](
        hidden,
        hidden.stride(0),
        hidden.stride(1),
        weight,
        weight.stride(0),
        given(bias),
        hidden.shape[1],
        weight.shape[1],
        weight.shape[0],
        count,
        first,
        tiles,
        given(rows),
        given(suppress),
        0 if suppress is None else suppress.numel(),
        given(suppress_confidence),
        0 if suppress_confidence is None else suppress_confidence.numel(),
        softcap,
        given(scale),
        given(judged_scale),
        seed if isinstance(seed, Tensor) else largest,
        number & 0xFFFFFFFF,
        (number >> 32) & 0xFFFFFFFF,
        stream & 0xFFFFFFFF,
        offset,
        given(ids),
        largest,
        index,
        *(given(t) for t in (exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform)),
        BIAS=bias is not None,
        CAP=softcap != 0,
        ROWS=rows is not None,
        QUIET=judged_largest is not None,
        HOT=mass is not None,
        JUDGED_SCALE=judged_scale is not None,
        SEED=0 if seed is None else 1 if isinstance(seed, int) else 2 + seed.dim(),
        IDS=ids is not None,
        EXPONENTIALS=exponentials is not None,
        JUDGED_SUM=judged_sum is not None,
        JUDGED_LOGIT=judged_logit is not None,
        BLOCK=block,
        DEPTH=DEPTH,
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        WIDEN=interpreting() and hidden.dtype == torch.bfloat16,
        num_warps=WARPS[block],
        num_stages=STAGES[hidden.element_size()],
        **EXACT,
    )


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
    """See :func:`genfast.merge_head_partials`; the outputs are written."""
    count, tiles = largest.shape
    if not count:
        return
    fields = (exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform, scale, judged_scale)
    merge_kernel[(count,)](
        largest,
        index,
        tiles,
        weight_bits(tiles),
        *(largest if t is None else t for t in fields),
        tokens,
        tokens if confidences is None else confidences,
        tokens if logsumexp is None else logsumexp,
        HOT=mass is not None,
        QUIET=judged_largest is not None,
        JUDGED=confidences is not None,
        JUDGED_LOGIT=judged_logit is not None,
        JUDGED_SCALE=judged_scale is not None,
        LSE=logsumexp is not None,
        TILES=power_of_two(tiles),
        num_warps=4,
        **EXACT,
    )
