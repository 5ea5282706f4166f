// Where a running sum over the sorted entries of a row crosses a bound, without sorting the row.
//
// A few values (pivots) are tried in one pass: the sum, and the number, of the entries of at least each of them. The
// bound lies between two of them, and as soon as few enough entries do, those are copied out and looked at closely.
// The first pivots come from a sample of the row, so that one pass over the row and the copying are the usual case; a
// row that a sample misjudges (one token that has nearly everything) takes a pass or two more.
#pragma once
#include <cmath>

#include "cpu/order_key.h"
#include "cpu/token_rows.h"

namespace genfast {
namespace {

constexpr int kPivots = 6;
constexpr int64_t kMostCopied = 8192;
constexpr int64_t kSampled = 4096, kSampledRun = 64;  // entries of a sample, and of each of its runs of neighbours

// The first key, from above, at which the running sum (of weights, or of entries) exceeds `most`.
struct Crossing {
  uint32_t key = 0;
  uint64_t above = 0, at = 0;  // sums of the larger keys, and of this one
  uint64_t most = 0;           // the bound; of weights, it was given as a share of the whole
};

// Of at least each of the values `at`; `all` of all entries.
struct PivotSums {
  float at[kPivots];
  uint64_t sum[kPivots], count[kPivots], all;
};

inline int lanes_in(vi mask) {
#if defined(__AVX512F__)
  return __builtin_popcount(_mm512_test_epi32_mask((__m512i)mask, (__m512i)mask));
#else
  int n = 0;
  for (int k = 0; k < kLanes; k++) n -= mask[k];
  return n;
#endif
}

template <bool COUNT>
void sum_above(const Row& row, float m, float c, int bits, PivotSums& p) {
  const vi exponent = (vi{} + bits);
  for (int k = 0; k < kPivots; k++) p.sum[k] = p.count[k] = 0;
  p.all = 0;
  row.tiles([&](auto dt, const char* data, int64_t, int64_t n) {
    // Of this tile, in registers.
    WholeSum whole[kPivots], everything;
    int count[kPivots] = {};
    vf at[kPivots];
    for (int k = 0; k < kPivots; k++) at[k] = splat(p.at[k]);
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf x = load_logits<dt>(data, i);
#if defined(__AVX512DQ__)
      __m512i low, high;
      if constexpr (!COUNT) {
        const __m512 w = (__m512)weight(x - splat(m), splat(c), exponent);
        low = _mm512_cvttps_epi64(_mm512_castps512_ps256(w));
        high = _mm512_cvttps_epi64(_mm512_extractf32x8_ps(w, 1));
        everything.low = _mm512_add_epi64(everything.low, low);
        everything.high = _mm512_add_epi64(everything.high, high);
      }
      for (int k = 0; k < kPivots; k++) {
        const __mmask16 in = _mm512_cmp_ps_mask((__m512)x, (__m512)at[k], _CMP_GE_OQ);
        count[k] += __builtin_popcount(in);
        if constexpr (!COUNT) {
          whole[k].low = _mm512_mask_add_epi64(whole[k].low, (__mmask8)in, whole[k].low, low);
          whole[k].high = _mm512_mask_add_epi64(whole[k].high, (__mmask8)(in >> 8), whole[k].high, high);
        }
      }
#else
      vf w{};
      if constexpr (!COUNT) {
        w = weight(x - splat(m), splat(c), exponent);
        everything.add(w);
      }
      for (int k = 0; k < kPivots; k++) {
        const vi in = x >= at[k];
        count[k] += lanes_in(in);
        if constexpr (!COUNT) whole[k].add(as_float(as_int(w) & in));
      }
#endif
    }
    p.all += COUNT ? (uint64_t)n : everything.total();
    for (int k = 0; k < kPivots; k++) {
      p.count[k] += (uint64_t)count[k];
      p.sum[k] += COUNT ? (uint64_t)count[k] : whole[k].total();
    }
    return true;
  });
}

// Pivots around the value at which `share` of the row lies above, as a sample of it says; and two for rows of which a
// sample sees nothing because a few entries have nearly everything.
template <bool COUNT>
void guess(const Row& row, float m, float c, double share, float* at) {
  constexpr int kBins = 1024, kPerOctave = 16;
  alignas(64) float x[kSampledRun];
  double bins[kBins] = {}, all = 0, squares = 0;
  for (int64_t run = 0; run < kSampled / kSampledRun; run++) {
    row.fill((row.size - kSampledRun) * run / (kSampled / kSampledRun - 1), kSampledRun, x);
    for (int64_t i = 0; i < kSampledRun; i += kLanes) {
      vf t;
      vi n;
      const vf p = exp2_parts(load<vf>(x + i) - splat(m), splat(c), t, n);
      const vf value = COUNT ? splat(1.0f) : times_power(p, n);
      for (int k = 0; k < kLanes; k++) {
        bins[std::min(kBins - 1, (int)(t[k] * -(float)kPerOctave))] += (double)value[k];
        all += (double)value[k];
        squares += (double)value[k] * (double)value[k];
      }
    }
  }
  // A share of the sample is off by about this much.
  const double off = std::sqrt(share * (1 - share) * squares) / all;
  constexpr double kOffs[kPivots - 2] = {-3, -0.8, 0.8, 3};
  double running = 0;
  int bin = -1;
  for (int k = 0; k < kPivots - 2; k++) {
    const double wanted = std::min((share + kOffs[k] * off) * all, all);
    while (bin < kBins - 1 && (bin < 0 || running < wanted)) running += bins[++bin];
    at[k] = m - (float)(bin + 1) / ((float)kPerOctave * c);
  }
  at[kPivots - 2] = m - 3.0f / c;
  at[kPivots - 1] = m - 12.0f / c;
}

// Copies the entries in [least, below) to `to`; how many.
inline int64_t copy_between(const Row& row, float least, float below, float* to) {
  int64_t copied = 0;
  row.tiles([&](auto dt, const char* data, int64_t, int64_t n) {
    int64_t found = copied;
    const vf from = splat(least), end = splat(below);
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf x = load_logits<dt>(data, i);
      const vi in = (x >= from) & (x < end);
#if defined(__AVX512F__)
      // No branch, which would go wrong at every third vector; and not straight to memory, which takes ten times as
      // long on some processors. `to` has room for that.
      const __mmask16 mask = _mm512_test_epi32_mask((__m512i)in, (__m512i)in);
      _mm512_storeu_ps(to + found, _mm512_maskz_compress_ps(mask, (__m512)x));
      found += __builtin_popcount(mask);
#else
      if (!any(in)) continue;
      for (int k = 0; k < kLanes; k++) {
        to[found] = x[k];
        found -= in[k];
      }
#endif
    }
    copied = found;
    return true;
  });
  return copied;
}

