// The product of a tile of weight rows and a block of hidden rows, in float32:
//
//     out[v][r] = sum over k of weight[v][k] hidden[r][k].
//
// Hidden rows lie in the lanes of a vector and are packed for that, a few hundred elements at a time; the weight, which
// is larger by far, is read as it lies, an element (or two bfloat16) broadcast to all lanes at a time. So few rows
// leave lanes idle, but the weight then comes from memory, and that is what takes the time.
//
// Elements are added in order within `kDepth` of them, and these sums in order: the same for every number of rows.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/dtype.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

constexpr int64_t kHeadTile = 512;  // of the specification
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;  // an instruction multiplies and adds pairs of bfloat16
#else
constexpr bool kHasPairs = false;
#endif
#if defined(__AVX512F__)
constexpr int kVectors = 2, kIds = 12;  // vectors of rows and rows of weight that are multiplied in registers
#else
constexpr int kVectors = 2, kIds = 6;
#endif
constexpr int kPackDepth = 256;  // 32-bit words of a row that are packed at a time

// Words as floats, or as pairs of bfloat16.
template <bool PAIRS>
inline vf multiply_add(vf sum, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
#if defined(__FMA__)
  return fma_exact(a, b, sum);
#else
  return sum + a * b;
#endif
}

template <int S>
inline void transpose_step(vf* v) {
  vi low, high;
  for (int j = 0; j < kLanes; j++) {
    low[j] = j & S ? kLanes + j - S : j;
    high[j] = j & S ? kLanes + j : j + S;
  }
  for (int i = 0; i < kLanes; i++) {
    if (i & S) continue;
    const vf a = v[i], b = v[i + S];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + S] = __builtin_shuffle(a, b, high);
  }
}

