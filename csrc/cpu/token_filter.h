// What top-p and top-k leave of a row of logits.
#pragma once
#include "cpu/token_crossing.h"

namespace genfast {
namespace {

// Index after the n-th entry that equals x.
inline int64_t end_of_ties(const Row& row, float x, uint64_t n) {
  int64_t end = 0;
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t entries) {
    for (int64_t i = 0; i < entries; i += kLanes) {
      const vf v = load_logits<dt>(p, i);
      for (int k = 0; k < kLanes; k++)
        if (v[k] == x && n-- == 1) {
          end = first + i + k + 1;
          return false;
        }
    }
    return true;
  });
  return end;
}

// The weight of one logit, by the vector code.
inline uint64_t one_weight(float x, float m, float c, int bits) {
  return (uint64_t)weight(splat(x) - splat(m), splat(c), vi{} + bits)[0];
}

// top_k 0, share 0: all. `share` is top_p 2^64.
inline Filter find_filter(Row row, float m, float c, int bits, int64_t top_k, uint64_t share, bool keep_crossing) {
  Filter filter;
  filter.ties_end = row.size;
  if (share) {
    const Crossing at = cross<false>(row, m, c, bits, share);
    filter.cut = from_key(at.key);
    const uint64_t v = one_weight(filter.cut, m, c, bits);  // of each of the entries that are equal to the cut
    uint64_t ties = (at.most - at.above) / v + (keep_crossing ? 1 : 0);
    if (ties == 0 && filter.cut == m) ties = 1;
    filter.ties_end = ties >= at.at / v ? row.size : ties == 0 ? 0 : end_of_ties(row, filter.cut, ties);
  }
  if (top_k && top_k < row.size) {
    row.filter = &filter;
    // The k-th largest: the first key at which more than k - 1 have been counted.
    const Crossing at = cross<true>(row, m, c, bits, (uint64_t)top_k - 1);
    const float cut = from_key(at.key);
    if (cut > filter.cut) filter = Filter{cut, row.size};
  }
  return filter;
}

}  // namespace
}  // namespace genfast
