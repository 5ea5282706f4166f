// The tile unit in plain C++, for machines without one: force-included before the kernels.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AMX_BF16__ 1

namespace amx {

inline thread_local uint8_t registers[8][16][64];
inline thread_local bool configured = false;

inline void load(int tile, const void* from, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int row = 0; row < 16; row++)
    std::memcpy(registers[tile][row], static_cast<const char*>(from) + row * stride, 64);
}
inline void save(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, registers[tile][row], 64);
}
inline float number(const uint8_t* half) {
  uint32_t bits = (uint32_t)half[0] << 16 | (uint32_t)half[1] << 24;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void multiply(int sum, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        float s;
        std::memcpy(&s, registers[sum][m] + 4 * n, 4);
        for (int half = 0; half < 4; half += 2)
          s += number(registers[a][m] + 4 * k + half) * number(registers[b][k] + 4 * n + half);
        std::memcpy(registers[sum][m] + 4 * n, &s, 4);
      }
}
inline void configure(const void* shapes) {
  const uint8_t* s = static_cast<const uint8_t*>(shapes);
  bool good = s[0] == 1;
  for (int tile = 0; tile < 8; tile++) good = good && s[16 + 2 * tile] == 64 && !s[17 + 2 * tile] && s[48 + tile] == 16;
  configured = good;
}

}  // namespace amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) amx::configure(shapes)
#define _tile_release() amx::configured = false
#define _tile_zero(tile) std::memset(amx::registers[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx::save(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) amx::multiply(sum, a, b)
