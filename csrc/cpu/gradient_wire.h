// Values on the wire: bfloat16, float16, and 8-bit codes with a float32 scale for each block of 256 values. The
// formulas are in genfast/reference/gradient_bucket.py; every operation is rounded as there, so that all backends send
// the same bits.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/dtype.h"
#include "cpu/gradient_bucket.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

constexpr float kSmallest = 0x1p-100f;

inline float largest_of(int wire) { return wire == kInt8 ? 127.0f : wire == kE4M3 ? 448.0f : 57344.0f; }

// Bits of the absolute value, which are ordered as the values are; NaN comes last.
inline vi magnitude(vf x) { return as_int(x) & 0x7FFFFFFF; }

// The magnitude from which on a value is not finite on the wire: 65520 rounds to infinity in float16, 2^128 - 2^119 in
// bfloat16.
inline uint32_t limit_of(int wire) {
  return wire == kFloat16 ? 0x477FF000u : wire == kBFloat16 ? 0x7F7F8000u : 0x7F800000u;
}

inline uint32_t highest(vi x) {
  uint32_t most = 0;
  for (int k = 0; k < kLanes; k++) most = (uint32_t)x[k] > most ? (uint32_t)x[k] : most;
  return most;
}

inline vf round_even(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: for |x| < 2^22
  return (x + magic) - magic;
}

// An 8-bit float with M bits of fraction and exponent bias B, of |x| within its range. Normal numbers: rebias, round
// the dropped bits to even. Subnormal ones: an addition lets the float unit round at the right place.
template <int M, int B>
inline vi to_float8(vf x) {
  constexpr int kDropped = 23 - M;
  constexpr uint32_t kBias = (uint32_t)(127 - B) << M;
  const vi body = magnitude(x), sign = (vi)((vu)as_int(x) >> 24) & 0x80;
  const vi normal = ((body + ((1 << (kDropped - 1)) - 1) + ((body >> kDropped) & 1)) >> kDropped) - (int32_t)kBias;
  const vf shift = as_float(vi{} + ((127 + 23 - (B - 1 + M)) << 23));  // its last bit is the smallest subnormal number
  const vi subnormal = as_int(as_float(body) + shift) - as_int(shift);
  const vi small = body < ((127 - B + 1) << 23);
  return sign | (small & subnormal) | (~small & normal);
}

template <int M, int B>
inline vf from_float8(vi code) {
  const vi body = code & 0x7F, sign = (code & 0x80) << 24;
  const vi normal = (body << (23 - M)) + ((127 - B) << 23);
  const vf step = as_float(vi{} + ((127 - (B - 1 + M)) << 23));
  const vf subnormal = to_float(body) * step;
  const vi small = body < (1 << M);
  return as_float(sign | (small & as_int(subnormal)) | (~small & normal));
}

// Bytes and 16-bit words as lanes. Intrinsics: GCC converts short vectors one element at a time.
template <bool SIGNED>
inline vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i x = load<__m128i>(p);
  return (vi)(SIGNED ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#elif defined(__AVX2__)
  const __m128i x = _mm_cvtsi64_si128(load<int64_t>(p));
  return (vi)(SIGNED ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#elif defined(__SSE2__)
  const __m128i x = _mm_cvtsi32_si128(load<int32_t>(p)), words = _mm_unpacklo_epi8(x, x);
  const vu high = (vu)_mm_unpacklo_epi16(words, words) & 0xFF000000u;
  return SIGNED ? (vi)high >> 24 : (vi)(high >> 24);
#else
  vi x;
  for (int k = 0; k < kLanes; k++) x[k] = SIGNED ? (int8_t)p[k] : p[k];
  return x;
#endif
}

inline vu load_halves(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(load<__m256i>(p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(load<__m128i>(p));
#elif defined(__SSE2__)
  return (vu)_mm_unpacklo_epi16(_mm_cvtsi64_si128(load<int64_t>(p)), _mm_setzero_si128());
#else
  vu x;
  for (int k = 0; k < kLanes; k++) x[k] = load<uint16_t>(p + 2 * k);
  return x;
#endif
}

// The low 8 and 16 bits of lanes.
inline void store_bytes(uint8_t* to, vi x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m256i first = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0C080400));
  store(to, _mm_extract_epi32(_mm256_castsi256_si128(first), 0));
  store(to + 4, _mm_extract_epi32(_mm256_extracti128_si256(first, 1), 0));
#elif defined(__SSE2__)
  const __m128i words = _mm_packs_epi32((__m128i)(x & 0xFF), (__m128i)(x & 0xFF));
  store(to, _mm_cvtsi128_si32(_mm_packus_epi16(words, words)));
#else
  for (int k = 0; k < kLanes; k++) to[k] = (uint8_t)x[k];
#endif
}

inline void store_halves(uint8_t* to, vi x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packus_epi32((__m256i)(x & 0xFFFF), (__m256i)(x & 0xFFFF));
  store(to, _mm256_extract_epi64(words, 0));
  store(to + 8, _mm256_extract_epi64(words, 2));
#elif defined(__SSE2__)
  const vi extended = (x << 16) >> 16;  // signed words, which do not saturate
  store(to, _mm_cvtsi128_si64(_mm_packs_epi32((__m128i)extended, (__m128i)extended)));
#else
  for (int k = 0; k < kLanes; k++) store(to + 2 * k, (uint16_t)x[k]);
#endif
}

// Lanes i, i + 1, ... of a block's codes, as values.
template <int WIRE>
inline vf read_lanes(const uint8_t* codes, int i, float scale) {
  if constexpr (WIRE == kFloat32) {
    return load<vf>(codes + 4 * i);
  } else if constexpr (WIRE == kBFloat16) {
    return (vf)(load_halves(codes + 2 * i) << 16);
  } else if constexpr (WIRE == kFloat16) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(load<__m256i>(codes + 2 * i));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load<__m128i>(codes + 2 * i));
#else
    vf x;
    for (int k = 0; k < kLanes; k++) x[k] = half_to_float(load<uint16_t>(codes + 2 * (i + k)));
    return x;
#endif
  } else if constexpr (WIRE == kInt8) {
    return to_float(load_bytes<true>(codes + i)) * splat(scale);
  } else {
    const vi code = load_bytes<false>(codes + i);
    return (WIRE == kE4M3 ? from_float8<3, 7>(code) : from_float8<2, 15>(code)) * splat(scale);
  }
}

