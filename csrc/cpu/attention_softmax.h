// The softmax of attention, tile by tile: scores become probabilities relative to a base of their row.
#pragma once
#include "cpu/attention_tiles.h"
#include "cpu/exponential.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace genfast {
namespace {

// What was summed is scaled down when a score exceeds the base of its row by more than this, and not for every new
// largest score: sums of e^kSlack and less are as accurate, and the base seldom changes after the first tiles.
constexpr float kSlack = 8.0f;

// Of up to kRows rows: what `soften` hands on, and where it puts a vector of each row to combine its lanes.
struct Softening {
  alignas(64) float origin[kRows], shrink[kRows], lanes[kRows * kLanes];
};

template <class Combine>
inline vf across(const float* lanes, const Combine& combine) {
  vf v[kLanes];
  for (int j = 0; j < kLanes; j++) v[j] = load<vf>(lanes + j * kLanes);
  return across(v, combine);
}

// Two vectors of keys to bfloat16, one after the other.
inline void store_pairs(float* to, vf first, vf second) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#endif
}

// Where every row sees every key.
struct SeesAll {
  vf operator()(int64_t, int64_t, vf t) const { return t; }
};

// Scores [rows][kKeys], of which the first `vectors` vectors count, to e^(scale s - base) in place, or as pairs of
// bfloat16. seen(i, k, t) is t, the k-th vector of row i, with -inf for the keys that the row does not see. `base` and
// `total` have room for whole vectors of rows. True where `shrink` is not 1 for every row: what was summed before is to
// be multiplied by it.
template <bool PAIRS, bool WHOLE, class Seen>
inline bool soften(float scale, int64_t rows, int64_t vectors, const Seen& seen, float* scores, float* base,
                   float* total, Softening& w) {
  const int64_t count = WHOLE ? kKeys / kLanes : vectors, whole = padded(rows);
  const vf c = splat(scale), nothing = splat(-kInfinity);
  for (int64_t i = 0; i < rows; i++) {
    float* s = scores + i * kKeys;
    vf most = nothing;
    for (int64_t k = 0; k < count; k++) {
      const vf t = seen(i, k, load<vf>(s + k * kLanes) * c);
      store(s + k * kLanes, t);
      most = larger(t, most);
    }
    store(w.lanes + i * kLanes, most);
  }
  for (int64_t i = rows; i < whole; i++) store(w.lanes + i * kLanes, nothing);
  bool grown = false;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vf before = load<vf>(base + i), most = across(w.lanes + i * kLanes, [](vf a, vf b) { return larger(a, b); });
    const vi grows = most > before + splat(kSlack);
    const vf now = grows ? most : before, origin = as_float(as_int(now) & (now > nothing));
    store(base + i, now);
    store(w.origin + i, origin);
    store(w.shrink + i, exponential(before - origin));
    grown = grown || any(grows);
  }
  for (int64_t i = 0; i < rows; i++) {
    float* s = scores + i * kKeys;
    const vf origin = splat(w.origin[i]);
    vf sum{};
    for (int64_t k = 0; k < count; k += PAIRS ? 2 : 1) {
      const vf p = exponential(load<vf>(s + k * kLanes) - origin);
      sum += p;
      if constexpr (PAIRS) {
        const vf q = k + 1 < count ? exponential(load<vf>(s + (k + 1) * kLanes) - origin) : vf{};
        sum += q;
        store_pairs(s + k / 2 * kLanes, p, q);
      } else {
        store(s + k * kLanes, p);
      }
    }
    store(w.lanes + i * kLanes, sum);
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vf added = across(w.lanes + i * kLanes, [](vf a, vf b) { return a + b; });
    store(total + i, load<vf>(total + i) * load<vf>(w.shrink + i) + added);
  }
  return grown;
}

inline void shrink_rows(const float* shrink, int64_t rows, int64_t width, float* sum) {
  for (int64_t i = 0; i < rows; i++, sum += width) {
    if (shrink[i] == 1.0f) continue;
    for (int64_t d = 0; d < width; d += kLanes) store(sum + d, load<vf>(sum + d) * splat(shrink[i]));
  }
}

}  // namespace
}  // namespace genfast
