// The tile unit (AMX): eight registers of up to 16 rows of 16 words, and C += A B of them for pairs of bfloat16.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace genfast {
namespace {

constexpr int kTileSide = 16;  // rows of a whole tile, and words of its rows

// Registers 0 to 3 are for sums, 4 and 5 for 32 rows of A, 6 and 7 for two vectors of B: 0 and 1 are the sums of the
// first vector, 2 and 3 of the second.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Held by a thread while it multiplies.
#if defined(__AMX_BF16__)
// Some compilers do not know that a tile instruction reads memory.
inline void written_before_tiles(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

struct TileUnit {
  explicit TileUnit(const TileShapes& shapes = TileShapes()) {
    written_before_tiles(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
};

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Up to 32 rows of A times up to two vectors of B, which lie so many bytes apart, along 16 words.
template <int TILES, int VECTORS>
inline void add_tiles(const void* a, int64_t a_row, const void* b, int64_t b_row, int64_t b_vector) {
  _tile_loadd(4, a, a_row);
  _tile_loadd(6, b, b_row);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (TILES == 2) {
    _tile_loadd(5, static_cast<const char*>(a) + kTileSide * a_row, a_row);
    _tile_dpbf16ps(1, 5, 6);
  }
  if constexpr (VECTORS == 2) {
    _tile_loadd(7, static_cast<const char*>(b) + b_vector, b_row);
    _tile_dpbf16ps(2, 4, 7);
    if constexpr (TILES == 2) _tile_dpbf16ps(3, 5, 7);
  }
}
#else
struct TileUnit {
  TileUnit() {}
  TileUnit(const TileUnit&) = delete;
};
#endif

}  // namespace
}  // namespace genfast
