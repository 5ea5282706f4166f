"""One step of a sampler that is linear in its inputs, fused into one Triton kernel.

    x_1 <- uncond + g (x_1 - uncond), times the rescale factor         (classifier-free guidance)
    x0   = k_x x_0 + k_m x_1, clipped, or thresholded
    out  = sum_i c_i x_i + c_x0 x0 + c_noise s z,   second = the same with d

The semantics are those of ``genfast.reference.sampler_step``, and so is the order of operations. A program takes one
tile of one sample, on a one-dimensional grid; the numbers of a step come from the sample's row of a table on the
device, so that no step recompiles or synchronises. A row out of range makes its sample NaN. Where nothing differs
between samples and all tensors are dense, the whole batch is one sample.

With noise from Philox a tile is four sub-tiles, one per word of its Philox blocks, so that each block is computed
once; runs of 16 elements keep the accesses wide. Guidance rescaling and dynamic thresholding need a number per sample
first: see ``guidance.py`` and ``threshold.py``.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels import guidance as guidance_kernels
from genfast.kernels import threshold as threshold_kernels
from genfast.kernels.parts import BLOCK, PARTS, coefficient, guidance_scale, guided, load_tile, parts_of, table_row
from genfast.kernels.philox import block_words, normal_pair
from genfast.kernels.rounding import rounded
from genfast.kernels.threshold import model_x0
from genfast.layout import arrange, give_back, is_flat
from genfast.step_table import StepTable, quantile_rank

NO_NOISE, TENSOR, PHILOX = 0, 1, 2
NO_X0, PLAIN, CLIP, THRESHOLD = 0, 1, 2, 3
NO_GUIDANCE, NUMBER, PER_SAMPLE = 0, 1, 2

EXACT = {"num_warps": 4, "enable_fp_fusion": False}
"""Compile options of every kernel here: no contraction, so that the written order of operations is the executed one."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HI, _LN2_LO = tl.constexpr(0.693145751953125), tl.constexpr(1.42860676533018e-06)


@triton.jit
def _exp(x, COMPUTE: tl.constexpr):
    """exp to about 1 ulp; the hardware's approximation of float32 loses digits as |x| grows."""
    if COMPUTE.primitive_bitwidth == 64:
        result = tl.exp(x)
    else:
        x = tl.where(x < -110.0, -110.0, x)
        x = tl.where(x > 90.0, 90.0, x)
        k = tl.floor(tl.fma(x, _LOG2_E, 0.5))
        r = tl.fma(-k, _LN2_LO, tl.fma(-k, _LN2_HI, x))
        p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
        p = tl.fma(p, r, 1.0 / 120)
        p = tl.fma(p, r, 1.0 / 24)
        p = tl.fma(p, r, 1.0 / 6)
        p = tl.fma(p, r, 0.5)
        p = tl.fma(p * r, r, r) + 1.0
        # 2^k in two factors: the result may overflow or be subnormal. A NaN is not a number of halvings.
        power = tl.where(x == x, k, 0.0).to(tl.int32)
        half = power >> 1
        first = ((half + 127) << 23).to(tl.float32, bitcast=True)
        result = p * first * ((power - half + 127) << 23).to(tl.float32, bitcast=True)
    return result


@triton.jit
def _store(pointer, lanes, value, mask, COMPUTE: tl.constexpr):
    target: tl.constexpr = pointer.dtype.element_ty
    if COMPUTE.primitive_bitwidth == 64 and target.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # as PyTorch converts
    tl.store(pointer + lanes, rounded(value, target), mask=mask)


