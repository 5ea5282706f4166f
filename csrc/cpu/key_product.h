// Products with keys and values that stay where they lie, each row at an address of its own. The keys are the left side
// of theirs: scores come out turned, [keys][rows], so that no key is transposed; what is transposed is the few queries,
// once. A score is summed over the numbers in one order, whatever the tile, so that it depends on its row and key
// alone.
#pragma once
#include "cpu/small_gemm.h"
#include "cpu/words.h"

namespace genfast {
namespace {

// A score of kLanes rows and one key is a vector; groups of kLanes rows follow each other with all of their keys:
// scores[group][key][kLanes].
template <bool PAIRS, int KEYS, int GROUPS>
inline void key_tile(const float* const* keys, const float* q, int64_t q_row, int64_t first, int64_t last,
                     float* scores, int64_t group_size) {
  vf sum[KEYS][GROUPS];
  for (int m = 0; m < KEYS; m++)
    for (int g = 0; g < GROUPS; g++) sum[m][g] = vf{};
  const float* key[KEYS];
  for (int m = 0; m < KEYS; m++) key[m] = keys[m];
  for (int64_t k = first; k < last; k++) {
    vf right[GROUPS];
    for (int g = 0; g < GROUPS; g++) right[g] = load<vf>(q + k * q_row + g * kLanes);
    for (int m = 0; m < KEYS; m++) {
      const vf left = splat_word(key[m] + k);
      for (int g = 0; g < GROUPS; g++) sum[m][g] = add_product<PAIRS>(left, right[g], sum[m][g]);
    }
  }
  for (int m = 0; m < KEYS; m++)
    for (int g = 0; g < GROUPS; g++) {
      float* to = scores + g * group_size + m * kLanes;
      store(to, first ? load<vf>(to) + sum[m][g] : sum[m][g]);
    }
}

// Keys of a register tile; that many addresses must be there for the last of them.
#if defined(__AVX512F__)
constexpr int kTileKeys = 8;
#else
constexpr int kTileKeys = 4;
#endif

// q is [depth][q_row], rows being its columns.
template <bool PAIRS>
inline void key_product(const float* const* keys, int64_t n, const float* q, int64_t q_row, int64_t groups,
                        int64_t depth, float* scores, int64_t group_size) {
  for (int64_t j = 0; j < n; j += kTileKeys)
    for (int64_t first = 0; first < depth; first += kLongestSum) {
      const int64_t last = std::min(depth, first + kLongestSum);
      float* to = scores + j * kLanes;
      int64_t g = 0;
      for (; g + 2 <= groups; g += 2)
        key_tile<PAIRS, kTileKeys, 2>(keys + j, q + g * kLanes, q_row, first, last, to + g * group_size, group_size);
      if (g < groups)
        key_tile<PAIRS, kTileKeys, 1>(keys + j, q + g * kLanes, q_row, first, last, to + g * group_size, group_size);
    }
}

// For so few rows that vectors of them would be empty: a key meets its ROWS rows as it is read, scores[key][ROWS].
// q is [ROWS][depth]; `depth` is a multiple of kLanes, and addresses of keys are there for whole vectors of scores.
template <bool PAIRS, int ROWS>
inline void key_dots(const float* const* keys, int64_t n, const float* q, int64_t depth, float* scores) {
  constexpr int kKeysOfVector = kLanes / ROWS;
  for (int64_t j = 0; j < n; j += kKeysOfVector) {
    vf sum[kLanes];
    for (int i = 0; i < kLanes; i++) sum[i] = vf{};
    for (int64_t k = 0; k < depth; k += kLanes) {
      vf right[ROWS];
      for (int r = 0; r < ROWS; r++) right[r] = load<vf>(q + r * depth + k);
      for (int m = 0; m < kKeysOfVector; m++) {
        const vf left = load<vf>(keys[j + m] + k);
        for (int r = 0; r < ROWS; r++) sum[m * ROWS + r] = add_product<PAIRS>(left, right[r], sum[m * ROWS + r]);
      }
    }
    store(scores + j * ROWS, across(sum, [](vf a, vf b) { return a + b; }));
  }
}

// Numbers of two keys as pairs of bfloat16.
inline vf paired(vf even, vf odd) {
#if defined(__AVX512BF16__)
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  return (vf)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  vi pairs;
  for (int j = 0; j < kLanes; j++) pairs[j] = (int32_t)(float_to_bf16(even[j]) | (uint32_t)float_to_bf16(odd[j]) << 16);
  return as_float(pairs);
#endif
}

template <bool PAIRS, int ROWS, int VECTORS>
inline void value_tile(const float* p, int64_t p_row, const float* const* values, int64_t at, int64_t depth, float* sum,
                       int64_t sum_row) {
  vf s[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) s[m][n] = load<vf>(sum + m * sum_row + at + n * kLanes);
  for (int64_t k = 0; k < depth; k++) {
    const float* value = values[k] + at;
    vf right[VECTORS];
    for (int n = 0; n < VECTORS; n++) right[n] = load<vf>(value + n * kLanes);
    for (int m = 0; m < ROWS; m++) {
      const vf left = splat_word(p + k * p_row + m);
      for (int n = 0; n < VECTORS; n++) s[m][n] = add_product<PAIRS>(left, right[n], s[m][n]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) store(sum + m * sum_row + at + n * kLanes, s[m][n]);
}

template <bool PAIRS, int ROWS>
inline void value_panel(const float* p, int64_t p_row, const float* const* values, int64_t depth, int64_t width,
                        float* sum) {
  int64_t at = 0;
  for (; at + kTileVectors * kLanes <= width; at += kTileVectors * kLanes)
    value_tile<PAIRS, ROWS, kTileVectors>(p, p_row, values, at, depth, sum, width);
  for (; at < width; at += kLanes) value_tile<PAIRS, ROWS, 1>(p, p_row, values, at, depth, sum, width);
}

// sum[rows][width] += P V with P turned, [depth][p_row]; `width`, of a value, is a multiple of kLanes.
template <bool PAIRS>
inline void value_product(const float* p, int64_t p_row, int64_t rows, const float* const* values, int64_t depth,
                          int64_t width, float* sum) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    value_panel<PAIRS, kTileRows>(p + m, p_row, values, depth, width, sum + m * width);
  for (; m + 2 <= rows; m += 2) value_panel<PAIRS, 2>(p + m, p_row, values, depth, width, sum + m * width);
  if (m < rows) value_panel<PAIRS, 1>(p + m, p_row, values, depth, width, sum + m * width);
}

}  // namespace
}  // namespace genfast
