// C (+)= A B of small float32 matrices that lie in the caches, register tile by register tile.
#pragma once
#include "cpu/simd.h"

namespace genfast {
namespace {

// Rows and vectors of a register tile: 16 accumulators hide the latency of a fused multiply-add on two ports.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// A[m][k] is at a + m * row + k * column.
struct Left {
  const float* a;
  int64_t row, column;
};

template <int ROWS, int VECTORS, bool ADD>
inline void register_tile(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  vf sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) sum[m][n] = ADD ? load<vf>(c + m * c_row + n * kLanes) : vf{};
  for (int64_t k = 0; k < depth; k++) {
    vf right[VECTORS];
    for (int n = 0; n < VECTORS; n++) right[n] = load<vf>(b + k * b_row + n * kLanes);
    for (int m = 0; m < ROWS; m++) {
      const vf scalar = splat(left.a[m * left.row + k * left.column]);
      for (int n = 0; n < VECTORS; n++) sum[m][n] = multiply_add(scalar, right[n], sum[m][n]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) store(c + m * c_row + n * kLanes, sum[m][n]);
}

template <int ROWS, bool ADD>
inline void row_panel(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns,
                      int64_t depth) {
  int64_t n = 0;
  for (; n + kTileVectors * kLanes <= columns; n += kTileVectors * kLanes)
    register_tile<ROWS, kTileVectors, ADD>(left, b + n, b_row, c + n, c_row, depth);
  for (; n < columns; n += kLanes) register_tile<ROWS, 1, ADD>(left, b + n, b_row, c + n, c_row, depth);
}

// C[rows][columns] = A[rows][depth] B[depth][columns], added to C if ADD; `columns` is a multiple of kLanes.
template <bool ADD>
void multiply(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    row_panel<kTileRows, ADD>(Left{left.a + m * left.row, left.row, left.column}, b, b_row, c + m * c_row, c_row,
                              columns, depth);
  for (; m < rows; m++)
    row_panel<1, ADD>(Left{left.a + m * left.row, left.row, left.column}, b, b_row, c + m * c_row, c_row, columns,
                      depth);
}

}  // namespace
}  // namespace genfast
