// Counter-based normals on the device: genfast/random.py to the bit. Every operation is an intrinsic that rounds once
// and that the compiler may not contract.
#pragma once
#include "common/philox_constants.h"

namespace genfast {

__device__ __forceinline__ uint4 philox(uint32_t k0, uint32_t k1, uint4 c) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t hi0 = __umulhi(c.x, kPhiloxM0), lo0 = c.x * kPhiloxM0;
    const uint32_t hi1 = __umulhi(c.z, kPhiloxM1), lo1 = c.z * kPhiloxM1;
    c = make_uint4(hi1 ^ c.y ^ k0, lo1, hi0 ^ c.w ^ k1, lo0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// The constants are host arrays; reading one in a constant expression is what makes it known to the device.
template <int I>
__device__ __forceinline__ float log_p() {
  constexpr float value = kLogP[I];
  return value;
}
template <int I>
__device__ __forceinline__ float sin_p() {
  constexpr float value = kSinP[I];
  return value;
}
template <int I>
__device__ __forceinline__ float cos_p() {
  constexpr float value = kCosP[I];
  return value;
}

// Box-Muller of two words: (radius cos, radius sin).
__device__ __forceinline__ float2 normal_pair(uint32_t w0, uint32_t w1) {
  const float u = __fmul_rn(__uint2float_rn(w0 | 1u), kTwoToMinus32);
  const int32_t bits = __float_as_int(u) - kSqrtHalfBits;
  const float exponent = __int2float_rn(bits >> 23);
  const float f = __fadd_rn(__int_as_float((bits & 0x7FFFFF) + kSqrtHalfBits), -1.0f);
  float p = __fmaf_rn(log_p<7>(), f, log_p<6>());
  p = __fmaf_rn(p, f, log_p<5>());
  p = __fmaf_rn(p, f, log_p<4>());
  p = __fmaf_rn(p, f, log_p<3>());
  p = __fmaf_rn(p, f, log_p<2>());
  p = __fmaf_rn(p, f, log_p<1>());
  p = __fmaf_rn(p, f, log_p<0>());
  const float tail = __fmaf_rn(exponent, kLn2Lo, __fmul_rn(__fmul_rn(f, f), __fmaf_rn(p, f, -0.5f)));
  const float radius = __fsqrt_rn(__fmul_rn(-2.0f, __fmaf_rn(exponent, kLn2Hi, __fadd_rn(f, tail))));

  // Modulo 2^32 the count of turns wraps where the specification's reaches a fourth quadrant: the same angle.
  const uint32_t turns = (w1 & ~63u) | 32u, quadrant = (turns + (1u << 29)) >> 30;
  const float y = __fmul_rn(__int2float_rn((int32_t)(turns - (quadrant << 30))), kTwoToMinus32);
  const float y2 = __fmul_rn(y, y);
  p = __fmaf_rn(sin_p<2>(), y2, sin_p<1>());
  p = __fmaf_rn(p, y2, sin_p<0>());
  p = __fmaf_rn(p, y2, kSinLo);
  const float sine = __fmaf_rn(y, kSinHi, __fmul_rn(y, p));
  p = __fmaf_rn(cos_p<3>(), y2, cos_p<2>());
  p = __fmaf_rn(p, y2, cos_p<1>());
  p = __fmaf_rn(p, y2, cos_p<0>());
  const float cosine = __fmaf_rn(p, y2, 1.0f);
  const bool odd = quadrant & 1u;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  return make_float2(__fmul_rn(radius, ((quadrant + 1u) & 2u) ? -c : c), __fmul_rn(radius, (quadrant & 2u) ? -s : s));
}

}  // namespace genfast
