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

// High and low halves of the 32 x 32 bit products x * m.
inline void multiply_wide(vu x, uint32_t m, vu& high, vu& low) {
#if defined(__AVX512F__)
  const __m512i v = (__m512i)x, mm = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(v, mm), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), mm);
  high = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i v = (__m256i)x, mm = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32(v, mm), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), mm);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#elif defined(__SSE2__)
  const __m128i v = (__m128i)x, mm = _mm_set1_epi64x(m), upper = _mm_set1_epi64x((int64_t)0xFFFFFFFF00000000ull);
  const __m128i even = _mm_mul_epu32(v, mm), odd = _mm_mul_epu32(_mm_srli_epi64(v, 32), mm);
  high = (vu)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_and_si128(odd, upper));
  low = (vu)_mm_or_si128(_mm_andnot_si128(upper, even), _mm_slli_epi64(odd, 32));
#else
  for (int i = 0; i < kLanes; i++) {
    const uint64_t p = (uint64_t)x[i] * m;
    high[i] = (uint32_t)(p >> 32);
    low[i] = (uint32_t)p;
  }
#endif
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