// The cast of values without a scale.
template <int WIRE>
inline void cast_lanes(vf x, uint8_t* codes, int i) {
  if constexpr (WIRE == kFloat32) {
    store(codes + 4 * i, x);
  } else if constexpr (WIRE == kBFloat16) {
    const vu u = (vu)x, rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    const vi odd = magnitude(x) > 0x7F800000;
    store_halves(codes + 2 * i, (odd & 0x7FC0) | (~odd & (vi)rounded));
  } else {
#if defined(__AVX512F__)
    store(codes + 2 * i, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    store(codes + 2 * i, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int k = 0; k < kLanes; k++) store(codes + 2 * (i + k), float_to_half(x[k]));
#endif
  }
}

// residual = value - what the wire says, where that is a number.
inline void keep_residual(vf value, vf read, float* residual) {
  const vi odd = magnitude(read) >= 0x7F800000;
  store(residual, (vf)((odd & load<vi>(residual)) | (~odd & (vi)(value - read))));
}

// A block of 256 values x * factor (+ residual) onto the wire. Returns the largest magnitude among them.
template <int WIRE, bool RESIDUAL>
uint32_t write_block(const float* x, float factor, float* residual, uint8_t* codes, float* scale) {
  alignas(64) float value[kGradientBlock];
  vi most{};
  for (int i = 0; i < kGradientBlock; i += kLanes) {
    vf v = load<vf>(x + i) * splat(factor);
    if constexpr (RESIDUAL) v += load<vf>(residual + i);
    most = magnitude(v) > most ? magnitude(v) : most;
    if constexpr (WIRE < kInt8) {
      cast_lanes<WIRE>(v, codes, i);
      if constexpr (RESIDUAL) keep_residual(v, read_lanes<WIRE>(codes, i, 1), residual + i);
    } else {
      store(value + i, v);
    }
  }
  const uint32_t size = highest(most);
  if constexpr (WIRE >= kInt8) {
    const float a = from_bits(size), largest = WIRE == kInt8 ? 127.0f : WIRE == kE4M3 ? 448.0f : 57344.0f;
    if (size >= 0x7F800000u || a < kSmallest) {
      std::memset(codes, 0, kGradientBlock);
      *scale = size >= 0x7F800000u ? from_bits(0x7FC00000u) : 0.0f;
      if (RESIDUAL && *scale == 0) std::memcpy(residual, value, sizeof(value));
      return size;
    }
    const float inverse = largest / a, step = a / largest;
    const vf top = splat(largest);
    for (int i = 0; i < kGradientBlock; i += kLanes) {
      const vf v = load<vf>(value + i);
      vf v_scaled = v * splat(inverse);
      v_scaled = v_scaled > top ? top : v_scaled;
      v_scaled = v_scaled < -top ? -top : v_scaled;
      vi code;
      if constexpr (WIRE == kInt8)
        code = __builtin_convertvector(round_even(v_scaled), vi);
      else if constexpr (WIRE == kE4M3)
        code = to_float8<3, 7>(v_scaled);
      else
        code = to_float8<2, 15>(v_scaled);
      store_bytes(codes + i, code);
      if constexpr (RESIDUAL) keep_residual(v, read_lanes<WIRE>(codes, i, step), residual + i);
    }
    *scale = step;
  }
  return size;
}

typedef double vd __attribute__((vector_size(kLanes * 4)));

// The low and the high half of the lanes.
inline void widen(vf x, vd& low, vd& high) {
#if defined(__AVX512F__)
  low = (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  high = (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
  low = (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  high = (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif defined(__SSE2__)
  low = (vd)_mm_cvtps_pd((__m128)x);
  high = (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#else
  for (int k = 0; k < kLanes / 2; k++) low[k] = x[k], high[k] = x[kLanes / 2 + k];
#endif
}

constexpr int kSums = 16;  // of squares, side by side; added in this order on every instruction set

double sum_of_squares(const float* v, int64_t n) {
  double sum[kSums] = {}, total = 0;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; k++) sum[k] += (double)v[i + k] * v[i + k];
  for (; i < n; i++) total += (double)v[i] * v[i];
  for (int k = 0; k < kSums; k++) total += sum[k];
  return total;
}

struct Found {
  uint32_t most;  // magnitude
  double square;  // the sum
};

// The same block of `rows` chunks that are `stride` bytes apart, added up in order, times factor.
template <int WIRE, int ROWS, bool SQUARES>
Found read_block(const uint8_t* codes, const float* scales, int64_t rows, int64_t stride, float factor, float* to) {
  constexpr int kHalf = kLanes / 2;
  vi most{};
  vd sum[kSums / kHalf] = {};
  const auto scale_of = [&](int64_t r) {
    if constexpr (WIRE < kInt8) return 1.0f;
    return load<float>(reinterpret_cast<const uint8_t*>(scales) + r * stride);
  };
  const float first = scale_of(0), second = ROWS == 2 ? scale_of(1) : 0.0f;
  for (int i = 0; i < kGradientBlock; i += kSums) {
    for (int j = 0; j < kSums; j += kLanes) {
      vf v = read_lanes<WIRE>(codes, i + j, first);
      if constexpr (ROWS == 2) v += read_lanes<WIRE>(codes + stride, i + j, second);
      if constexpr (ROWS == 0)
        for (int64_t r = 1; r < rows; r++) v += read_lanes<WIRE>(codes + r * stride, i + j, scale_of(r));
      v *= splat(factor);
      store(to + i + j, v);
      if constexpr (SQUARES) {
        most = magnitude(v) > most ? magnitude(v) : most;
        vd low, high;
        widen(v, low, high);
        sum[j / kHalf] += low * low;
        sum[j / kHalf + 1] += high * high;
      }
    }
  }
  Found found{highest(most), 0.0};
  for (int k = 0; SQUARES && k < kSums; k++) found.square += sum[k / kHalf][k % kHalf];
  return found;
}

using WriteBlock = uint32_t (*)(const float*, float, float*, uint8_t*, float*);
using ReadBlock = Found (*)(const uint8_t*, const float*, int64_t, int64_t, float, float*);

template <bool RESIDUAL>
WriteBlock writer(int wire) {
  static constexpr WriteBlock of[] = {write_block<0, RESIDUAL>, write_block<1, RESIDUAL>, write_block<2, RESIDUAL>,
                                      write_block<3, RESIDUAL>, write_block<4, RESIDUAL>, write_block<5, RESIDUAL>};
  return of[wire];
}

template <bool SQUARES, int ROWS>
ReadBlock reader(int wire) {
  static constexpr ReadBlock of[] = {read_block<0, ROWS, SQUARES>, read_block<1, ROWS, SQUARES>,
                                     read_block<2, ROWS, SQUARES>, read_block<3, ROWS, SQUARES>,
                                     read_block<4, ROWS, SQUARES>, read_block<5, ROWS, SQUARES>};
  return of[wire];
}

template <bool SQUARES>
ReadBlock reader(int wire, int64_t rows) {
  return rows == 1 ? reader<SQUARES, 1>(wire) : rows == 2 ? reader<SQUARES, 2>(wire) : reader<SQUARES, 0>(wire);
}

// Where the parts of a block are, in a bucket on the wire or in a chunk of it.
struct Place {
  const WireShape& shape;

  int64_t chunk_of(int64_t block) const { return block * kGradientBlock / shape.chunk * shape.chunk_bytes; }
  int64_t within(int64_t block) const { return block % (shape.chunk / kGradientBlock); }
  int64_t codes(int64_t block) const { return chunk_of(block) + within(block) * kGradientBlock * shape.code_size(); }
  int64_t scale(int64_t block) const {
    return chunk_of(block) + shape.code_bytes + within(block) * (int64_t)sizeof(float);
  }
  // After a chunk's last block: the bytes up to the next chunk are zeros.
  void finish(uint8_t* chunk) const {
    const int64_t scales = shape.wire < kInt8 ? 0 : shape.chunk / kGradientBlock * (int64_t)sizeof(float);
    std::fill(chunk + shape.code_bytes + scales, chunk + shape.chunk_bytes, (uint8_t)0);
  }
};

}  // namespace
}  // namespace genfast
