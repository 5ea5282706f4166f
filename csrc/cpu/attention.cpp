// Attention over the keys that a structured mask lets each row see. With t_ij = scale q_i . k_j,
//
//     m_i = max_j t_ij,   l_i = sum_j e^(t_ij - m_i),   o_i = sum_j e^(t_ij - m_i) v_j / l_i,   lse_i = m_i + log l_i,
//
// tile of keys by tile of keys: when m_i grows, l_i and o_i are scaled down (Dao et al. 2022, arXiv:2205.14135). Keys
// and values are packed once per key head, as the right sides of the two products, and shared by all query heads and
// tiles of rows. A tile of keys that no row of a tile sees is not touched; one that all see has no mask code. A tile of
// rows is one thread's, from the first key to the last, so that nothing depends on the number of threads. With
// AVX512-BF16, bfloat16 goes into the products as it is: p is then rounded to it, as the peers round it.
#include "cpu/attention.h"

#include <cmath>
#include <vector>

#include "cpu/attention_cached.h"
#include "cpu/attention_tiles.h"

namespace genfast {
namespace {

// Keys and values of every tile that some row sees, as right sides of the products: keys as [dim][kKeys] and values as
// [kKeys][width], or both with pairs of bfloat16 in place of numbers, [dim / 2][kKeys] and [kKeys / 2][width]. What no
// row of a sequence sees counts as zeros, since it may be memory that nobody has written.
template <bool PAIRS>
struct Packed {
  int64_t tiles, width, depth, key_size, value_size;
  Floats keys, values;

  Packed(const AttentionArgs& a, int threads)
      : tiles(tiles_of(a.kv_len, kKeys)),
        width(padded(a.value_dim)),
        depth(PAIRS ? (a.dim + 1) / 2 : a.dim),
        key_size(depth * kKeys),
        value_size((PAIRS ? kKeys / 2 : kKeys) * width),
        keys(a.batch * a.kv_heads * tiles * key_size),
        values(a.batch * a.kv_heads * tiles * value_size) {
    std::vector<Sight> seen;
    for (int64_t b = 0; b < (a.ranges_stride ? a.batch : 1); b++) seen.emplace_back(a, b, 0, a.q_len);
    for_each(
        threads, a.batch * a.kv_heads * tiles, [] { return 0; },
        [&](int, int64_t item) {
          const int64_t tile = item % tiles, h = item / tiles % a.kv_heads, b = item / tiles / a.kv_heads;
          const Sight& sight = seen[a.ranges_stride ? b : 0];
          const int64_t first = tile * kKeys, from = std::max(first, sight.begin()),
                        to = std::min({first + kKeys, sight.end(), a.kv_len});
          if (from >= to) return;
          float *k = keys.data() + item * key_size, *v = values.data() + item * value_size;
          if constexpr (PAIRS) {
            load_column_pairs(a.k, b, h, first, from, to, a.dim, k);
            load_row_pairs(a.v, b, h, first, from, to, a.value_dim, width, v);
          } else {
            load_columns(a.k, b, h, first, from, to, a.dim, k);
            std::fill(v, v + (from - first) * width, 0.0f);
            load_rows(a.v, b, h, from, to - from, kKeys - (from - first), a.value_dim, width,
                      v + (from - first) * width);
          }
        });
  }
};

struct Workspace {
  Floats q, scores, pairs, sum;  // of a tile of rows: [kRows][depth], [kRows][kKeys], half of that, [kRows][width]
  alignas(64) float largest[kRows], shrink[kRows];
  alignas(64) float totals[kRows * kLanes], added[kRows * kLanes];  // a vector per row, whose lanes are added last
  Workspace(int64_t depth, int64_t width)
      : q(kRows * depth), scores(kRows * kKeys), pairs(kRows * kKeys / 2), sum(kRows * width) {}
};

// The keys of a row, where there is no mask: all that exist.
inline const int32_t* range_of(const AttentionArgs& a, int64_t b, int64_t row, const int32_t* all) {
  return a.ranges ? a.ranges + b * a.ranges_stride + row * 4 : all;
}

// Scores of a tile of keys to probabilities relative to the largest score so far, in place; what was summed before is
// to be multiplied by `shrink`.
void soften(const AttentionArgs& a, int64_t b, int64_t row, int64_t n, int64_t key, bool partial, Workspace& w) {
  constexpr int kVectors = kKeys / kLanes;
  const int32_t all[4] = {0, (int32_t)a.kv_len, 0, 0};
  const vf scale = splat(a.scale);
  for (int64_t i = 0; i < n; i++) {
    float* s = w.scores.data() + i * kKeys;
    vf t[kVectors], most = splat(-kInfinity);
    for (int k = 0; k < kVectors; k++) {
      t[k] = load<vf>(s + k * kLanes) * scale;
      if (partial) {
        const vi seen = seen_lanes(range_of(a, b, row + i, all), key + k * kLanes);
        t[k] = as_float((as_int(t[k]) & seen) | (as_int(splat(-kInfinity)) & ~seen));
      }
      most = larger(t[k], most);
    }
    const float before = w.largest[i], now = std::max(before, largest_lane(most));
    const float base = now == -kInfinity ? 0.0f : now;
    vf sum{};
    for (int k = 0; k < kVectors; k++) {
      const vf p = exponential(t[k] - splat(base));
      store(s + k * kLanes, p);
      sum += p;
    }
    w.largest[i] = now;
    store(w.added + i * kLanes, sum);
    w.shrink[i] = before - base;
  }
  for (int64_t i = 0; i < kRows; i += kLanes) {
    store(w.shrink + i, exponential(load<vf>(w.shrink + i)));
  }
  for (int64_t i = 0; i < n; i++) {
    float* totals = w.totals + i * kLanes;
    store(totals, load<vf>(totals) * splat(w.shrink[i]) + load<vf>(w.added + i * kLanes));
  }
}

void store_rows(const AttentionArgs& a, int64_t b, int64_t h, int64_t row, int64_t n, int64_t width, Workspace& w) {
  for (int64_t i = 0; i < n; i++) {
    float* o = w.sum.data() + i * width;
    const double total = genfast::total(load<vf>(w.totals + i * kLanes));
    const vf divisor = splat(total == 0 ? 1.0f : (float)total);
    for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) / divisor);
    store_run(o, a.value_dim, row_of(a.out, b, h, row + i), a.out.dtype);
    a.lse[(b * a.heads + h) * a.q_len + row + i] =
        total == 0 ? -kInfinity : (float)((double)w.largest[i] + std::log(total));
  }
}

