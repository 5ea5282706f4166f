// What top-p and top-k leave of a row of logits.
#pragma once
#include "cpu/order_key.h"
#include "cpu/token_rows.h"

namespace genfast {
namespace {

// The first key, from above, at which the running sum (of weights, or of entries) exceeds `most`: by 11, 11 and 10 bits
// at a time. With `of_sum`, `most` is a share of the whole, times 2^64. Neighbours are counted apart, for they often
// fall into one bin. After the first pass next to no entry matters, and most vectors are passed over.
struct Crossing {
  uint32_t key = 0;
  uint64_t above = 0, at = 0;  // sums of the larger keys, and of this one
  uint64_t most = 0;           // the sum asked for, where it was given as a share
};

template <bool COUNT>
Crossing cross(const Row& row, float m, float c, int bits, uint64_t most, bool of_sum) {
  constexpr int kBins = 2048;
  Crossing found;
  const vi exponent = (vi{} + bits);
  std::vector<uint64_t> bins(2 * kBins);
  int known = 0;
  for (int width : {11, 11, 10}) {
    std::fill(bins.begin(), bins.end(), 0);
    const int shift = 32 - known - width;
    const uint32_t low = known ? found.key << (32 - known) : 0;
    const uint32_t high = known ? low | ((1u << (32 - known)) - 1) : ~0u;
    row.tiles([&](auto dt, const char* p, int64_t, int64_t n) {
      alignas(64) uint32_t key[kLanes];
      alignas(64) float v[kLanes];
      for (int64_t i = 0; i < n; i += kLanes) {
        const vf x = load_logits<dt>(p, i);
        const vu keys = order_keys(x);
        if (known && !any((keys >= splat(low)) & (keys <= splat(high)))) continue;
        store(key, keys);
        if (!COUNT) store(v, weight(x - splat(m), splat(c), exponent));
        for (int k = 0; k < kLanes; k++)
          if (key[k] >= low && key[k] <= high)
            bins[2 * ((key[k] - low) >> shift) + (k & 1)] += COUNT ? 1 : (uint64_t)(int64_t)v[k];
      }
      return true;
    });
    if (of_sum && !known) {
      uint64_t all = 0;
      for (uint64_t b : bins) all += b;
      found.most = most = high_product(most, all);
    }
    int bin = (1 << width) - 1;
    const auto sum = [&] { return bins[2 * bin] + bins[2 * bin + 1]; };
    for (; bin > 0 && found.above + sum() <= most; bin--) found.above += sum();
    found.at = sum();
    found.key = found.key << width | (uint32_t)bin;
    known += width;
  }
  return found;
}

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
    const Crossing at = cross<false>(row, m, c, bits, share, true);
    filter.cut = from_key(at.key);
    const uint64_t v = one_weight(filter.cut, m, c, bits);  // of each of the entries that are equal to the cut
    uint64_t ties = (at.most - at.above) / v + (keep_crossing ? 1 : 0);
    if (ties == 0 && filter.cut == m) ties = 1;
    filter.ties_end = ties >= at.at / v ? row.size : ties == 0 ? 0 : end_of_ties(row, filter.cut, ties);
  }
  if (top_k && top_k < row.size) {
    row.filter = &filter;
    // The k-th largest: the first key at which more than k - 1 have been counted.
    const Crossing at = cross<true>(row, m, c, bits, (uint64_t)top_k - 1, false);
    const float cut = from_key(at.key);
    if (cut > filter.cut) filter = Filter{cut, row.size};
  }
  return filter;
}

}  // namespace
}  // namespace genfast
