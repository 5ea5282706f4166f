// Products of a few rows with one matrix after another: on the tile unit where there is one, for pairs of bfloat16.
//
// A is multiplied as it lies, 16 rows by 16 words, and so is B, 16 words by a vector: just what the instruction takes.
// Sums of 32 rows and two vectors stay in registers along the whole depth. Registers have as many rows as are left, so
// that no row is read or written that is not there. The last words of a depth that is no multiple of 16 are copied,
// with zeros after them: what lies there may be anything.
#pragma once
#include <algorithm>

#include "cpu/small_gemm.h"
#include "cpu/tile_unit.h"

namespace genfast {
namespace {

constexpr int64_t kMostProductRows = 2 * kTileSide;

// C[rows][columns] (+)= A[rows][depth] B[depth][columns], as `multiply`, but a row of A has its words side by side, and
// there are 1 to kMostProductRows of them.
template <bool PAIRS>
class RowsProduct {
 public:
  explicit RowsProduct(int64_t rows) : rows_(rows) {}
  void operator()(Left left, Right right, float* c, int64_t c_row, int64_t columns, int64_t depth, bool add) {
    multiply<PAIRS>(left, right, c, c_row, rows_, columns, depth, add);
  }

 private:
  int64_t rows_;
};

#if defined(__AMX_BF16__)
template <>
class RowsProduct<true> {
 public:
  explicit RowsProduct(int64_t rows) : rows_(rows), unit_(shapes(rows)) {}

  void operator()(Left left, Right right, float* c, int64_t c_row, int64_t columns, int64_t depth, bool add) {
    const int64_t whole = depth / kTileSide * kTileSide;
    for (int64_t i = 0; i < rows_ && whole < depth; i++) {
      const __mmask16 there = (1u << (depth - whole)) - 1;
      store(last_a_ + i * kTileSide, (vf)_mm512_maskz_loadu_ps(there, left.a + i * left.row + whole));
    }
    const auto both = rows_ > kTileSide ? &RowsProduct::panel<2, 2> : &RowsProduct::panel<1, 2>;
    const auto one = rows_ > kTileSide ? &RowsProduct::panel<2, 1> : &RowsProduct::panel<1, 1>;
    for (int64_t n = 0; n < columns / kLanes; n += 2)
      (this->*(n + 1 < columns / kLanes ? both : one))(left, right.beside(n), c + n * kLanes, c_row, depth, add);
  }

 private:
  int64_t rows_;
  TileUnit unit_;
  alignas(64) float last_a_[kMostProductRows * kTileSide], last_b_[2 * kTileSide * kLanes];

  static TileShapes shapes(int64_t rows) {
    TileShapes s;
    for (int tile = 0; tile < 6; tile++)  // a register cannot have no rows, used or not
      s.rows[tile] = std::min<int64_t>(tile % 2 ? std::max<int64_t>(rows - kTileSide, 1) : rows, kTileSide);
    return s;
  }

  template <int TILES, int VECTORS>
  void panel(Left left, Right right, float* c, int64_t c_row, int64_t depth, bool add) {
    float* lower = c + kTileSide * c_row;
    const int64_t bytes = c_row * 4;
    int64_t k = 0;
    written_before_tiles(this);
    if (add) {
      _tile_loadd(0, c, bytes);
      if constexpr (TILES == 2) _tile_loadd(1, lower, bytes);
      if constexpr (VECTORS == 2) _tile_loadd(2, c + kLanes, bytes);
      if constexpr (TILES == 2 && VECTORS == 2) _tile_loadd(3, lower + kLanes, bytes);
    } else {
      zero_sums();
    }
    for (; k + kTileSide <= depth; k += kTileSide)
      add_tiles<TILES, VECTORS>(left.a + k, left.row * 4, right.b + k * right.row, right.row * 4, right.vector * 4);
    if (k < depth) {
      for (int n = 0; n < VECTORS; n++)
        for (int j = 0; j < kTileSide; j++)
          store(last_b_ + (n * kTileSide + j) * kLanes,
                k + j < depth ? load<vf>(right.b + (k + j) * right.row + n * right.vector) : vf{});
      written_before_tiles(this);
      add_tiles<TILES, VECTORS>(last_a_, 64, last_b_, 64, kTileSide * 64);
    }
    _tile_stored(0, c, bytes);
    if constexpr (TILES == 2) _tile_stored(1, lower, bytes);
    if constexpr (VECTORS == 2) _tile_stored(2, c + kLanes, bytes);
    if constexpr (TILES == 2 && VECTORS == 2) _tile_stored(3, lower + kLanes, bytes);
  }
};
#endif

}  // namespace
}  // namespace genfast
