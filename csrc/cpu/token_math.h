// The arithmetic that the draws of this family share: weights, exponentials, whole-number sums. The specification is
// genfast/reference/token_sampling.py.
#pragma once
#include <cmath>
#include <limits>

#include "common/exp2_constants.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

// b where a is NaN.
inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
inline vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t all = 0;
  for (int k = 0; k < kLanes; k++) all |= mask[k];
  return all != 0;
#endif
}

// Whether a NaN was seen.
struct NaNs {
#if defined(__AVX512F__)
  __mmask16 seen = 0;
  void look(vf a, vf b) { seen |= _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q); }
  bool any() const { return seen != 0; }
#else
  vi seen{};
  void look(vf a, vf b) { seen |= (a != a) | (b != b); }
  bool any() const { return genfast::any(seen); }
#endif
};

// 2^r on [-1/2, 1/2].
inline vf exp2_fraction(vf r) {
  vf p = splat(kExp2P[6]);
  for (int k = 5; k >= 0; k--) p = fma_exact(p, r, splat(kExp2P[k]));
  return p;
}
// 2^(d c) as p 2^n, d <= 0; t is the exponent, not below kLowest.
inline vf exp2_parts(vf d, vf c, vf& t, vi& n) {
  t = larger(d * c, splat(kExp2Lowest));
  const vf big = t + splat(kRoundToInteger);
  n = as_int(big) - as_int(splat(kRoundToInteger));
  return exp2_fraction(t - (big - splat(kRoundToInteger)));
}
inline vf times_power(vf p, vi n) { return as_float(as_int(p) + (n << 23)); }

// 2^K 2^(d c) before truncation, which is exact in the conversion that follows.
inline vf weight(vf d, vf c, vi bits) {
  vf t;
  vi n;
  const vf p = exp2_parts(d, c, t, n);
  return times_power(p, n + bits);
}

// Sums of truncated floats below 2^61, exact.
struct WholeSum {
#if defined(__AVX512DQ__)
  __m512i low = _mm512_setzero_si512(), high = low;
  void add(vf x) {
    low = _mm512_add_epi64(low, _mm512_cvttps_epi64(_mm512_castps512_ps256((__m512)x)));
    high = _mm512_add_epi64(high, _mm512_cvttps_epi64(_mm512_extractf32x8_ps((__m512)x, 1)));
  }
  uint64_t total() const { return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)); }
#else
  // No conversion to 64 bits here: x = 2^31 high + low, both of which are exact.
  vq low{}, high{};
  static vq halves(vi v) { return ((vq)v & 0xFFFFFFFFull) + ((vq)v >> 32); }
  void add(vf x) {
    const vi top = __builtin_convertvector(x * splat(0x1p-31f), vi);
    high += halves(top);
    low += halves(__builtin_convertvector(x - to_float(top) * splat(0x1p31f), vi));
  }
  uint64_t total() const {
    uint64_t h = 0, l = 0;
    for (int k = 0; k < kLanes / 2; k++) h += high[k], l += low[k];
    return (h << 31) + l;
  }
#endif
};

inline double total(vf v) {
  double sum = 0;
  for (int k = 0; k < kLanes; k++) sum += (double)v[k];
  return sum;
}
inline float largest(vf v) {
  float m = v[0];
  for (int k = 1; k < kLanes; k++) m = v[k] > m ? v[k] : m;
  return m;
}

inline float largest_lane(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return largest(v);
#endif
}

inline double exponential(float x, float m, float c) {
  const double t = ((double)x - (double)m) * (double)c;
  return std::exp2(t);
}

inline uint64_t high_product(uint64_t u, uint64_t total) { return (uint64_t)((unsigned __int128)u * total >> 64); }

}  // namespace
}  // namespace genfast
