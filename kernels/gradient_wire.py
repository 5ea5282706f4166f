"""Values on the wire, on a tile [rows, 256] of whole blocks: the formulas of ``genfast.reference.gradient_bucket``.

``WIRE`` is ``Wire.code``: fp32, bf16, fp16, then, with a scale for each row, int8, fp8_e4m3 and fp8_e5m2.

Eight-bit floats are made by integer arithmetic: what a cast does with ties, subnormal numbers and large values differs
between targets, and float32's neighbours of a bit decide whether ranks on different backends agree.
"""

import triton
import triton.language as tl

from genfast.kernels.rounding import rounded

LANES = tl.constexpr(256)


@triton.jit
def magnitude(x):
    """Bits of the absolute value: in the order of the values, NaN and infinity from 0x7F800000 on."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _to_float8(x, M: tl.constexpr, B: tl.constexpr):
    """The code with M bits of fraction and exponent bias B of |x| within its range."""
    DROPPED: tl.constexpr = 23 - M
    body = magnitude(x)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    # Rebias, and round the dropped bits to even.
    normal = ((body + ((1 << (DROPPED - 1)) - 1) + ((body >> DROPPED) & 1)) >> DROPPED) - ((127 - B) << M)
    # Subnormal: the last bit of the float that is added is the smallest step.
    SHIFT: tl.constexpr = (127 + 23 - (B - 1 + M)) << 23
    shift = tl.full(x.shape, SHIFT, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (body.to(tl.float32, bitcast=True) + shift).to(tl.int32, bitcast=True) - SHIFT
    return sign | tl.where(body < ((127 - B + 1) << 23), subnormal, normal)


@triton.jit
def _from_float8(code, M: tl.constexpr, B: tl.constexpr):
    body = code & 0x7F
    normal = (body << (23 - M)) + ((127 - B) << 23)
    STEP: tl.constexpr = 2.0 ** (1 - B - M)
    subnormal = (body.to(tl.float32) * STEP).to(tl.int32, bitcast=True)
    bits = tl.where(body < (1 << M), subnormal, normal) | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode(codes, scales, at, block, mask, WIRE: tl.constexpr):
    """float32 of the values at ``codes + at``; ``scales + block`` are those of the rows."""
    code = tl.load(codes + at, mask=mask, other=0)
    if WIRE < 3:
        value = code.to(tl.float32)
    else:
        value = _value(code.to(tl.int32), WIRE) * tl.load(scales + block, mask=mask, other=0.0)
    return value


@triton.jit
def _value(code, WIRE: tl.constexpr):
    if WIRE == 3:
        value = code.to(tl.float32)
    elif WIRE == 4:
        value = _from_float8(code, 3, 7)
    else:
        value = _from_float8(code, 2, 15)
    return value


@triton.jit
def encode(v, codes, scales, at, block, last, in_chunk, mask, WIRE: tl.constexpr):
    """Writes v at ``codes + at`` and, on a quantised wire, its scales at ``scales + block`` (block ``in_chunk`` of the
    chunk, ``last`` where no other follows). Gives back the values that the other end will read."""
    if WIRE < 3:
        code = rounded(v, codes.dtype.element_ty)
        tl.store(codes + at, code, mask=mask)
        read = code.to(tl.float32)
    else:
        LARGEST: tl.constexpr = 127.0 if WIRE == 3 else (448.0 if WIRE == 4 else 57344.0)
        most = tl.max(magnitude(v), axis=1, keep_dims=True)
        odd = most >= 0x7F800000
        empty = odd | (most < (27 << 23))  # 2^-100
        most = tl.where(empty, 1.0, most.to(tl.float32, bitcast=True))
        top = tl.full(most.shape, LARGEST, tl.float32)
        scale = tl.where(odd, float("nan"), tl.where(empty, 0.0, tl.div_rn(most, top)))
        x = tl.where(empty, 0.0, v * tl.div_rn(top, most))
        x = tl.where(x > LARGEST, LARGEST, x)
        x = tl.where(x < -LARGEST, -LARGEST, x)
        if WIRE == 3:
            code = ((x + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23 rounds to whole numbers
        elif WIRE == 4:
            code = _to_float8(x, 3, 7)
        else:
            code = _to_float8(x, 2, 15)
        tl.store(codes + at, code.to(tl.int8), mask=mask)
        tl.store(scales + block, scale, mask=mask)
        for k in tl.static_range(1, 4):  # zeros up to the next chunk, which begins at a multiple of 16 bytes
            tl.store(scales + block + k, tl.zeros(scale.shape, tl.float32), mask=mask & last & (in_chunk % 4 + k < 4))
        read = _value(code, WIRE) * scale
    return read