@triton.jit
def _tile(
    x, uncond, log_variance, noise, z, out, second, lanes, mask,
    c, c_x0, c_noise, d, d_x0, d_noise, k_x, k_m, log_offset, log_slope, scale, factor, low, high,
    INPUTS: tl.constexpr, NOISE: tl.constexpr, X0: tl.constexpr, GUIDE: tl.constexpr, RESCALE: tl.constexpr,
    LOG_STD: tl.constexpr, SECOND: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros(lanes.shape, COMPUTE)
    total2 = tl.zeros(lanes.shape, COMPUTE)
    x_t = total
    output = total
    for i in tl.static_range(INPUTS):
        value = load_tile(x[i], lanes, mask, COMPUTE)
        if i == 0:
            x_t = value
        if i == 1:
            if GUIDE > 0:
                value = guided(value, load_tile(uncond, lanes, mask, COMPUTE), scale)
            if RESCALE:
                value = value * factor
            output = value
        total += value * c[i]
        if SECOND:
            total2 += value * d[i]
    if X0 > 0:
        x0 = model_x0(x_t, output, k_x, k_m)
        # Comparisons, not minimum and maximum: a NaN stays.
        if X0 > 1:
            x0 = tl.where(x0 < low, low, x0)
            x0 = tl.where(x0 > high, high, x0)
        if X0 == 3:
            x0 = tl.div_rn(x0, high + tl.zeros_like(x0)) if COMPUTE.primitive_bitwidth == 32 else x0 / high
        total += x0 * c_x0
        if SECOND:
            total2 += x0 * d_x0
    if NOISE > 0:
        if NOISE == 1:
            z = load_tile(noise, lanes, mask, COMPUTE)
        z = z.to(COMPUTE)
        if LOG_STD:
            z = z * _exp(log_offset + log_slope * load_tile(log_variance, lanes, mask, COMPUTE), COMPUTE)
        total += z * c_noise
        if SECOND:
            total2 += z * d_noise
    _store(out, lanes, total, mask, COMPUTE)
    if SECOND:
        _store(second, lanes, total2, mask, COMPUTE)


@triton.jit(
    do_not_specialize=[
        "row", "row_stride", "rows", "guidance_stride", "seed_low", "seed_high", "seed_stride", "draw", "offset",
        "tiles",
    ]
)  # fmt: skip
def step_kernel(
    x,  # a tuple of INPUTS pointers
    x_stride,
    uncond,
    uncond_stride,
    log_variance,
    log_variance_stride,
    noise,
    noise_stride,
    out,
    out_stride,
    second,
    second_stride,
    table,  # float64 [rows, 2 INPUTS + 8]
    step,  # int64: row of sample b is step[b row_stride], or without STEP_TENSOR row + b row_stride
    row,
    row_stride,
    rows,
    guidance_ptr,
    guidance: tl.float64,
    guidance_stride,
    low: tl.float64,
    high: tl.float64,
    factors,
    limits,
    seeds,
    seed_low,
    seed_high,
    seed_stride,
    draw,  # the stream; Triton keeps that name for itself
    offset,
    inner,
    tiles,
    INPUTS: tl.constexpr,
    NOISE: tl.constexpr,
    X0: tl.constexpr,
    GUIDE: tl.constexpr,
    RESCALE: tl.constexpr,
    LOG_STD: tl.constexpr,
    SECOND: tl.constexpr,
    STEP_TENSOR: tl.constexpr,
    SEED_TENSOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * BLOCK

    N: tl.constexpr = INPUTS
    entry, ok, r = table_row(table, step, row, row_stride, rows, sample, 2 * N + 8, STEP_TENSOR)
    c, d = (), ()
    for i in tl.static_range(N):
        c = c + (coefficient(entry, i, ok, COMPUTE),)
        if SECOND:
            d = d + (coefficient(entry, N + 2 + i, ok, COMPUTE),)
    nothing = tl.zeros((), COMPUTE)
    c_x0, d_x0, k_x, k_m = nothing, nothing, nothing, nothing
    c_noise, d_noise, log_offset, log_slope = nothing, nothing, nothing, nothing
    scale, factor, smallest, largest = nothing, nothing, nothing, nothing
    if X0 > 0:
        c_x0 = coefficient(entry, N, ok, COMPUTE)
        d_x0 = coefficient(entry, 2 * N + 2, ok, COMPUTE)
        k_x = coefficient(entry, 2 * N + 4, ok, COMPUTE)
        k_m = coefficient(entry, 2 * N + 5, ok, COMPUTE)
    if NOISE > 0:
        c_noise = coefficient(entry, N + 1, ok, COMPUTE)
        d_noise = coefficient(entry, 2 * N + 3, ok, COMPUTE)
    if LOG_STD:
        log_offset = coefficient(entry, 2 * N + 6, ok, COMPUTE)
        log_slope = coefficient(entry, 2 * N + 7, ok, COMPUTE)
    if GUIDE > 0:
        scale = guidance_scale(guidance_ptr, guidance, guidance_stride, sample, GUIDE, COMPUTE)
        uncond += sample * uncond_stride + start
    if RESCALE:
        factor = tl.load(factors + sample)
    if X0 == 2:
        smallest = tl.full((), low, tl.float64).to(COMPUTE)
        largest = tl.full((), high, tl.float64).to(COMPUTE)
    if X0 == 3:
        largest = tl.load(limits + sample)
        smallest = -largest

    tile = ()
    for i in tl.static_range(N):
        tile = tile + (x[i] + (sample * x_stride[i] + start),)
    if LOG_STD:
        log_variance += sample * log_variance_stride + start
    if NOISE == 1:
        noise += sample * noise_stride + start
    out += sample * out_stride + start
    if SECOND:
        second += sample * second_stride + start

    if NOISE == 2:
        if SEED_TENSOR:
            seed = tl.load(seeds + sample * seed_stride)
            k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        else:
            k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
        # A seed of its own makes a row the first sample of that seed.
        counter = offset.to(tl.uint32, bitcast=True) + (sample * (1 - seed_stride)).to(tl.uint32)
        stream = draw.to(tl.uint32, bitcast=True)
        if STEP_TENSOR:
            stream += r.to(tl.uint32)
        blocks = tl.arange(0, BLOCK // 4)
        w = block_words(k0, k1, start // 4, blocks, counter, stream)
        first = (blocks // 16) * 64 + blocks % 16
        for pair in tl.static_range(2):
            z = normal_pair(w[2 * pair], w[2 * pair + 1])
            for half in tl.static_range(2):
                lanes = first + (32 * pair + 16 * half)
                _tile(
                    tile, uncond, log_variance, noise, z[half], out, second, lanes, lanes < inner - start,
                    c, c_x0, c_noise, d, d_x0, d_noise, k_x, k_m, log_offset, log_slope, scale, factor, smallest,
                    largest, INPUTS, NOISE, X0, GUIDE, RESCALE, LOG_STD, SECOND, COMPUTE,
                )  # fmt: skip
    else:
        lanes = tl.arange(0, BLOCK)
        _tile(
            tile, uncond, log_variance, noise, nothing, out, second, lanes, lanes < inner - start,
            c, c_x0, c_noise, d, d_x0, d_noise, k_x, k_m, log_offset, log_slope, scale, factor, smallest, largest,
            INPUTS, NOISE, X0, GUIDE, RESCALE, LOG_STD, SECOND, COMPUTE,
        )  # fmt: skip


def sampler_step(
    inputs,
    table: StepTable,
    *,
    step,
    uncond,
    guidance,
    guidance_rescale,
    clip,
    threshold,
    log_variance,
    noise,
    seed,
    stream,
    offset,
    out,
    second_out,
) -> None:
    """Fill ``out`` (and ``second_out``). The arguments are those of :func:`genfast.sampler_step`, already checked.

    A tensor whose samples are not one dense run in the order of the others goes through a contiguous copy; with
    Philox noise that order is row-major. Reductions use at most 17 KB per sample of fewer than 2^31 elements, 25 KB in
    float64.
    """
    count = out.numel()
    if count == 0:
        return
    philox = noise is None and seed is not None
    operands, strides = arrange([*inputs, uncond, log_variance, noise, out, second_out], 2, ordered=philox)
    *inputs, uncond, log_variance, noise, first, second = operands

    batch = out.shape[0] if out.dim() else 1
    inner = count // batch
    compute = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    rescale = uncond is not None and guidance_rescale != 0.0

    row, row_stride, step_tensor = 0, 0, None
    if step is None:
        row_stride = int(table.rows > 1)
    elif isinstance(step, Tensor):
        step_tensor, row_stride = step, int(step.numel() > 1)
    else:
        row = step
        stream += step
    guide, guidance_tensor, guidance_stride = NO_GUIDANCE, None, 0
    if uncond is not None:
        guide = NUMBER
        if isinstance(guidance, Tensor):
            guide, guidance_tensor, guidance_stride, guidance = PER_SAMPLE, guidance, int(guidance.numel() > 1), 1.0
    source = TENSOR if noise is not None else PHILOX if philox else NO_NOISE
    seeds, seed_low, seed_high, seed_stride = None, 0, 0, 0
    if philox:
        if isinstance(seed, Tensor):
            seeds, seed_stride = seed, seed.dim()
        else:
            seed_low, seed_high = _int32(seed), _int32(seed >> 32)

    if (
        row_stride == 0
        and guidance_stride == 0
        and not (philox or rescale or threshold)
        and is_flat(operands, strides, batch, inner)
    ):
        batch, inner = 1, count
    if batch == 1:
        strides = [0] * len(strides)
    *x_stride, uncond_stride, log_variance_stride, noise_stride, out_stride, second_stride = strides
    x_stride = tuple(x_stride)

    shared = dict(
        table=table.data,
        step=step_tensor,
        row=row,
        row_stride=row_stride,
        rows=table.rows,
        guidance_ptr=guidance_tensor,
        guidance=guidance,
        guidance_stride=guidance_stride,
        inner=inner,
        GUIDE=guide,
    )
    precision = tl.float64 if compute == torch.float64 else tl.float32
    x0 = NO_X0 if not table.has_x0 else CLIP if clip else THRESHOLD if threshold else PLAIN
    low, high = clip or (0.0, 0.0)
    block = _step_block(source, operands, len(inputs))
    tiles = -(-inner // block)
    factors = limits = None
    with _on_device(out):
        if rescale:
            factors = _rescale_factors(
                inputs[1], x_stride[1], uncond, uncond_stride, batch, guidance_rescale, shared, compute, precision
            )
        if x0 == THRESHOLD:
            limits = _threshold_limits(
                inputs, x_stride, uncond, uncond_stride, batch, factors, threshold, shared, compute, precision
            )
        step_kernel[(batch * tiles,)](
            x=tuple(inputs), x_stride=x_stride, uncond=uncond, uncond_stride=uncond_stride, log_variance=log_variance,
            log_variance_stride=log_variance_stride, noise=noise, noise_stride=noise_stride, out=first,
            out_stride=out_stride, second=second, second_stride=second_stride, low=low, high=high, factors=factors,
            limits=limits, seeds=seeds, seed_low=seed_low, seed_high=seed_high, seed_stride=seed_stride,
            draw=_int32(stream), offset=_int32(offset), tiles=tiles, INPUTS=len(inputs), NOISE=source, X0=x0,
            RESCALE=rescale, LOG_STD=log_variance is not None, SECOND=table.has_second,
            STEP_TENSOR=step_tensor is not None, SEED_TENSOR=seeds is not None, COMPUTE=precision, BLOCK=block,
            **shared, **EXACT,
        )  # fmt: skip
    give_back((out, second_out), (first, second))


def _on_device(out: Tensor):
    """Triton launches on the current device; make it the tensors' own."""
    if out.is_cuda and out.device.index != torch.cuda.current_device():
        return torch.cuda.device(out.device)
    return contextlib.nullcontext()


def _step_block(source: int, operands, inputs: int) -> int:
    """Elements per program of 128 threads: 8 per thread, so that a thread has two 16-byte accesses in flight.

    4 where the widths differ: then a thread loads the same elements of every tensor, and no value has to change
    threads through shared memory. And 4 where many inputs keep enough loads in flight, and registers busy. Philox
    blocks come four elements at a time, in four sub-tiles.
    """
    if source == PHILOX:
        return 2 * BLOCK
    widths = {t.element_size() for t in operands if t is not None}
    return BLOCK if len(widths) == 1 and inputs <= 4 else BLOCK // 2


def _rescale_factors(cond, cond_stride, uncond, uncond_stride, batch, rescale, shared, compute, precision) -> Tensor:
    inner = shared["inner"]
    parts = parts_of(inner)
    partials = torch.empty(batch, parts, 4, dtype=torch.float64, device=cond.device)
    factors = torch.empty(batch, dtype=compute, device=cond.device)
    guidance_kernels.moments_kernel[(batch * parts,)](
        cond, cond_stride, uncond, uncond_stride, shared["guidance_ptr"], shared["guidance"],
        shared["guidance_stride"], partials, inner, parts, _tiles_per_part(inner, parts), GUIDE=shared["GUIDE"],
        COMPUTE=precision, BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
    guidance_kernels.rescale_kernel[(batch,)](
        partials, factors, rescale, inner, parts, COMPUTE=precision, PARTS=PARTS, **EXACT
    )
    return factors


def _threshold_limits(inputs, x_stride, uncond, uncond_stride, batch, factors, threshold, shared, compute, precision):
    inner, device = shared["inner"], inputs[0].device
    passes = compute.itemsize
    words = threshold_kernels.histogram_words(passes)
    parts = parts_of(inner)
    below, weight = quantile_rank(threshold[0], inner, compute)
    above = min(below + 1, inner - 1)
    counters = torch.zeros(batch, words, dtype=torch.int32 if inner < 2**31 else torch.int64, device=device)
    state = torch.empty(batch, passes, 4, dtype=torch.int64, device=device)
    limits = torch.empty(batch, dtype=compute, device=device)
    sizes = dict(COMPUTE=precision, PASSES=passes, WORDS=words, BINS=threshold_kernels.BINS)
    for number in range(passes):
        threshold_kernels.histogram_kernel[(batch * parts,)](
            x_t=inputs[0], x_t_stride=x_stride[0], output=inputs[1], output_stride=x_stride[1], uncond=uncond,
            uncond_stride=uncond_stride, factors=factors, counters=counters, state=state, below=below, above=above,
            number=number, parts=parts, tiles_per_part=_tiles_per_part(inner, parts), INPUTS=len(inputs),
            STEP_TENSOR=shared["step"] is not None, RESCALE=factors is not None, BLOCK=BLOCK, **shared, **sizes,
            **EXACT,
        )  # fmt: skip
    threshold_kernels.limit_kernel[(batch,)](
        counters, state, limits, weight, threshold[1], below, above, **sizes, **EXACT
    )
    return limits


def _tiles_per_part(inner: int, parts: int) -> int:
    return -(-inner // (parts * BLOCK))


def _int32(value: int) -> int:
    """The low 32 bits, signed: one type for every value, so that no seed or stream compiles a new kernel."""
    return (value + 2**31) % 2**32 - 2**31
