// The tile unit in plain C++, for machines without one: force-included before the kernels.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AMX_BF16__ 1

namespace amx {

inline thread_local uint8_t registers[8][16][64];
inline thread_local int rows[8] = {};  // of each; none without a configuration

inline void check(bool good) {
  if (!good) __builtin_trap();
}
inline void load(int tile, const void* from, int64_t stride) {
  check(rows[tile]);
  for (int row = 0; row < rows[tile]; row++)
    std::memcpy(registers[tile][row], static_cast<const char*>(from) + row * stride, 64);
}
inline void save(int tile, void* to, int64_t stride) {
  check(rows[tile]);
  for (int row = 0; row < rows[tile]; row++)
    std::memcpy(static_cast<char*>(to) + row * stride, registers[tile][row], 64);
}
inline float number(const uint8_t* half) {
  uint32_t bits = (uint32_t)half[0] << 16 | (uint32_t)half[1] << 24;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Even and odd numbers along the sum are added up apart.
inline void multiply(int sum, int a, int b) {
  check(rows[sum] && rows[sum] == rows[a] && rows[b] == 16);
  for (int m = 0; m < rows[sum]; m++)
    for (int n = 0; n < 16; n++) {
      float even = 0, odd = 0, s;
      for (int k = 0; k < 16; k++) {
        even += number(registers[a][m] + 4 * k) * number(registers[b][k] + 4 * n);
        odd += number(registers[a][m] + 4 * k + 2) * number(registers[b][k] + 4 * n + 2);
      }
      std::memcpy(&s, registers[sum][m] + 4 * n, 4);
      s += even + odd;
      std::memcpy(registers[sum][m] + 4 * n, &s, 4);
    }
}
inline void release() { std::memset(rows, 0, sizeof rows); }
inline void configure(const void* shapes) {
  const uint8_t* s = static_cast<const uint8_t*>(shapes);
  check(s[0] == 1);
  for (int tile = 0; tile < 8; tile++) {
    rows[tile] = s[48 + tile];
    check(s[16 + 2 * tile] == 64 && !s[17 + 2 * tile] && rows[tile] >= 1 && rows[tile] <= 16);
  }
}

}  // namespace amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) amx::configure(shapes)
#define _tile_release() amx::release()
#define _tile_zero(tile) std::memset(amx::registers[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx::save(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) amx::multiply(sum, a, b)
