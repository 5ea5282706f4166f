// The exponential, and what is made of it.
#pragma once
#include "cpu/simd.h"
#include "cpu/token_math.h"

namespace genfast {
namespace {

struct ExpP {
  float c[7];
  constexpr ExpP() : c() {
    double power = 1;
    for (int i = 0; i < 7; i++, power *= 1.4426950408889634) c[i] = (float)(kExp2P[i] * power);
  }
};
constexpr ExpP kExpP;  // e^r on [-ln 2 / 2, ln 2 / 2]

// e^x, 0 below e^-60; NaN stays NaN. With x = n ln 2 + r, what ln 2 in a float lacks is less than a rounding of the
// result down to e^-20, and has no weight beside 1 after that.
inline vf exponential(vf x) {
  constexpr float kLowest = -60.0f, kLn2 = 0.693147180559945f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(kLowest), _CMP_NLE_UQ);
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * splat(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = larger(splat(kLowest), x);
  const vi kept = ~(x <= splat(kLowest));
  const vf big = fma_exact(x, splat(kLog2E), splat(kRoundToInteger)), n = big - splat(kRoundToInteger);
#endif
  const vf r = fma_exact(n, splat(-kLn2), x);
  vf p = splat(kExpP.c[6]);
  for (int i = 5; i >= 0; i--) p = fma_exact(p, r, splat(kExpP.c[i]));
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  return as_float(as_int(times_power(p, as_int(big) - as_int(splat(kRoundToInteger)))) & kept);
#endif
}

// log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3, of which nine terms are left of the series.
inline vf log_one_plus(vf e) {
  const vf s = e / (e + splat(2.0f)), s2 = s * s;
  vf p = splat(1.0f / 17);
  for (int k = 15; k >= 1; k -= 2) p = p * s2 + splat(1.0f / (float)k);
  return (s + s) * p;
}

}  // namespace
}  // namespace genfast
