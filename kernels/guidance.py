"""The per-sample factor of guidance rescaling (Lin et al. 2023, section 3.4), in two deterministic launches.

guided * factor, factor = rescale * std(cond) / std(guided) + 1 - rescale. First, ``parts_of(inner)`` programs per
sample sum (x - K) and (x - K)^2 in float64, K being the sample's first value: the shift keeps the variance of a
constant sample exactly 0. Then one program per sample adds the parts in a fixed order.
"""

import triton
import triton.language as tl

from genfast.kernels.parts import guidance_scale, guided, load_tile


@triton.jit(do_not_specialize=["parts", "tiles_per_part"])
def moments_kernel(
    cond,
    cond_stride,
    uncond,
    uncond_stride,
    guidance_ptr,
    guidance: tl.float64,
    guidance_stride,
    partials,  # float64 [batch, parts, 4]
    inner,
    parts,
    tiles_per_part,
    GUIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    part = program % parts
    cond += sample * cond_stride
    uncond += sample * uncond_stride
    scale = guidance_scale(guidance_ptr, guidance, guidance_stride, sample, GUIDE, COMPUTE)
    first_cond = tl.load(cond).to(COMPUTE)
    first_guided = guided(first_cond, tl.load(uncond).to(COMPUTE), scale).to(tl.float64)
    first_cond = first_cond.to(tl.float64)

    lanes = tl.arange(0, BLOCK)
    cond_sum = tl.zeros([BLOCK], tl.float64)
    cond_square = tl.zeros([BLOCK], tl.float64)
    guided_sum = tl.zeros([BLOCK], tl.float64)
    guided_square = tl.zeros([BLOCK], tl.float64)
    for tile in range(tiles_per_part):
        start = (part.to(tl.int64) * tiles_per_part + tile) * BLOCK
        mask = lanes < inner - start
        c = load_tile(cond + start, lanes, mask, COMPUTE)
        g = guided(c, load_tile(uncond + start, lanes, mask, COMPUTE), scale)
        c = tl.where(mask, c.to(tl.float64) - first_cond, 0.0)
        g = tl.where(mask, g.to(tl.float64) - first_guided, 0.0)
        cond_sum += c
        cond_square = tl.fma(c, c, cond_square)
        guided_sum += g
        guided_square = tl.fma(g, g, guided_square)
    partials += program.to(tl.int64) * 4
    tl.store(partials, tl.sum(cond_sum))
    tl.store(partials + 1, tl.sum(cond_square))
    tl.store(partials + 2, tl.sum(guided_sum))
    tl.store(partials + 3, tl.sum(guided_square))


@triton.jit
def _standard_deviation(sums, squares, inner, COMPUTE: tl.constexpr):
    count = inner.to(tl.float64)
    mean = tl.sum(sums) / count
    variance = tl.sum(squares) / count - mean * mean
    variance = tl.where(variance < 0, 0.0, variance).to(COMPUTE)
    return tl.sqrt_rn(variance) if COMPUTE.primitive_bitwidth == 32 else tl.sqrt(variance)


@triton.jit(do_not_specialize=["parts", "inner"])
def rescale_kernel(
    partials,
    factors,  # COMPUTE [batch]
    rescale: tl.float64,
    inner,
    parts,
    COMPUTE: tl.constexpr,
    PARTS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    pointer = partials + sample * parts * 4 + part * 4
    mask = part < parts
    std_cond = _standard_deviation(
        tl.load(pointer, mask=mask, other=0.0), tl.load(pointer + 1, mask=mask, other=0.0), inner, COMPUTE
    )
    std_guided = _standard_deviation(
        tl.load(pointer + 2, mask=mask, other=0.0), tl.load(pointer + 3, mask=mask, other=0.0), inner, COMPUTE
    )
    quotient = tl.div_rn(std_cond, std_guided) if COMPUTE.primitive_bitwidth == 32 else std_cond / std_guided
    ratio = tl.where(std_guided > 0, quotient, 1.0)
    weight = tl.full((), rescale, tl.float64)
    tl.store(factors + sample, weight.to(COMPUTE) * ratio + (1.0 - weight).to(COMPUTE))
