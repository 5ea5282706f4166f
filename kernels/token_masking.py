"""The forward process of discrete diffusion. ``genfast.reference.token_masking`` is the specification, to the bit.

A program noises a tile of a sequence: it draws the time of every block there, and four positions to a Philox block.
With a fixed count there are two launches: the words of the positions, then one program per sequence, which finds the
word that so many are below by bisection over its bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.philox import philox_words
from genfast.reference.token_masking import TOKENS

TILE = 1024
EXACT = {"num_warps": 4, "enable_fp_fusion": False}

_TWO_TO_32 = tl.constexpr(2.0**32)
_TWO_TO_MINUS_24 = tl.constexpr(2.0**-24)
_ALL = tl.constexpr(2**32)
_TOKENS_HIGH, _TIMES_HIGH = tl.constexpr(TOKENS >> 32), tl.constexpr(1 << 31)


@triton.jit
def _key(seeds, seed_low, seed_high, offset, row, SEED: tl.constexpr):
    """(the two words of the key, the sample's counter)."""
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    if SEED > 1:
        seed = tl.load(seeds + (row if SEED == 3 else 0))
        k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    sample = offset.to(tl.int64)
    if SEED != 3:
        sample += row
    return k0, k1, (sample & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _words(k0, k1, block, high, sample, stream):
    """The four words of a tile of Philox blocks, int64; ``high`` is the high word of the first of all blocks."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    c1 = (block >> 32).to(tl.uint32) + tl.full((), high, tl.uint32)
    return philox_words(k0, k1, low, c1, sample + zero, stream.to(tl.uint32) + zero)


@triton.jit
def _word(words, k: tl.constexpr):
    return words[k].to(tl.int64)


@triton.jit
def _times(
    times, block, inside, low, spread, strata, first, k0, k1, sample, stream,
    TIMES: tl.constexpr, STRATA: tl.constexpr,
):  # fmt: skip
    """Times of blocks of a sequence. ``times``: its numbers; TIMES 0: to be drawn, 1: uniform, 2: times."""
    if TIMES == 0:
        word = _word(_words(k0, k1, block, _TIMES_HIGH, sample, stream), 0)
        t = (word >> 8).to(tl.float32) * _TWO_TO_MINUS_24
    else:
        t = tl.load(times + block, mask=inside, other=0.0)
    if STRATA:
        parts = strata.to(tl.float32) + tl.zeros_like(t)
        stratum = (first + block) % strata
        t = tl.div_rn(t, parts) + tl.div_rn(stratum.to(tl.float32), parts)
        t = tl.where(t >= 1.0, t - 1.0, t)
    if TIMES < 2:
        t = t * spread + low
    return t


@triton.jit
def _token(clean, noised, word, given, at, mask_id, vocab_size, TOKENS: tl.constexpr):
    """What a noised position becomes: TOKENS 0 the mask, 1 a uniform token, 2 a given one."""
    if TOKENS == 0:
        token = tl.zeros_like(clean) + mask_id
    elif TOKENS == 1:
        token = (word * vocab_size) >> 32
    else:
        token = tl.load(given + at, mask=noised, other=0)
    return tl.where(noised, token, clean)


@triton.jit(do_not_specialize=["length", "block_size", "blocks", "low", "spread", "slope", "floor", "strata", "mask_id",
                               "vocab_size", "seed_low", "seed_high", "stream", "offset"])  # fmt: skip
def mask_kernel(
    x0, x0_stride, maskable, maskable_stride, length, times, block_size, blocks, low, spread, slope, floor, strata,
    noise, tokens, mask_id, vocab_size, seeds, seed_low, seed_high, stream, offset, x, mask, weight, times_out,
    TIMES: tl.constexpr, STRATA: tl.constexpr, BY_TIME: tl.constexpr, MASKABLE: tl.constexpr, NOISE: tl.constexpr,
    TOKENS: tl.constexpr, SEED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = (tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.int64)  # Philox blocks
    k0, k1, sample = _key(seeds, seed_low, seed_high, offset, row, SEED)
    words = _words(k0, k1, lane, 0, sample, stream)
    others = words
    if TOKENS == 1:
        others = _words(k0, k1, lane, _TOKENS_HIGH, sample, stream)
    first = offset.to(tl.int64) * blocks + row * blocks
    for k in tl.static_range(4):
        at = (lane >> 4) * 64 + (lane & 15) + 16 * k
        inside = at < length
        block = at // block_size
        t = _times(
            times + row * blocks, block, block < blocks, low, spread, strata, first, k0, k1, sample, stream,
            TIMES, STRATA,
        )  # fmt: skip
        p = t * slope + floor
        if NOISE:
            noised = tl.load(noise + row * length + at, mask=inside, other=0.0) < p
        else:
            noised = _word(words, k).to(tl.float64) < p.to(tl.float64) * _TWO_TO_32
        noised = noised & inside
        if MASKABLE:
            noised = noised & (tl.load(maskable + row * maskable_stride + at, mask=inside, other=0) != 0)
        clean = tl.load(x0 + row * x0_stride + at, mask=inside, other=0)
        token = _token(clean, noised, _word(others, k), tokens + row * length, at, mask_id, vocab_size, TOKENS)
        tl.store(x + row * length + at, token, mask=inside)
        tl.store(mask + row * length + at, noised.to(tl.int8), mask=inside)
        if TOKENS == 0:
            divisor = t if BY_TIME else p
            share = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
            tl.store(weight + row * length + at, tl.where(noised, share, 0.0), mask=inside)
        tl.store(times_out + row * blocks + block, t, mask=(block < blocks) & (at == block * block_size))


@triton.jit(do_not_specialize=["length", "seed_low", "seed_high", "stream", "offset"])
def word_kernel(
    length, maskable, maskable_stride, seeds, seed_low, seed_high, stream, offset, out,
    MASKABLE: tl.constexpr, SEED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The word of every position, 2^32 where it is not maskable."""
    row = tl.program_id(0).to(tl.int64)
    lane = (tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.int64)
    k0, k1, sample = _key(seeds, seed_low, seed_high, offset, row, SEED)
    words = _words(k0, k1, lane, 0, sample, stream)
    for k in tl.static_range(4):
        at = (lane >> 4) * 64 + (lane & 15) + 16 * k
        word = _word(words, k)
        if MASKABLE:
            allowed = tl.load(maskable + row * maskable_stride + at, mask=at < length, other=0) != 0
            word = tl.where(allowed, word, _ALL)
        tl.store(out + row * length + at, word, mask=at < length)


@triton.jit
def _below(words, length, limit, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.int32)
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        total += tl.where(tl.load(words + at, mask=at < length, other=_ALL) < limit, 1, 0)
    return tl.sum(total, 0).to(tl.int64)


@triton.jit(do_not_specialize=["length", "count", "mask_id", "vocab_size", "seed_low", "seed_high", "stream", "offset"])
def count_kernel(
    words, x0, x0_stride, length, counts, count, mask_id, vocab_size, seeds, seed_low, seed_high, stream, offset,
    x, mask, weight, times_out,
    COUNTS: tl.constexpr, TOKENS: tl.constexpr, SEED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Noise the smallest words of a row; equal words from the left."""
    row = tl.program_id(0).to(tl.int64)
    words += row * length
    most = _below(words, length, _ALL, TILE)
    wanted = tl.full((), 0, tl.int64) + (tl.load(counts + row) if COUNTS else count)
    wanted = tl.minimum(tl.maximum(wanted, 0), most)
    # At most `wanted` words are below `low`; more are below `high`, unless all are wanted.
    low, high = tl.full((), 0, tl.int64), tl.full((), _ALL, tl.int64)
    below = tl.full((), 0, tl.int64)
    while (high - low > 1) & (below < wanted):
        middle = (low + high) // 2
        found = _below(words, length, middle, TILE)
        high = tl.where(found > wanted, middle, high)
        low = tl.where(found > wanted, low, middle)
        below = tl.where(found > wanted, below, found)
    ties = wanted - below
    p = tl.div_rn(wanted.to(tl.float32), tl.maximum(most, 1).to(tl.float32))
    share = tl.div_rn(tl.full((), 1.0, tl.float32), tl.maximum(p, 1e-30))
    tl.store(times_out + row, p)
    k0, k1, sample = _key(seeds, seed_low, seed_high, offset, row, SEED)
    seen = tl.full((), 0, tl.int64)
    for first in range(0, length, TILE):
        at = (first + tl.arange(0, TILE)).to(tl.int64)
        inside = at < length
        word = tl.load(words + at, mask=inside, other=_ALL)
        tie = (word == low).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        seen += tl.sum(tie, 0)
        noised = (word < low) | ((tie != 0) & (rank <= ties))
        noised = noised & inside & (word < _ALL)
        clean = tl.load(x0 + row * x0_stride + at, mask=inside, other=0)
        token_word = word
        if TOKENS == 1:
            four = _words(k0, k1, (at >> 6) * 16 + (at & 15), _TOKENS_HIGH, sample, stream)
            which = (at >> 4) & 3
            token_word = tl.where(
                which == 0, four[0], tl.where(which == 1, four[1], tl.where(which == 2, four[2], four[3]))
            )
            token_word = token_word.to(tl.int64)
        token = _token(clean, noised, token_word, x, at, mask_id, vocab_size, TOKENS)
        tl.store(x + row * length + at, token, mask=inside)
        tl.store(mask + row * length + at, noised.to(tl.int8), mask=inside)
        if TOKENS == 0:
            tl.store(weight + row * length + at, tl.where(noised, share, 0.0), mask=inside)


def forward_mask(
    x0: Tensor,
    *,
    mask_id: int,
    t: Tensor | None,
    drawn: bool,
    low: float,
    spread: float,
    slope: float,
    floor: float,
    by_time: bool,
    block_size: int,
    strata: int,
    maskable: Tensor | None,
    count: int | Tensor | None,
    vocab_size: int,
    noise: Tensor | None,
    tokens: Tensor | None,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    times_out: Tensor,
) -> None:
    """See :func:`genfast.forward_mask`."""
    batch, length = x0.shape
    if not batch or not length:
        if count is not None:
            times_out.zero_()
            return
        if not times_out.numel():
            return
    per_row = isinstance(seed, Tensor)
    number = 0 if per_row or seed is None else seed
    random = (
        seed if per_row else x0,
        number & 0xFFFFFFFF,
        (number >> 32) & 0xFFFFFFFF,
        stream & 0xFFFFFFFF,
        offset,
    )
    kind = dict(SEED=0 if seed is None else 2 + seed.dim() if per_row else 1, TILE=TILE, **EXACT)
    allowed = x0 if maskable is None else maskable.view(torch.int8)
    allowed_stride = 0 if maskable is None else maskable.stride(0)
    grid = (batch, max(triton.cdiv(length, TILE), 1))
    becomes = 0 if not vocab_size else 1 if tokens is None else 2
    if count is not None:
        word_kernel[grid](length, allowed, allowed_stride, *random, x, MASKABLE=maskable is not None, **kind)
        per_sequence = isinstance(count, Tensor)
        count_kernel[(batch,)](
            x,
            x0,
            x0.stride(0),
            length,
            count if per_sequence else x0,
            0 if per_sequence else count,
            mask_id,
            vocab_size,
            *random,
            x,
            mask.view(torch.int8),
            times_out if weight is None else weight,
            times_out,
            COUNTS=per_sequence,
            TOKENS=becomes,
            **kind,
        )
        return
    mask_kernel[grid](
        x0,
        x0.stride(0),
        allowed,
        allowed_stride,
        length,
        times_out if t is None else t,
        block_size,
        times_out.shape[1],
        low,
        spread,
        slope,
        floor,
        strata,
        times_out if noise is None else noise,
        x0 if tokens is None else tokens,
        mask_id,
        vocab_size,
        *random,
        x,
        mask.view(torch.int8),
        times_out if weight is None else weight,
        times_out,
        TIMES=0 if t is None else 1 if drawn else 2,
        STRATA=strata > 0,
        BY_TIME=by_time,
        MASKABLE=maskable is not None,
        NOISE=noise is not None,
        TOKENS=becomes,
        **kind,
    )
