// A square of vectors, transposed in registers.
#pragma once
#include "cpu/simd.h"

namespace genfast {
namespace {

template <int S>
inline void transpose_step(vf* v) {
  vi low, high;
  for (int j = 0; j < kLanes; j++) {
    low[j] = j & S ? kLanes + j - S : j;
    high[j] = j & S ? kLanes + j : j + S;
  }
  for (int i = 0; i < kLanes; i++) {
    if (i & S) continue;
    const vf a = v[i], b = v[i + S];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + S] = __builtin_shuffle(a, b, high);
  }
}

// v[i][j] becomes v[j][i].
inline void transpose(vf* v) {
  if constexpr (kLanes >= 16) transpose_step<8>(v);
  if constexpr (kLanes >= 8) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

}  // namespace
}  // namespace genfast