template <bool PAIRS>
void attend(const AttentionArgs& a, const Packed<PAIRS>& packed, int64_t b, int64_t h, int64_t row, Workspace& w) {
  const int64_t n = std::min(kRows, a.q_len - row), kv_head = h / (a.heads / a.kv_heads), width = packed.width;
  const int64_t first_tile = (b * a.kv_heads + kv_head) * packed.tiles;
  const Sight sight(a, b, row, n);
  if constexpr (PAIRS)
    load_pairs(a.q, b, h, row, n, a.dim, packed.depth, w.q.data());
  else
    load_rows(a.q, b, h, row, n, n, a.dim, a.dim, w.q.data());
  std::fill(w.sum.data(), w.sum.data() + n * width, 0.0f);
  std::fill(w.largest, w.largest + kRows, -kInfinity);
  std::fill(w.totals, w.totals + kRows * kLanes, 0.0f);
  std::fill(w.shrink, w.shrink + kRows, 0.0f);
  for (int64_t tile = sight.begin() / kKeys; tile * kKeys < sight.end(); tile++) {
    const int64_t key = tile * kKeys, end = std::min(key + kKeys, a.kv_len);
    if (!sight.sees(key, end)) continue;
    const bool partial = end - key < kKeys || !sight.sees_all(key, end);
    const float *k = packed.keys.data() + (first_tile + tile) * packed.key_size,
                *v = packed.values.data() + (first_tile + tile) * packed.value_size;
    multiply<false, Product<PAIRS>>(Left{w.q.data(), packed.depth, 1}, k, kKeys, w.scores.data(), kKeys, n, kKeys,
                                    packed.depth);
    soften(a, b, row, n, key, partial, w);
    for (int64_t i = 0; i < n; i++) {
      if (w.shrink[i] == 1.0f) continue;
      float* o = w.sum.data() + i * width;
      for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) * splat(w.shrink[i]));
    }
    // From the first key to the last that a row sees.
    const int64_t from = std::max<int64_t>(sight.begin() - key, 0), to = std::min(end, sight.end()) - key;
    if constexpr (PAIRS) {
      round_to_pairs(w.scores.data(), n * kKeys, w.pairs.data());
      const int64_t first = from / 2, last = (to + 1) / 2;
      multiply<true, Product<PAIRS>>(Left{w.pairs.data() + first, kKeys / 2, 1}, v + first * width, width, w.sum.data(),
                                     width, n, width, last - first);
    } else {
      multiply<true>(Left{w.scores.data() + from, kKeys, 1}, v + from * width, width, w.sum.data(), width, n, width,
                     to - from);
    }
  }
  store_rows(a, b, h, row, n, width, w);
}

template <bool PAIRS>
void attend_all(const AttentionArgs& a) {
  const int64_t tiles = tiles_of(a.q_len, kRows), items = a.batch * a.heads * tiles;
  const int threads = threads_for(items * kRows * a.kv_len * a.dim, 1 << 20);
  const Packed<PAIRS> packed(a, threads);
  for_each(
      threads, items, [&] { return Workspace(packed.depth, packed.width); },
      [&](Workspace& w, int64_t item) {
        attend(a, packed, item / tiles / a.heads, item / tiles % a.heads, item % tiles * kRows, w);
      });
}

}  // namespace

void attention(const AttentionArgs& a) {
  if (a.batch * a.heads * a.q_len == 0) return;
  if (few_rows(a)) return attention_of_few_rows(a);
#if defined(__AVX512BF16__)
  if (a.q.dtype == kBFloat16) return attend_all<true>(a);
#endif
  attend_all<false>(a);
}

}  // namespace genfast
