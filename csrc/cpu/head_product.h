// The product of a tile of weight rows and a block of hidden rows, in float32:
//
//     out[v][r] = sum over k of weight[v][k] hidden[r][k].
//
// Hidden rows lie in the lanes of a vector and are packed for that, a few hundred elements at a time; the weight, which
// is larger by far, is read as it lies, an element (or two bfloat16) broadcast to all lanes at a time. So few rows
// leave lanes idle, but the weight then comes from memory, and that is what takes the time.
//
// `kChain` words are added in order, and their sums in order: the same for every number of rows.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/dtype.h"
#include "cpu/simd.h"
#include "cpu/tile_unit.h"
#include "cpu/transpose.h"

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
constexpr int kChain = 128;      // and that are added up in one register: longer sums are less accurate

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

// Which lines of the weight to ask for during a product: every `of`-th of each row, the `turn`-th first.
struct Ahead {
  const char* rows[kIds];
  int64_t bytes;  // of what kLine words are made of
  int turn, of;
};
constexpr int kLine = 16;  // words of a cache line

// out[v] (+)= the products of kIds weight rows and VECTORS vectors of hidden rows; vectors lie `stride` floats apart.
template <bool PAIRS, int VECTORS>
inline void multiply(const float* const* weight, const Ahead& ahead, const float* packed, int64_t words, float* out,
                     int64_t stride, bool fresh) {
  int turn = ahead.turn;
  for (int64_t begin = 0; begin < words; begin += kChain, fresh = false) {
    vf sum[kIds][VECTORS];
    for (int v = 0; v < kIds; v++)
      for (int g = 0; g < VECTORS; g++) sum[v][g] = vf{};
    const auto one = [&](int64_t k) {
      vf h[VECTORS];
      for (int g = 0; g < VECTORS; g++) h[g] = load<vf>(packed + (k * VECTORS + g) * kLanes);
#pragma GCC unroll 16
      for (int v = 0; v < kIds; v++) {
        uint32_t w;  // not a float: a pair may be what a float calls a signalling NaN
        std::memcpy(&w, weight[v] + k, 4);
        const vf all = (vf)splat(w);
        for (int g = 0; g < VECTORS; g++) sum[v][g] = multiply_add<PAIRS>(sum[v][g], all, h[g]);
      }
    };
    const int64_t end = std::min<int64_t>(words, begin + kChain);
    int64_t k = begin;
    for (; k + kLine <= end; k += kLine) {
      if (turn-- == 0) {
        turn += ahead.of;
        for (int v = 0; v < kIds; v++) __builtin_prefetch(ahead.rows[v] + k / kLine * ahead.bytes, 0, 2);
      }
      for (int64_t j = 0; j < kLine; j++) one(k + j);
    }
    for (; k < end; k++) one(k);
    for (int v = 0; v < kIds; v++)
      for (int g = 0; g < VECTORS; g++) {
        float* to = out + g * stride + v * kLanes;
        store(to, fresh ? sum[v][g] : load<vf>(to) + sum[v][g]);
      }
  }
}

#if defined(__AMX_BF16__)
// 32 rows of weight and up to two vectors of hidden rows on the tile unit. A tile of the weight is 16 rows by 16 words
// as they lie; a tile of the packed rows is 16 words by a vector: just what the instruction multiplies.
constexpr int kTileIds = 2 * kTileSide;

inline void add_tile(const float (&tile)[16][kLanes], float* out, bool fresh) {
  for (int v = 0; v < 16; v++) {
    const vf sum = load<vf>(tile[v]);
    store(out + v * kLanes, fresh ? sum : load<vf>(out + v * kLanes) + sum);
  }
}

// `words` is a multiple of kTileSide. `next` is where the rows to ask for begin, a line of each at turn `turn` of
// `of`.
template <int VECTORS>
inline void multiply_tiles(const char* weight, int64_t row_bytes, const char* next, int turn, int of,
                           const float* packed, int64_t words, float* out, int64_t stride, bool fresh) {
  alignas(64) float tile[16][kLanes];
  written_before_tiles(packed);
  for (int64_t begin = 0; begin < words; begin += kChain, fresh = false) {
    zero_sums();
    for (int64_t k = begin; k < std::min<int64_t>(words, begin + kChain); k += kTileSide) {
      if (turn-- == 0) {
        turn += of;
        for (int v = 0; v < kTileIds; v++) __builtin_prefetch(next + v * row_bytes + k * 4, 0, 2);
      }
      add_tiles<2, VECTORS>(weight + k * 4, row_bytes, packed + k * VECTORS * kLanes, VECTORS * 64, 64);
    }
    _tile_stored(0, tile, 64);
    add_tile(tile, out, fresh);
    _tile_stored(1, tile, 64);
    add_tile(tile, out + 16 * kLanes, fresh);
    if constexpr (VECTORS == 2) {
      _tile_stored(2, tile, 64);
      add_tile(tile, out + stride, fresh);
      _tile_stored(3, tile, 64);
      add_tile(tile, out + stride + 16 * kLanes, fresh);
    }
  }
}
#endif

