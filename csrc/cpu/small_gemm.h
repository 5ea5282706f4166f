// C (+)= A B of small matrices that lie in the caches, register tile by register tile: of float32, or (AVX512-BF16) of
// bfloat16 with sums in float32.
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

// Products are added up in runs of so many. Without a fused multiply-add they are rounded too; short runs make up for
// it.
#if defined(__FMA__)
constexpr int64_t kLongestSum = 32;
#else
constexpr int64_t kLongestSum = 16;
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

// Two bfloat16 neighbours along k in each number: A[m][2k], A[m][2k + 1] and B[2k][n], B[2k + 1][n]. `depth` counts
// pairs.
struct Numbers {
  static vf add_product(vf sum, vf a, vf b) { return multiply_add(a, b, sum); }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static vf add_product(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// A float's bits in every lane. An arithmetic splat would quieten what is a pair and not a number.
inline vf broadcast(const float* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return as_float(vi{} + bits);
}

template <class Product, int ROWS, int VECTORS, bool ADD>
inline void register_tile(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  vf sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) sum[m][n] = vf{};
  for (int64_t k = 0; k < depth; k++) {
    vf right[VECTORS];
    for (int n = 0; n < VECTORS; n++) right[n] = load<vf>(b + k * b_row + n * kLanes);
    for (int m = 0; m < ROWS; m++) {
      const vf scalar = broadcast(left.a + m * left.row + k * left.column);
      for (int n = 0; n < VECTORS; n++) sum[m][n] = Product::add_product(sum[m][n], scalar, right[n]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) {
      float* to = c + m * c_row + n * kLanes;
      store(to, ADD ? load<vf>(to) + sum[m][n] : sum[m][n]);
    }
}

template <class Product, int ROWS, bool ADD>
inline void row_panel(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns,
                      int64_t depth) {
  int64_t n = 0;
  for (; n + kTileVectors * kLanes <= columns; n += kTileVectors * kLanes)
    register_tile<Product, ROWS, kTileVectors, ADD>(left, b + n, b_row, c + n, c_row, depth);
  for (; n < columns; n += kLanes) register_tile<Product, ROWS, 1, ADD>(left, b + n, b_row, c + n, c_row, depth);
}

template <bool ADD, class Product>
void multiply_part(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
                   int64_t depth) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    row_panel<Product, kTileRows, ADD>(Left{left.a + m * left.row, left.row, left.column}, b, b_row, c + m * c_row,
                                       c_row, columns, depth);
  for (; m < rows; m++)
    row_panel<Product, 1, ADD>(Left{left.a + m * left.row, left.row, left.column}, b, b_row, c + m * c_row, c_row,
                               columns, depth);
}

// C[rows][columns] = A[rows][depth] B[depth][columns], added to C if ADD; `columns` is a multiple of kLanes.
template <bool ADD, class Product = Numbers>
void multiply(Left left, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth) {
  multiply_part<ADD, Product>(left, b, b_row, c, c_row, rows, columns, depth < kLongestSum ? depth : kLongestSum);
  for (int64_t k = kLongestSum; k < depth; k += kLongestSum)
    multiply_part<true, Product>(Left{left.a + k * left.column, left.row, left.column}, b + k * b_row, b_row, c, c_row,
                                 rows, columns, depth - k < kLongestSum ? depth - k : kLongestSum);
}

}  // namespace
}  // namespace genfast
