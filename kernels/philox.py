"""Counter-based normals inside a Triton kernel: :mod:`genfast.random` to the bit.

Every multiplication that feeds an addition is written as an explicit fused multiply-add, or must not become one: the
kernels that call this are compiled with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from genfast import random as spec

_M0, _M1 = tl.constexpr(spec.M0), tl.constexpr(spec.M1)
_W0, _W1 = tl.constexpr(spec.W0), tl.constexpr(spec.W1)
_LOG_P = tl.constexpr(spec.LOG_P)
_LN2_HI, _LN2_LO = tl.constexpr(spec.LN2_HI), tl.constexpr(spec.LN2_LO)
_SQRT_HALF_BITS = tl.constexpr(spec.SQRT_HALF_BITS)
_SIN_HI, _SIN_LO = tl.constexpr(spec.SIN_HI), tl.constexpr(spec.SIN_LO)
_SIN_P, _COS_P = tl.constexpr(spec.SIN_P), tl.constexpr(spec.COS_P)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)


@triton.jit
def philox_words(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10 on uint32 scalars or blocks of one shape: the four words."""
    m0 = tl.full((), _M0, tl.uint32)
    m1 = tl.full((), _M1, tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, m0), c0 * m0
        hi1, lo1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = k0 + tl.full((), _W0, tl.uint32)
        k1 = k1 + tl.full((), _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def normal_pair(w0, w1):
    """Box-Muller of two uint32 words: (radius * cos, radius * sin) in float32."""
    u = (w0 | 1).to(tl.float32) * _TWO_TO_MINUS_32
    bits = u.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, _LOG_P[7], _LOG_P[6])
    for i in tl.static_range(6):
        p = tl.fma(p, f, _LOG_P[5 - i])
    tail = tl.fma(exponent, _LN2_LO, (f * f) * tl.fma(p, f, -0.5))
    radius = tl.sqrt_rn(-2.0 * tl.fma(exponent, _LN2_HI, f + tail))

    # Modulo 2^32 the turn count wraps where the specification's 64-bit one reaches a fourth quadrant: the same angle.
    turns = (w1 & 0xFFFFFFC0) | 32
    quadrant = (turns + 0x20000000) >> 30
    y = (turns - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_TO_MINUS_32
    y2 = y * y
    p = tl.fma(y2, _SIN_P[2], _SIN_P[1])
    p = tl.fma(p, y2, _SIN_P[0])
    p = tl.fma(p, y2, _SIN_LO)
    sin = tl.fma(y, _SIN_HI, y * p)
    p = tl.fma(y2, _COS_P[3], _COS_P[2])
    p = tl.fma(p, y2, _COS_P[1])
    p = tl.fma(p, y2, _COS_P[0])
    cos = tl.fma(p, y2, 1.0)
    odd = (quadrant & 1) != 0
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    c = tl.where(((quadrant + 1) & 2) != 0, -c, c)
    s = tl.where((quadrant & 2) != 0, -s, s)
    return radius * c, radius * s


@triton.jit
def block_words(k0, k1, block, lane, sample, stream):
    """The four words of Philox blocks ``block + lane``.

    ``block`` is an int64 scalar, a multiple of the number of lanes, so that adding a lane never carries into the high
    word; ``lane`` is an int32 block of lanes; the other arguments are uint32 scalars.
    """
    c0 = (block & 0xFFFFFFFF).to(tl.uint32) + lane.to(tl.uint32)
    zero = tl.zeros_like(c0)
    return philox_words(k0, k1, c0, (block >> 32).to(tl.uint32) + zero, sample + zero, stream + zero)
