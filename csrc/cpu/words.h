// Rows of tensors as 32-bit words, floats or pairs of bfloat16, packed as the sides of the products of small_gemm.h:
// word k of a row of A meets word k of a column of B, so that a pair holds neighbours along the sum.
#pragma once
#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/transpose.h"

namespace genfast {
namespace {

constexpr int64_t words_of(bool pairs, int64_t n) { return pairs ? (n + 1) / 2 : n; }

// The words of n numbers of a row; a last pair of which there is half ends in 0.
template <bool PAIRS>
inline void to_words(const char* p, int dtype, int64_t n, float* to) {
  if constexpr (PAIRS) {
    if (n % 2) to[n / 2] = 0.0f;
    std::memcpy(to, p, n * 2);
  } else {
    load_run(p, dtype, n, to);
  }
}

// Rows as columns: to[k * columns + j] is word k of row j; columns from n on are 0. `columns` is a multiple of kLanes,
// a row has at most 256 numbers.
template <bool PAIRS>
inline void pack_columns(const char* const* rows, int64_t n, int64_t columns, int dtype, int64_t dim, float* to) {
  alignas(64) float buffer[kLanes][256];
  const int64_t words = words_of(PAIRS, dim);
  const bool as_stored = (PAIRS ? dim % 2 == 0 : dtype == kFloat32) && words % kLanes == 0;
  for (int64_t at = 0; at < columns; at += kLanes) {
    const float* row[kLanes];
    for (int j = 0; j < kLanes; j++) {
      row[j] = buffer[j];
      if (at + j >= n)
        std::fill(buffer[j], buffer[j] + (words + kLanes - 1) / kLanes * kLanes, 0.0f);
      else if (as_stored)
        row[j] = reinterpret_cast<const float*>(rows[at + j]);
      else
        to_words<PAIRS>(rows[at + j], dtype, dim, buffer[j]);
    }
    for (int64_t k = 0; k < words; k += kLanes) {
      vf v[kLanes];
      for (int j = 0; j < kLanes; j++) v[j] = load<vf>(row[j] + k);
      transpose(v);
      const int64_t count = std::min<int64_t>(kLanes, words - k);
      for (int64_t j = 0; j < count; j++) store(to + (k + j) * columns + at, v[j]);
    }
  }
}

// Rows as rows of `width` words: word d of row k holds number d of row k, or of rows 2k and 2k + 1. A row that is not
// there, or a number beyond `dim`, is 0.
template <bool PAIRS>
inline void pack_rows(const char* const* rows, int64_t n, int dtype, int64_t dim, int64_t width, float* to) {
  for (int64_t k = 0; k < words_of(PAIRS, n); k++, to += width) {
    if constexpr (PAIRS) {
      const uint16_t* __restrict first = reinterpret_cast<const uint16_t*>(rows[2 * k]);
      uint32_t* __restrict words = reinterpret_cast<uint32_t*>(to);
      if (2 * k + 1 < n) {
        const uint16_t* __restrict second = reinterpret_cast<const uint16_t*>(rows[2 * k + 1]);
        for (int64_t d = 0; d < dim; d++) words[d] = (uint32_t)first[d] | (uint32_t)second[d] << 16;
      } else {
        for (int64_t d = 0; d < dim; d++) words[d] = first[d];
      }
    } else {
      load_run(rows[k], dtype, dim, to);
    }
    std::fill(to + dim, to + width, 0.0f);
  }
}

}  // namespace
}  // namespace genfast
