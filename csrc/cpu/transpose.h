// A square of vectors, transposed in registers.
#pragma once
#include "cpu/simd.h"

namespace genfast {
namespace {

// Of each square of 2 S by 2 S, the quarters off the diagonal change places.
template <int S>
inline void exchange(vf& a, vf& b) {
  vi low, high;
  for (int j = 0; j < kLanes; j++) {
    low[j] = j & S ? kLanes + j - S : j;
    high[j] = j & S ? kLanes + j : j + S;
  }
  const vf first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

template <int S>
inline void transpose_step(vf* v) {
  for (int i = 0; i < kLanes; i++)
    if (!(i & S)) exchange<S>(v[i], v[i + S]);
}

// v[i][j] becomes v[j][i].
inline void transpose(vf* v) {
  if constexpr (kLanes >= 16) transpose_step<8>(v);
  if constexpr (kLanes >= 8) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// Lane i of the result combines the lanes of v[i]: what the rows of the transpose would combine to, each pair as soon
// as it is there. `combine` is commutative and associative, up to rounding.
template <int S = kLanes / 2, class Combine>
inline vf across(vf* v, const Combine& combine) {
  for (int i = 0; i < S; i++) {
    exchange<S>(v[i], v[i + S]);
    v[i] = combine(v[i], v[i + S]);
  }
  if constexpr (S == 1)
    return v[0];
  else
    return across<S / 2>(v, combine);
}

}  // namespace
}  // namespace genfast