constexpr int64_t kRowBlock = 128;  // rows for which a tile of weights is read once
constexpr int64_t kChunk =
    8 * kIds;  // rows of weight that stay in the second-level cache while all hidden rows pass by
constexpr int64_t kGroupRows = kVectors * kLanes;

// What a product works in.
struct ProductSpace {
  alignas(64) float packed[kRowBlock / kGroupRows][kPackDepth * kGroupRows];
  alignas(64) float converted[kIds][kPackDepth];
};

// Floats of `out` for each vector of rows: kIds at a time are written, the last ones perhaps for nothing.
constexpr int64_t kOutStride = (kHeadTile + kIds) * kLanes;

// out: [vectors of rows][ids][lanes], kOutStride apart. `last` is the last row of the weight, counted from `weight`.
template <bool PAIRS>
void product(const char* const* rows, int64_t count, const char* weight, int64_t row_bytes, int64_t ids, int64_t last,
             int dtype, int64_t depth, ProductSpace& space, float* out) {
  const int64_t entry = size_of(dtype), at_once = PAIRS ? 2 * kPackDepth : kPackDepth;
  const int groups = (int)((count + kGroupRows - 1) / kGroupRows);
  for (int64_t k = 0; k < depth; k += at_once) {
    const int64_t n = std::min(at_once, depth - k), words = PAIRS ? (n + 1) / 2 : n;
    const bool direct = as_stored(dtype, n);
    const auto vectors_of = [&](int g) {
      return (int)std::min<int64_t>(kVectors, (count - g * kGroupRows + kLanes - 1) / kLanes);
    };
    for (int g = 0; g < groups; g++)
      for (int j = 0; j < vectors_of(g); j++) {
        const char* from[kLanes];
        const int64_t begin = g * kGroupRows + j * kLanes, found = std::min<int64_t>(kLanes, count - begin);
        for (int64_t i = 0; i < found; i++) from[i] = rows[begin + i] + k * entry;
        pack(from, (int)found, dtype, n, vectors_of(g) * kLanes, space.packed[g] + j * kLanes);
      }
    // What comes a chunk later: of this depth, then of the next one, then of the next tile.
    const bool deeper = k + at_once < depth;
    const char* after = weight + (deeper ? k + at_once : 0) * entry - (deeper ? ids : 0) * row_bytes;
    for (int64_t chunk = 0; chunk < ids; chunk += kChunk)
      for (int g = 0; g < groups; g++) {
        int64_t first = chunk;
        const int64_t end = std::min(ids, chunk + kChunk);
#if defined(__AMX_BF16__)
        if constexpr (PAIRS)
          for (; direct && words % kTileSide == 0 && first + kTileIds <= end; first += kTileIds) {
            const char* next = first + kChunk < ids ? weight + k * entry : after;
            const auto run = vectors_of(g) == 1 ? multiply_tiles<1> : multiply_tiles<2>;
            run(weight + first * row_bytes + k * entry, row_bytes, next + (first + kChunk) * row_bytes, g, groups,
                space.packed[g], words, out + g * kVectors * kOutStride + first * kLanes, kOutStride, k == 0);
          }
#endif
        for (; first < end; first += kIds) {
          const float* from[kIds];
          Ahead ahead{{}, kLine * 4, g, groups};
          if (!PAIRS) ahead.bytes = kLine * entry;
          for (int v = 0; v < kIds; v++) {
            const char* p = weight + std::min(first + v, ids - 1) * row_bytes + k * entry;
            if (direct) {
              from[v] = reinterpret_cast<const float*>(p);
            } else {
              to_words(p, dtype, n, space.converted[v]);
              from[v] = space.converted[v];
            }
            const int64_t next = first + v + kChunk;
            ahead.rows[v] = next < ids ? weight + next * row_bytes + k * entry
                                       : after + std::min(next, deeper ? 2 * ids - 1 : last) * row_bytes;
          }
          const auto run = vectors_of(g) == 1 ? multiply<PAIRS, 1> : multiply<PAIRS, kVectors>;
          run(from, ahead, space.packed[g], words, out + g * kVectors * kOutStride + first * kLanes, kOutStride,
              k == 0);
        }
      }
  }
}

}  // namespace
}  // namespace genfast
