// Conversions between storage types and the type of the arithmetic, for runs of elements. Rounding is to nearest even.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace genfast {
namespace {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

inline int64_t size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t h) { return from_bits((uint32_t)h << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = to_bits(f);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)(f != f ? 0x7FC0u : rounded);
}

#if defined(__F16C__)
inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float f) { return (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float half_to_float(uint16_t h) {
  // Scaling by 2^112 moves the exponent bias and makes subnormal halves right too; infinities and NaN come separately.
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, body = (uint32_t)(h & 0x7FFFu) << 13;
  const float finite = from_bits(body) * from_bits(0x77800000u);
  const uint32_t special = body | 0x7F800000u;
  return from_bits(((h & 0x7C00u) == 0x7C00u ? special : to_bits(finite)) | sign);
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000u, body = u & 0x7FFFFFFFu;
  // Normal halves: rebias, then round the 13 dropped bits to even. Subnormal halves: an addition lets the float unit
  // round at the right place. From 65520 on, infinity.
  const uint32_t normal = (body - 0x38000000u + 0xFFFu + ((body >> 13) & 1u)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(body) + 0.5f) - to_bits(0.5f);
  const uint32_t value = body > 0x7F800000u    ? 0x7E00u
                         : body >= 0x477FF000u ? 0x7C00u
                         : body < 0x38800000u  ? subnormal
                                               : normal;
  return (uint16_t)(sign | value);
}
#endif

// n elements of `dtype` at p, as C.
template <class C>
void load_run(const void* p, int dtype, int64_t n, C* __restrict to) {
  switch (dtype) {
    case kFloat32: {
      const float* s = static_cast<const float*>(p);
      for (int64_t i = 0; i < n; i++) to[i] = (C)s[i];
      return;
    }
    case kBFloat16: {
      const uint16_t* s = static_cast<const uint16_t*>(p);
      for (int64_t i = 0; i < n; i++) to[i] = (C)bf16_to_float(s[i]);
      return;
    }
    case kFloat16: {
      const uint16_t* s = static_cast<const uint16_t*>(p);
      int64_t i = 0;
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8) {
        float f[8];
        _mm256_storeu_ps(f, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
        for (int k = 0; k < 8; k++) to[i + k] = (C)f[k];
      }
#endif
      for (; i < n; i++) to[i] = (C)half_to_float(s[i]);
      return;
    }
    default: {
      const double* s = static_cast<const double*>(p);
      for (int64_t i = 0; i < n; i++) to[i] = (C)s[i];
    }
  }
}

template <class C>
void store_run(const C* __restrict from, int64_t n, void* p, int dtype) {
  switch (dtype) {
    case kFloat32: {
      float* t = static_cast<float*>(p);
      for (int64_t i = 0; i < n; i++) t[i] = (float)from[i];
      return;
    }
    case kBFloat16: {
      uint16_t* t = static_cast<uint16_t*>(p);
      for (int64_t i = 0; i < n; i++) t[i] = float_to_bf16((float)from[i]);
      return;
    }
    case kFloat16: {
      uint16_t* t = static_cast<uint16_t*>(p);
      int64_t i = 0;
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8) {
        float f[8];
        for (int k = 0; k < 8; k++) f[k] = (float)from[i + k];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(t + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(f), _MM_FROUND_TO_NEAREST_INT));
      }
#endif
      for (; i < n; i++) t[i] = float_to_half((float)from[i]);
      return;
    }
    default: {
      double* t = static_cast<double*>(p);
      for (int64_t i = 0; i < n; i++) t[i] = (double)from[i];
    }
  }
}

}  // namespace
}  // namespace genfast
