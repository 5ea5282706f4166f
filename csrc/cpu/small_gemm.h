// C (+)= A B of small matrices that lie in the caches, register tile by register tile. Numbers are 32-bit words: floats
// or, where an instruction multiplies and adds them (AVX512-BF16), pairs of bfloat16 that are neighbours along the sum.
#pragma once
#include "cpu/simd.h"

namespace genfast {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kWordPairs = true;
#else
constexpr bool kWordPairs = false;
#endif

// Rows and vectors of a register tile: 16 accumulators hide the latency of a fused multiply-add on two ports. A tile of
// fewer vectors has as many more rows.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// Products are added up in runs of so many. Without a fused multiply-add they are rounded too; short runs make up for
// it.
#if defined(__FMA__)
constexpr int64_t kLongestSum = 32;
#else
constexpr int64_t kLongestSum = 16;
#endif

// a b + c, in one rounding where there is an instruction for it.
inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__FMA__)
  return fma_exact(a, b, c);
#else
  return a * b + c;
#endif
}

template <bool PAIRS>
inline vf add_product(vf a, vf b, vf sum) {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return multiply_add(a, b, sum);
}

// A[m][k] is at a + m * row + k * column.
struct Left {
  const float* a;
  int64_t row, column;

  Left below(int64_t m) const { return {a + m * row, row, column}; }
};

// Vector n of B[k] is at b + k * row + n * vector.
struct Right {
  const float* b;
  int64_t row, vector;

  Right beside(int64_t n) const { return {b + n * vector, row, vector}; }
};

// A word in every lane. Not through a float: a pair may be what a float calls a signalling NaN.
inline vf splat_word(const float* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return (vf)splat(word);
}

// A row's result depends on that row alone, whatever the tile.
template <bool PAIRS, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void register_tile(Left left, Right right, float* c, int64_t c_row, int64_t depth,
                                                         bool add) {
  for (int64_t first = 0; first == 0 || first < depth; first += kLongestSum, add = true) {
    vf sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < VECTORS; n++) sum[m][n] = vf{};
    const int64_t last = first + kLongestSum < depth ? first + kLongestSum : depth;
    for (int64_t k = first; k < last; k++) {
      vf b[VECTORS];
      for (int n = 0; n < VECTORS; n++) b[n] = load<vf>(right.b + k * right.row + n * right.vector);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; m++) {
        const vf a = splat_word(left.a + m * left.row + k * left.column);
        for (int n = 0; n < VECTORS; n++) sum[m][n] = add_product<PAIRS>(a, b[n], sum[m][n]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < VECTORS; n++) {
        float* to = c + m * c_row + n * kLanes;
        store(to, add ? load<vf>(to) + sum[m][n] : sum[m][n]);
      }
  }
}

// Not inlined: among other code, a compiler keeps fewer of the sums in registers.
template <bool PAIRS, int ROWS, int VECTORS>
__attribute__((noinline)) void column_panel(Left left, Right right, float* c, int64_t c_row, int64_t rows,
                                            int64_t depth, bool add) {
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS)
    register_tile<PAIRS, ROWS, VECTORS>(left.below(m), right, c + m * c_row, c_row, depth, add);
  if constexpr (ROWS > 1)
    if (m < rows)
      column_panel<PAIRS, ROWS / 2, VECTORS>(left.below(m), right, c + m * c_row, c_row, rows - m, depth, add);
}

template <bool PAIRS, int VECTORS>
inline void column_panels(Left left, Right right, float* c, int64_t c_row, int64_t rows, int64_t vectors, int64_t depth,
                          bool add) {
  constexpr int kPanelRows = kTileRows * kTileVectors / VECTORS;
  int64_t n = 0;
  for (; n + VECTORS <= vectors; n += VECTORS)
    column_panel<PAIRS, kPanelRows, VECTORS>(left, right.beside(n), c + n * kLanes, c_row, rows, depth, add);
  if constexpr (VECTORS > 1)
    if (n < vectors)
      column_panels<PAIRS, VECTORS / 2>(left, right.beside(n), c + n * kLanes, c_row, rows, vectors - n, depth, add);
}

// C[rows][columns] = A[rows][depth] B[depth][columns], added to C if `add`; `columns` is a multiple of kLanes.
template <bool PAIRS>
void multiply(Left left, Right right, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
  column_panels<PAIRS, kTileVectors>(left, right, c, c_row, rows, columns / kLanes, depth, add);
}

}  // namespace
}  // namespace genfast
