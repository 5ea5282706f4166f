"""The exact per-sample quantile of |x0| that dynamic thresholding clips to (Saharia et al. 2022), without a sort.

Radix selection: non-negative floats are ordered as their bits. Each pass over the sample recomputes x0, keeps the
values whose leading bits match the order statistic found so far, and counts their next 8 bits; 4 passes for float32, 8
for float64. The two neighbouring order statistics that the quantile interpolates between are followed together, with
a second histogram only once their leading bits differ. Counting is integer, so the result is exact and deterministic.
"""

import triton
import triton.language as tl

from genfast.kernels.parts import coefficient, guidance_scale, guided, load_tile, table_row

BINS = 256
FLAGS = 16
"""Words after a sample's histograms; the first is set if a value is NaN, the others keep samples apart."""


def histogram_words(passes: int) -> int:
    """Words of counters per sample: two histograms a pass, and the flags."""
    return passes * 2 * BINS + FLAGS


@triton.jit
def model_x0(x_t, output, k_x, k_m):
    return k_x * x_t + k_m * output


@triton.jit
def _select(counts, rank, BINS: tl.constexpr):
    """The bin that holds the value of a rank, and the value's rank within the bin."""
    digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, BINS) < digit, counts, 0), 0)
    return digit, rank - before


@triton.jit
def _narrow(counters, state, number, below, above, BINS: tl.constexpr):
    """(prefix, rank) of the lower and of the upper order statistic after ``number`` passes."""
    low, low_rank = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + below
    high, high_rank = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + above
    if number > 0:
        if number > 1:
            low, low_rank = tl.load(state + number * 4 - 4), tl.load(state + number * 4 - 3)
            high, high_rank = tl.load(state + number * 4 - 2), tl.load(state + number * 4 - 1)
        bins = tl.arange(0, BINS)
        counters += (number - 1) * 2 * BINS
        low_counts = tl.load(counters + bins).to(tl.int64)
        high_counts = tl.load(counters + tl.where(high == low, 0, BINS) + bins).to(tl.int64)
        digit, low_rank = _select(low_counts, low_rank, BINS)
        low = low * BINS + digit
        digit, high_rank = _select(high_counts, high_rank, BINS)
        high = high * BINS + digit
    return low, low_rank, high, high_rank


@triton.jit(do_not_specialize=["row", "row_stride", "rows", "guidance_stride", "below", "above", "number", "parts",
                               "tiles_per_part"])  # fmt: skip
def histogram_kernel(
    x_t,
    x_t_stride,
    output,
    output_stride,
    uncond,
    uncond_stride,
    table,
    step,
    row,
    row_stride,
    rows,
    guidance_ptr,
    guidance: tl.float64,
    guidance_stride,
    factors,
    counters,  # int32 or int64 [batch, histogram_words(passes)], zero at the first pass
    state,  # int64 [batch, passes, 4]: what pass k found, at k
    inner,
    below,
    above,
    number,
    parts,
    tiles_per_part,
    INPUTS: tl.constexpr,
    STEP_TENSOR: tl.constexpr,
    GUIDE: tl.constexpr,
    RESCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PASSES: tl.constexpr,
    WORDS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    part = program % parts
    row_ptr, ok, _ = table_row(table, step, row, row_stride, rows, sample, 2 * INPUTS + 8, STEP_TENSOR)
    k_x = coefficient(row_ptr, 2 * INPUTS + 4, ok, COMPUTE)
    k_m = coefficient(row_ptr, 2 * INPUTS + 5, ok, COMPUTE)
    if GUIDE > 0:
        scale = guidance_scale(guidance_ptr, guidance, guidance_stride, sample, GUIDE, COMPUTE)
    if RESCALE:
        factor = tl.load(factors + sample)
    x_t += sample * x_t_stride
    output += sample * output_stride
    if GUIDE > 0:
        uncond += sample * uncond_stride

    counters += sample * WORDS
    state += sample * PASSES * 4
    low, low_rank, high, high_rank = _narrow(counters, state, number, below, above, BINS)
    if (part == 0) & (number > 0):
        tl.store(state + number * 4, low)
        tl.store(state + number * 4 + 1, low_rank)
        tl.store(state + number * 4 + 2, high)
        tl.store(state + number * 4 + 3, high_rank)

    BITS: tl.constexpr = 8 * PASSES
    Key: tl.constexpr = tl.int32 if BITS == 32 else tl.int64
    shift = BITS - 8 - 8 * number
    split = low != high
    lanes = tl.arange(0, BLOCK)
    low_counts = tl.zeros([BINS], tl.int32)
    high_counts = tl.zeros([BINS], tl.int32)
    has_nan = tl.zeros([BLOCK], tl.int32)
    for tile in range(tiles_per_part):
        start = (part.to(tl.int64) * tiles_per_part + tile) * BLOCK
        mask = lanes < inner - start
        m = load_tile(output + start, lanes, mask, COMPUTE)
        if GUIDE > 0:
            m = guided(m, load_tile(uncond + start, lanes, mask, COMPUTE), scale)
        if RESCALE:
            m = m * factor
        x0 = model_x0(load_tile(x_t + start, lanes, mask, COMPUTE), m, k_x, k_m)
        has_nan = has_nan | ((x0 != x0) & mask).to(tl.int32)
        key = tl.abs(x0).to(Key, bitcast=True)
        digit = ((key >> shift) & (BINS - 1)).to(tl.int32)
        # Two shifts, because the first pass would otherwise shift by the width of the type.
        prefix = ((key >> shift) >> 8).to(tl.int64)
        low_counts += tl.histogram(digit, BINS, mask=mask & (prefix == low))
        if split:
            high_counts += tl.histogram(digit, BINS, mask=mask & (prefix == high))
    counters += number * 2 * BINS
    bins = tl.arange(0, BINS)
    tl.atomic_add(counters + bins, low_counts, mask=low_counts > 0, sem="relaxed")
    if split:
        tl.atomic_add(counters + BINS + bins, high_counts, mask=high_counts > 0, sem="relaxed")
    if (number == 0) & (tl.max(has_nan, 0) > 0):
        tl.atomic_max(counters + PASSES * 2 * BINS, 1, sem="relaxed")


@triton.jit(do_not_specialize=["below", "above"])
def limit_kernel(
    counters,
    state,
    limits,  # COMPUTE [batch]
    weight: tl.float64,
    maximum: tl.float64,
    below,
    above,
    COMPUTE: tl.constexpr,
    PASSES: tl.constexpr,
    WORDS: tl.constexpr,
    BINS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    counters += sample * WORDS
    low, _, high, _ = _narrow(counters, state + sample * PASSES * 4, PASSES, below, above, BINS)
    Key: tl.constexpr = tl.int32 if PASSES == 4 else tl.int64
    a = low.to(Key).to(COMPUTE, bitcast=True)
    b = high.to(Key).to(COMPUTE, bitcast=True)
    # torch.lerp: from the nearer end, so that both ends are met exactly.
    w = tl.full((), weight, tl.float64).to(COMPUTE)
    s = tl.where(w < 0.5, tl.fma(w, b - a, a), tl.fma(w - 1.0, b - a, b))
    s = tl.where(s < 1.0, 1.0, s)
    top = tl.full((), maximum, tl.float64).to(COMPUTE)
    s = tl.where(s > top, top, s)
    s = tl.where(tl.load(counters + PASSES * 2 * BINS) != 0, float("nan"), s)
    tl.store(limits + sample, s.to(COMPUTE))
