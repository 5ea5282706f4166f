// What the forward and the backward pass of `attention` share: tiles of rows and keys, what a tile of rows sees, tiles
// of keys packed for the matrix products, probabilities.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/attention.h"
#include "cpu/dtype.h"
#include "cpu/exponential.h"
#include "cpu/small_gemm.h"
#include "cpu/token_math.h"
#include "cpu/workspace.h"

namespace genfast {
namespace {

// Rows and keys of a tile. 32 rows are a block of most block-wise models, so that a tile seldom sees two of them; with
// 64 keys the scores, a packed tile of keys and one of values stay in the first-level cache at 64 numbers a head.
constexpr int64_t kRows = 32, kKeys = 64;
static_assert(kKeys % kLanes == 0 && kRows % kLanes == 0, "tiles are whole vectors");

inline char* row_of(const Heads& t, int64_t b, int64_t h, int64_t row) {
  return t.data + (b * t.batch_stride + h * t.head_stride + row * t.row_stride) * size_of(t.dtype);
}

// Rows [first, first + n) as floats, each padded with zeros to `width`; rows up to `rows` are zeros.
inline void load_rows(const Heads& t, int64_t b, int64_t h, int64_t first, int64_t n, int64_t rows, int64_t dim,
                      int64_t width, float* to) {
  for (int64_t i = 0; i < n; i++) {
    load_run(row_of(t, b, h, first + i), t.dtype, dim, to + i * width);
    std::fill(to + i * width + dim, to + (i + 1) * width, 0.0f);
  }
  std::fill(to + n * width, to + rows * width, 0.0f);
}

// Keys [from, to) of the tile that begins at `first`, as [dim][kKeys]; the others are zeros.
inline void load_columns(const Heads& t, int64_t b, int64_t h, int64_t first, int64_t from, int64_t to, int64_t dim,
                         float* out) {
  alignas(64) float rows[16][256];
  for (int64_t at = first; at < first + kKeys; at += 16) {
    for (int64_t i = 0; i < 16; i++) {
      if (at + i >= from && at + i < to)
        load_run(row_of(t, b, h, at + i), t.dtype, dim, rows[i]);
      else
        std::fill(rows[i], rows[i] + dim, 0.0f);
    }
    float* column = out + (at - first);
    for (int64_t d = 0; d < dim; d++)
      for (int64_t i = 0; i < 16; i++) column[d * kKeys + i] = rows[i][d];
  }
}

// The same with bfloat16 pairs of neighbours along dim, as [(dim + 1) / 2][kKeys].
inline void load_column_pairs(const Heads& t, int64_t b, int64_t h, int64_t first, int64_t from, int64_t to,
                              int64_t dim, float* out) {
  alignas(64) uint32_t rows[16][128];
  const int64_t depth = (dim + 1) / 2;
  for (int64_t at = first; at < first + kKeys; at += 16) {
    std::memset(rows, 0, sizeof(rows));
    for (int64_t i = 0; i < 16; i++)
      if (at + i >= from && at + i < to) std::memcpy(rows[i], row_of(t, b, h, at + i), dim * 2);
    uint32_t* column = reinterpret_cast<uint32_t*>(out) + (at - first);
    for (int64_t d = 0; d < depth; d++)
      for (int64_t i = 0; i < 16; i++) column[d * kKeys + i] = rows[i][d];
  }
}

// Keys [from, to) of a tile with pairs of neighbouring keys, as [kKeys / 2][width]; the others are zeros.
inline void load_row_pairs(const Heads& t, int64_t b, int64_t h, int64_t first, int64_t from, int64_t to, int64_t dim,
                           int64_t width, float* out) {
  uint16_t* pairs = reinterpret_cast<uint16_t*>(out);
  std::fill(pairs, pairs + kKeys * width, 0);
  for (int64_t key = from; key < to; key++) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(row_of(t, b, h, key));
    uint16_t* to_row = pairs + (key - first) / 2 * 2 * width + (key - first) % 2;
    for (int64_t d = 0; d < dim; d++) to_row[2 * d] = row[d];
  }
}

// Rows of bfloat16 as pairs of neighbours, [n][depth].
inline void load_pairs(const Heads& t, int64_t b, int64_t h, int64_t first, int64_t n, int64_t dim, int64_t depth,
                       float* out) {
  for (int64_t i = 0; i < n; i++) {
    out[(i + 1) * depth - 1] = 0;
    std::memcpy(out + i * depth, row_of(t, b, h, first + i), dim * 2);
  }
}

template <bool PAIRS>
struct ProductOf {
  using type = Numbers;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<true> {
  using type = Pairs;
};
#endif
template <bool PAIRS>
using Product = typename ProductOf<PAIRS>::type;

// n floats, a multiple of 32, to bfloat16.
inline void round_to_pairs(const float* x, int64_t n, float* out) {
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += 32)
    _mm512_storeu_si512(out + i / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i)));
#else
  store_run(x, n, out, kBFloat16);
#endif
}

// The intervals of a tile of rows.
struct Sight {
  // Over the rows, of both intervals: where keys are seen by some row, and where by all.
  int64_t some_begin[2], some_end[2], all_begin[2], all_end[2];

  Sight(const AttentionArgs& a, int64_t b, int64_t first, int64_t n) {
    for (int k = 0; k < 2; k++) {
      some_begin[k] = a.ranges ? a.kv_len : 0, some_end[k] = a.ranges || k ? 0 : a.kv_len;
      all_begin[k] = 0, all_end[k] = a.ranges ? a.kv_len : some_end[k];
    }
    if (!a.ranges) return;
    const int32_t* r = a.ranges + b * a.ranges_stride + first * 4;
    for (int64_t i = 0; i < n; i++, r += 4)
      for (int k = 0; k < 2; k++) {
        const int64_t begin = r[2 * k], end = r[2 * k + 1];
        if (begin < end) {
          some_begin[k] = std::min(some_begin[k], begin), some_end[k] = std::max(some_end[k], end);
          all_begin[k] = std::max(all_begin[k], begin), all_end[k] = std::min(all_end[k], end);
        } else {
          all_end[k] = 0;
        }
      }
  }
  bool sees(int64_t begin, int64_t end) const {
    return (begin < some_end[0] && end > some_begin[0]) || (begin < some_end[1] && end > some_begin[1]);
  }
  bool sees_all(int64_t begin, int64_t end) const {
    return (begin >= all_begin[0] && end <= all_end[0]) || (begin >= all_begin[1] && end <= all_end[1]);
  }
  int64_t begin() const { return std::min(some_begin[0], some_begin[1]); }
  int64_t end() const { return std::max(some_end[0], some_end[1]); }
};

// Which of the keys [first, first + kLanes) a row sees, as a mask.
inline vi seen_lanes(const int32_t* range, int64_t first) {
  vi at;
  for (int k = 0; k < kLanes; k++) at[k] = k;
  at += (vi{} + (int32_t)first);
  return ((at >= (vi{} + range[0])) & (at < (vi{} + range[1]))) |
         ((at >= (vi{} + range[2])) & (at < (vi{} + range[3])));
}

}  // namespace
}  // namespace genfast