// v[i][j] becomes v[j][i].
inline void transpose(vf* v) {
  if constexpr (kLanes >= 16) transpose_step<8>(v);
  if constexpr (kLanes >= 8) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// Where the words of a row of `dtype` are what multiply_add takes.
inline bool as_stored(int dtype, int64_t n) {
  return dtype == kFloat32 || (kHasPairs && dtype == kBFloat16 && n % 2 == 0);
}

// n elements as words; the last half of a pair is 0 where there is none.
inline int64_t to_words(const char* p, int dtype, int64_t n, float* to) {
  if (kHasPairs && dtype == kBFloat16) {
    if (n % 2) to[n / 2] = 0.0f;
    std::memcpy(to, p, n * 2);
    return (n + 1) / 2;
  }
  load_run(p, dtype, n, to);
  return n;
}

// Packs `words` words of up to kLanes rows of hidden: to[k * step] is the vector of the k-th words.
inline void pack(const char* const* rows, int count, int dtype, int64_t elements, int64_t step, float* to) {
  alignas(64) float buffer[kLanes][kPackDepth];
  const int64_t words = kHasPairs && dtype == kBFloat16 ? (elements + 1) / 2 : elements;
  for (int r = 0; r < kLanes; r++) {
    const int64_t filled = r < count ? to_words(rows[r], dtype, elements, buffer[r]) : 0;
    const int64_t end = (words + kLanes - 1) / kLanes * kLanes;
    std::fill(buffer[r] + filled, buffer[r] + end, 0.0f);
  }
  for (int64_t k = 0; k < words; k += kLanes) {
    vf v[kLanes];
    for (int r = 0; r < kLanes; r++) v[r] = load<vf>(buffer[r] + k);
    transpose(v);
    const int n = (int)std::min<int64_t>(kLanes, words - k);
    for (int j = 0; j < n; j++) store(to + (k + j) * step, v[j]);
  }
}

// out[v] (+)= the products of IDS weight rows and VECTORS vectors of hidden rows; vectors lie `stride` floats apart.
template <bool PAIRS, int VECTORS, int IDS>
inline void multiply(const float* const* weight, const float* const* next, const float* packed, int64_t words,
                     float* out, int64_t stride, bool fresh) {
  vf sum[IDS][VECTORS];
  for (int v = 0; v < IDS; v++)
    for (int g = 0; g < VECTORS; g++) sum[v][g] = vf{};
  constexpr int kStep = 16;  // words of a cache line
  const auto one = [&](int64_t k) {
    vf h[VECTORS];
    for (int g = 0; g < VECTORS; g++) h[g] = load<vf>(packed + (k * VECTORS + g) * kLanes);
#pragma GCC unroll 16
    for (int v = 0; v < IDS; v++) {
      uint32_t w;  // not a float: a pair may be what a float calls a signalling NaN
      std::memcpy(&w, weight[v] + k, 4);
      const vf all = (vf)splat(w);
      for (int g = 0; g < VECTORS; g++) sum[v][g] = multiply_add<PAIRS>(sum[v][g], all, h[g]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= words; k += kStep) {
    if (next)
      for (int v = 0; v < IDS; v++) __builtin_prefetch(next[v] + k, 0, 2);
    for (int64_t j = 0; j < kStep; j++) one(k + j);
  }
  for (; k < words; k++) one(k);
  for (int v = 0; v < IDS; v++)
    for (int g = 0; g < VECTORS; g++) {
      float* to = out + g * stride + v * kLanes;
      store(to, fresh ? sum[v][g] : load<vf>(to) + sum[v][g]);
    }
}

// What a product works in.
struct ProductSpace {
  alignas(64) float packed[kPackDepth * kVectors * kLanes];
  alignas(64) float converted[kIds][kPackDepth];
};

// Floats of `out` for each vector of rows: IDS at a time are written, the last ones perhaps for nothing.
constexpr int64_t kOutStride = (kHeadTile + kIds) * kLanes;

template <bool PAIRS, int VECTORS>
void multiply_group(const char* weight, int64_t row_bytes, int64_t last, int dtype, int64_t elements, int64_t ids,
                    bool prefetch, ProductSpace& space, float* out, bool fresh) {
  const bool direct = as_stored(dtype, elements);
  const int64_t words = PAIRS ? (elements + 1) / 2 : elements;
  for (int64_t first = 0; first < ids; first += kIds) {
    const float *from[kIds], *next[kIds];
    for (int v = 0; v < kIds; v++) {
      const char* p = weight + std::min(first + v, ids - 1) * row_bytes;
      if (direct) {
        from[v] = reinterpret_cast<const float*>(p);
      } else {
        to_words(p, dtype, elements, space.converted[v]);
        from[v] = space.converted[v];
      }
      next[v] = reinterpret_cast<const float*>(weight + std::min(first + kIds + v, last) * row_bytes);
    }
    multiply<PAIRS, VECTORS, kIds>(from, prefetch && direct ? next : nullptr, space.packed, words, out + first * kLanes,
                                   kOutStride, fresh);
  }
}

// out: [vectors of rows][ids][lanes], kOutStride apart. `last` is the last weight row there is, from `weight` on.
template <bool PAIRS>
void product(const char* const* rows, int64_t count, const char* weight, int64_t row_bytes, int64_t ids, int64_t last,
             int dtype, int64_t depth, ProductSpace& space, float* out) {
  const int64_t entry = size_of(dtype), at_once = PAIRS ? 2 * kPackDepth : kPackDepth;
  for (int64_t k = 0; k < depth; k += at_once) {
    const int64_t n = std::min(at_once, depth - k);
    for (int64_t r = 0; r < count; r += kVectors * kLanes) {
      const int vectors = (int)std::min<int64_t>(kVectors, (count - r + kLanes - 1) / kLanes);
      for (int g = 0; g < vectors; g++) {
        const char* from[kLanes];
        const int64_t begin = r + g * kLanes, found = std::min<int64_t>(kLanes, count - begin);
        for (int64_t j = 0; j < found; j++) from[j] = rows[begin + j] + k * entry;
        pack(from, (int)found, dtype, n, vectors * kLanes, space.packed + g * kLanes);
      }
      float* to = out + r / kLanes * kOutStride;
      const auto run = vectors == 1 ? multiply_group<PAIRS, 1> : multiply_group<PAIRS, 2>;
      run(weight + k * entry, row_bytes, last, dtype, n, ids, r == 0, space, to, k == 0);
    }
  }
}

}  // namespace
}  // namespace genfast
