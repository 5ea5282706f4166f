// A native-width vector of 32-bit lanes: GCC vector types for the arithmetic, intrinsics where the operator does not
// say which instruction is meant. Every module is compiled from the same sources with its own instruction-set flags,
// and everything here has internal linkage, so no function of one set can be called from another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace genfast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint64_t vq __attribute__((vector_size(kLanes * 4)));

inline vf splat(float x) { return x - vf{}; }
inline vu splat(uint32_t x) { return x - vu{}; }

inline vf as_float(vi x) { return (vf)x; }
inline vi as_int(vf x) { return (vi)x; }

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double fma1(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// a * b + c rounded once. Without the instruction it goes through double, where the product of two floats is exact.
inline vf fma_exact(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__SSE2__)
  const auto half = [](__m128 x, __m128 y, __m128 z) {
    return _mm_cvtpd_ps(_mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z)));
  };
  const __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c;
  return (vf)_mm_movelh_ps(half(x, y, z), half(_mm_movehl_ps(x, x), _mm_movehl_ps(y, y), _mm_movehl_ps(z, z)));
#else
  vf r;
  for (int i = 0; i < kLanes; i++) r[i] = (float)((double)a[i] * (double)b[i] + (double)c[i]);
  return r;
#endif
}

inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  vf r;
  for (int i = 0; i < kLanes; i++) r[i] = std::sqrt(x[i]);
  return r;
#endif
}

// Low 32 bits of each 64-bit lane times m, all 64 bits of the product. The high 32 bits of x do not matter.
inline vq multiply_low(vq x, uint32_t m) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m));
#else
  return (x & 0xFFFFFFFFull) * (uint64_t)m;
#endif
}

// The high 32 bits of each 64-bit lane in its low half; the high half is left undefined. A shuffle rather than a shift,
// because shifts share their only 512-bit port with the multiplier.
inline vq high_half(vq x) {
#if defined(__AVX512F__)
  return (vq)_mm512_shuffle_epi32((__m512i)x, (_MM_PERM_ENUM)0xF5);
#elif defined(__AVX2__)
  return (vq)_mm256_shuffle_epi32((__m256i)x, 0xF5);
#elif defined(__SSE2__)
  return (vq)_mm_shuffle_epi32((__m128i)x, 0xF5);
#else
  return x >> 32;
#endif
}

// The low 32 bits of the lanes of a, then those of b.
inline vu pack_low(vq a, vq b) {
  vu even;
  for (int i = 0; i < kLanes; i++) even[i] = (uint32_t)(2 * i);
  return __builtin_shuffle((vu)a, (vu)b, even);
}

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// Round to nearest, like the hardware instruction that only AVX-512 has: both halves and the product are exact.
inline vf to_float(vu x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, vf);
#else
  return to_float((vi)(x >> 16)) * splat(65536.0f) + to_float((vi)(x & splat(0xFFFFu)));
#endif
}

}  // namespace
}  // namespace genfast