// The crossing among n entries, by 11, 11 and 10 bits of the key at a time; `found.above` is the sum of what is above
// them all, `found.most` the bound.
template <bool COUNT>
void cross_entries(const float* x, int64_t n, float m, float c, int bits, Crossing& found) {
  constexpr int kBins = 2048;
  std::vector<uint64_t> bins(kBins);
  int known = 0;
  for (int width : {11, 11, 10}) {
    std::fill(bins.begin(), bins.end(), 0);
    const int shift = 32 - known - width;
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf v = load<vf>(x + i);
      const vu key = order_keys(v);
      const vf w = COUNT ? splat(1.0f) : weight(v - splat(m), splat(c), vi{} + bits);
      for (int k = 0; k < kLanes && i + k < n; k++)
        if (!known || key[k] >> (32 - known) == found.key)
          bins[(key[k] >> shift) & ((1u << width) - 1)] += (uint64_t)(int64_t)w[k];
    }
    int bin = (1 << width) - 1;
    for (; bin > 0 && found.above + bins[bin] <= found.most; bin--) found.above += bins[bin];
    found.at = bins[bin];
    found.key = found.key << width | (uint32_t)bin;
    known += width;
  }
}

// `m` is the largest entry. Of entries (COUNT), the bound is `most`; of weights, it is the share most / 2^64 of them
// all.
template <bool COUNT>
Crossing cross(const Row& row, float m, float c, int bits, uint64_t most) {
  Crossing found;
  std::vector<float> copied(kMostCopied + 2 * kLanes);  // the padding of the row's last tile may come too
  // Entries of at least `low` come to more than the bound, those of at least `high` do not.
  uint64_t low = order_key(-kInfinity), high = (uint64_t)order_key(m) + 1;
  PivotSums p;
  uint64_t low_sum = 0, high_sum = 0, low_count = (uint64_t)row.size, high_count = 0;
  if (row.size > 2 * kSampled) {
    const double share = COUNT ? (double)most / (double)row.size : std::ldexp((double)most, -64);
    guess<COUNT>(row, m, c, std::min(share, 1.0), p.at);
  } else {
    for (int k = 0; k < kPivots; k++) p.at[k] = m - (float)(k + 1) / c;
  }
  for (int round = 0;; round++) {
    sum_above<COUNT>(row, m, c, bits, p);
    if (round == 0) {
      found.most = COUNT ? most : high_product(most, p.all);
      low_sum = p.all;
    }
    for (int k = 0; k < kPivots; k++) {
      const uint64_t key = order_key(p.at[k]);
      if (p.sum[k] > found.most) {
        if (key > low) low = key, low_sum = p.sum[k], low_count = p.count[k];
      } else if (key < high) {
        high = key, high_sum = p.sum[k], high_count = p.count[k];
      }
    }
    if (high - low == 1) {
      found.key = (uint32_t)low, found.above = high_sum, found.at = low_sum - high_sum;
      return found;
    }
    if (low_count - high_count <= (uint64_t)kMostCopied) break;
    // Evenly between the two, by value and by key in turn: a key has more values where the row has fewer.
    const float least = from_key((uint32_t)low), below = from_key((uint32_t)high);
    for (int k = 0; k < kPivots; k++) {
      const uint64_t between = low + (high - low) * (uint64_t)(k + 1) / (kPivots + 1);
      p.at[k] = round % 2 == 0 && std::isfinite(least) ? least + (below - least) * ((float)(k + 1) / (kPivots + 1))
                                                       : from_key((uint32_t)std::max(between, low + 1));
    }
  }
  const int64_t n = copy_between(row, from_key((uint32_t)low), from_key((uint32_t)high), copied.data());
  found.above = high_sum;
  cross_entries<COUNT>(copied.data(), n, m, c, bits, found);
  return found;
}

}  // namespace
}  // namespace genfast
