// Values on the wire, for a warp that holds a block of 256 values, 8 neighbours in each lane. The formulas are in
// genfast/reference/gradient_bucket.py; every operation is rounded as there, so that all backends send the same bits.
#pragma once
#include "cuda/element.cuh"
#include "cuda/gradient_bucket.h"

namespace genfast {

constexpr int kBlock = 256, kPerLane = 8;
constexpr unsigned kWarp = 0xFFFFFFFFu;

__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }
// From here on a magnitude is that of NaN or infinity.
constexpr unsigned kOdd = 0x7F800000u;

template <int CODE>
constexpr float kLargest = CODE == kWireInt8   ? 127.0f
                           : CODE == kWireE4M3 ? 448.0f
                                               : 57344.0f;

// The code with M bits of fraction and exponent bias B of |x| within its range. Normal numbers: rebias, round the
// dropped bits to even. Subnormal ones: an addition lets the float unit round at the right place.
template <int M, int B>
__device__ __forceinline__ uint8_t to_float8(float x) {
  constexpr int kDropped = 23 - M;
  const unsigned body = magnitude(x), sign = __float_as_uint(x) >> 24 & 0x80u;
  if (body >= (unsigned)(127 - B + 1) << 23)
    return (uint8_t)(sign | (((body + ((1u << (kDropped - 1)) - 1) + (body >> kDropped & 1)) >> kDropped) -
                             ((unsigned)(127 - B) << M)));
  constexpr unsigned kShift = (unsigned)(127 + 23 - (B - 1 + M)) << 23;  // its last bit is the smallest step
  return (uint8_t)(sign | (__float_as_uint(__fadd_rn(__uint_as_float(body), __uint_as_float(kShift))) - kShift));
}

template <int M, int B>
__device__ __forceinline__ float from_float8(uint8_t code) {
  const unsigned body = code & 0x7Fu, sign = (code & 0x80u) << 24;
  if (body >= 1u << M) return __uint_as_float(sign | ((body << (23 - M)) + ((unsigned)(127 - B) << 23)));
  const float step = __uint_as_float((unsigned)(127 - (B - 1 + M)) << 23);
  return __uint_as_float(sign | __float_as_uint(__fmul_rn(__uint2float_rn(body), step)));
}

template <int CODE>
__device__ __forceinline__ float value_of(uint8_t code) {
  if constexpr (CODE == kWireInt8)
    return __int2float_rn((int8_t)code);
  else if constexpr (CODE == kWireE4M3)
    return from_float8<3, 7>(code);
  else
    return from_float8<2, 15>(code);
}

template <int CODE>
__device__ __forceinline__ uint8_t code_of(float x) {
  if constexpr (CODE == kWireInt8)
    return (uint8_t)(int8_t)__fadd_rn(__fadd_rn(x, 12582912.0f), -12582912.0f);  // 1.5 * 2^23: to a whole number
  else if constexpr (CODE == kWireE4M3)
    return to_float8<3, 7>(x);
  else
    return to_float8<2, 15>(x);
}

// The lane's values of a block of a chunk.
template <int CODE>
__device__ __forceinline__ void read_block(float (&v)[kPerLane], const Wire& wire, const char* chunk, int64_t block) {
  const int lane = threadIdx.x % 32;
  if constexpr (CODE < kWireInt8) {
    load_as<CODE>(v, chunk, block * kBlock + lane * kPerLane, kPerLane, true);
  } else {
    const float scale = reinterpret_cast<const float*>(chunk + wire.code_bytes)[block];
    const auto codes = *reinterpret_cast<const Pack<uint8_t, kPerLane>*>(chunk + block * kBlock + lane * kPerLane);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) v[i] = mul(value_of<CODE>(codes.v[i]), scale);
  }
}

// Writes the lane's values v, and gives what the other end will read. All lanes of the warp call this.
template <int CODE>
__device__ __forceinline__ void write_block(const float (&v)[kPerLane], const Wire& wire, char* chunk, int64_t block,
                                            float (&read)[kPerLane]) {
  const int lane = threadIdx.x % 32;
  if constexpr (CODE < kWireInt8) {
    using T = typename Storage<CODE>::type;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) read[i] = widen<float>(narrow<T>(v[i]));
    store_as<CODE>(v, chunk, block * kBlock + lane * kPerLane, kPerLane, true);
  } else {
    constexpr float kTop = kLargest<CODE>;
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) most = magnitude(v[i]) > most ? magnitude(v[i]) : most;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const unsigned other = __shfl_xor_sync(kWarp, most, step);
      most = other > most ? other : most;
    }
    const bool odd = most >= kOdd, empty = odd || most < 27u << 23;  // 2^-100
    const float size = __uint_as_float(empty ? 127u << 23 : most), inverse = divide(kTop, size);
    const float scale = odd ? __uint_as_float(0x7FC00000u) : empty ? 0.0f : divide(size, kTop);
    Pack<uint8_t, kPerLane> codes;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      float x = empty ? 0.0f : mul(v[i], inverse);
      x = x > kTop ? kTop : x;
      x = x < -kTop ? -kTop : x;
      codes.v[i] = code_of<CODE>(x);
      read[i] = mul(value_of<CODE>(codes.v[i]), scale);
    }
    *reinterpret_cast<Pack<uint8_t, kPerLane>*>(chunk + block * kBlock + lane * kPerLane) = codes;
    // After the last scale, zeros up to the next chunk, which begins at a multiple of 16 bytes.
    const int64_t scales = wire.chunk / kBlock, all = block + 1 == scales ? (scales + 3) / 4 * 4 : block + 1;
    if (block + lane < all) reinterpret_cast<float*>(chunk + wire.code_bytes)[block + lane] = lane == 0 ? scale : 0.0f;
  }
}

}  // namespace genfast
