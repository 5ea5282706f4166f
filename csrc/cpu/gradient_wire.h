// Values on the wire: bfloat16, float16, and 8-bit codes with a float32 scale for each block of 256 values. The
// formulas are in genfast/reference/gradient_bucket.py; every operation is rounded as there, so that all backends send
// the same bits.
#pragma once
#include <cstring>

#include "cpu/dtype.h"
#include "cpu/gradient_bucket.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

constexpr float kSmallest = 0x1p-100f;

inline float largest_of(int wire) { return wire == kInt8 ? 127.0f : wire == kE4M3 ? 448.0f : 57344.0f; }

// Bits of the absolute value; all ones in the lanes that are NaN or infinite.
inline vi magnitude(vf x) { return as_int(x) & 0x7FFFFFFF; }
inline vi not_finite(vf x) { return magnitude(x) >= 0x7F800000; }

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

// What a block sends, as codes, and as the floats that the other end will read.
struct Sent {
  float scale;
  bool odd;  // NaN or infinity among the values
};

inline Sent scale_of(const float* v, int wire) {
  vf most{};
  vi bad{};
  for (int i = 0; i < kGradientBlock; i += kLanes) {
    const vf x = load<vf>(v + i), size = as_float(magnitude(x));
    bad |= not_finite(x);
    most = size > most ? size : most;
  }
  float all = 0;
  bool odd = false;
  for (int k = 0; k < kLanes; k++) {
    all = most[k] > all ? most[k] : all;
    odd |= bad[k] != 0;
  }
  if (odd) return {from_bits(0x7FC00000u), true};
  return {all < kSmallest ? 0.0f : all, false};
}

// Scales are kept as found; `largest / a` and `a / largest` are the two quotients of the reference.
template <int WIRE>
inline void quantise(const float* v, float inverse, uint8_t* codes) {
  alignas(64) int32_t whole[kGradientBlock];
  const vf top = splat(largest_of(WIRE));
  for (int i = 0; i < kGradientBlock; i += kLanes) {
    vf x = load<vf>(v + i) * splat(inverse);
    x = x > top ? top : x;
    x = x < -top ? -top : x;
    vi code;
    if constexpr (WIRE == kInt8)
      code = __builtin_convertvector(round_even(x), vi);
    else if constexpr (WIRE == kE4M3)
      code = to_float8<3, 7>(x);
    else
      code = to_float8<2, 15>(x);
    store(whole + i, code);
  }
  for (int i = 0; i < kGradientBlock; i++) codes[i] = (uint8_t)whole[i];
}

template <int WIRE>
inline void dequantise(const uint8_t* codes, float scale, float* v) {
  alignas(64) int32_t whole[kGradientBlock];
  for (int i = 0; i < kGradientBlock; i++) whole[i] = WIRE == kInt8 ? (int8_t)codes[i] : codes[i];
  for (int i = 0; i < kGradientBlock; i += kLanes) {
    const vi code = load<vi>(whole + i);
    vf x;
    if constexpr (WIRE == kInt8)
      x = to_float(code);
    else if constexpr (WIRE == kE4M3)
      x = from_float8<3, 7>(code);
    else
      x = from_float8<2, 15>(code);
    store(v + i, x * splat(scale));
  }
}

// A chunk on the wire, block by block.
struct Chunk {
  const WireShape& shape;
  uint8_t* data;

  uint8_t* codes(int64_t block) const { return data + block * kGradientBlock * shape.code_size(); }
  float* scale(int64_t block) const { return reinterpret_cast<float*>(data + shape.code_bytes) + block; }

  void read(int64_t block, float* v) const {
    switch (shape.wire) {
      case kInt8:
        return dequantise<kInt8>(codes(block), *scale(block), v);
      case kE4M3:
        return dequantise<kE4M3>(codes(block), *scale(block), v);
      case kE5M2:
        return dequantise<kE5M2>(codes(block), *scale(block), v);
      default:
        load_run(codes(block), shape.wire, kGradientBlock, v);
    }
  }

  void write(int64_t block, const float* v) const {
    if (shape.wire < kInt8) return store_run(v, kGradientBlock, codes(block), shape.wire);
    const Sent sent = scale_of(v, shape.wire);
    const float largest = largest_of(shape.wire);
    if (sent.odd || sent.scale == 0) {
      std::memset(codes(block), 0, kGradientBlock);
      *scale(block) = sent.scale;
      return;
    }
    const float inverse = largest / sent.scale;
    if (shape.wire == kInt8)
      quantise<kInt8>(v, inverse, codes(block));
    else if (shape.wire == kE4M3)
      quantise<kE4M3>(v, inverse, codes(block));
    else
      quantise<kE5M2>(v, inverse, codes(block));
    *scale(block) = sent.scale / largest;
  }

  // After the last block: the bytes up to the next chunk are zeros.
  void finish() const {
    const int64_t used =
        shape.code_bytes + (shape.wire < kInt8 ? 0 : shape.chunk / kGradientBlock * (int64_t)sizeof(float));
    std::memset(data + used, 0, shape.chunk_bytes - used);
  }
};

// residual = value - what the wire says, where that is a number.
inline void keep_residual(const Chunk& chunk, int64_t block, const float* v, int64_t n, float* residual) {
  alignas(64) float read[kGradientBlock];
  chunk.read(block, read);
  for (int64_t i = 0; i < n; i++) {
    const bool odd = (to_bits(read[i]) & 0x7FFFFFFFu) >= 0x7F800000u;
    residual[i] = odd ? residual[i] : v[i] - read[i];
  }
}

}  // namespace
}  // namespace genfast
