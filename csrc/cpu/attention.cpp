// Attention over the keys that a structured mask lets each row see. With t_ij = (scale log2 e) q_i . k_j,
//
//     m_i = max_j t_ij,   l_i = sum_j 2^(t_ij - m_i),   o_i = sum_j 2^(t_ij - m_i) v_j / l_i,   lse_i = ln 2 (m_i +
//     log2 l_i),
//
// tile of keys by tile of keys: when m_i grows, l_i and o_i are scaled down (Dao et al. 2022, arXiv:2205.14135). Keys
// and values are packed once per key head, as the right sides of the two products, and shared by all query heads and
// tiles of rows. A tile of keys that no row of a tile sees is not touched; one that all see has no mask code. A tile of
// rows is one thread's, from the first key to the last, so that nothing depends on the number of threads.
#include "cpu/attention.h"

#include <cmath>

#include "cpu/attention_cached.h"
#include "cpu/attention_tiles.h"

namespace genfast {
namespace {

// Keys as [dim][kKeys] and values as [kKeys][width] of every tile that some row sees.
struct Packed {
  int64_t tiles, width, key_size, value_size;
  Floats keys, values;

  Packed(const AttentionArgs& a, int threads)
      : tiles(tiles_of(a.kv_len, kKeys)),
        width(padded(a.value_dim)),
        key_size(a.dim * kKeys),
        value_size(kKeys * width),
        keys(a.batch * a.kv_heads * tiles * key_size),
        values(a.batch * a.kv_heads * tiles * value_size) {
    for_each(
        threads, a.batch * a.kv_heads * tiles, [] { return 0; },
        [&](int, int64_t item) {
          const int64_t tile = item % tiles, h = item / tiles % a.kv_heads, b = item / tiles / a.kv_heads;
          const int64_t first = tile * kKeys, n = std::min(kKeys, a.kv_len - first);
          load_columns(a.k, b, h, first, n, a.dim, keys.data() + item * key_size);
          load_rows(a.v, b, h, first, n, kKeys, a.value_dim, width, values.data() + item * value_size);
        });
  }
};

struct Workspace {
  Floats q, scores, sum;  // of a tile of rows: [kRows][dim], [kRows][kKeys], [kRows][width]
  alignas(64) float largest[kRows], total[kRows], added[kRows], shrink[kRows];
  Workspace(int64_t dim, int64_t width) : q(kRows * dim), scores(kRows * kKeys), sum(kRows * width) {}
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
  const vf c = splat(a.scale * kLog2E);
  for (int64_t i = 0; i < n; i++) {
    float* s = w.scores.data() + i * kKeys;
    vf t[kVectors], most = splat(-kInfinity);
    for (int k = 0; k < kVectors; k++) {
      t[k] = load<vf>(s + k * kLanes) * c;
      if (partial) {
        const vi seen = seen_lanes(range_of(a, b, row + i, all), key + k * kLanes);
        t[k] = as_float((as_int(t[k]) & seen) | (as_int(splat(-kInfinity)) & ~seen));
      }
      most = larger(t[k], most);
    }
    const float before = w.largest[i], now = std::max(before, largest(most));
    const float base = now == -kInfinity ? 0.0f : now;
    vf sum{};
    for (int k = 0; k < kVectors; k++) {
      const vf p = power_of_two(t[k] - splat(base));
      store(s + k * kLanes, p);
      sum += p;
    }
    w.largest[i] = now;
    w.added[i] = sum_lanes(sum);
    w.shrink[i] = before - base;
  }
  for (int64_t i = 0; i < kRows; i += kLanes) {
    const vf shrink = power_of_two(load<vf>(w.shrink + i));
    store(w.shrink + i, shrink);
    store(w.total + i, load<vf>(w.total + i) * shrink + load<vf>(w.added + i));
  }
}

void store_rows(const AttentionArgs& a, int64_t b, int64_t h, int64_t row, int64_t n, int64_t width, Workspace& w) {
  for (int64_t i = 0; i < n; i++) {
    float* o = w.sum.data() + i * width;
    const float total = w.total[i];
    const vf inverse = splat(total == 0 ? 0.0f : 1 / total);
    for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) * inverse);
    store_run(o, a.value_dim, row_of(a.out, b, h, row + i), a.out.dtype);
    a.lse[(b * a.heads + h) * a.q_len + row + i] = total == 0 ? -kInfinity : (w.largest[i] + std::log2(total)) * kLog2;
  }
}

void attend(const AttentionArgs& a, const Packed& packed, int64_t b, int64_t h, int64_t row, Workspace& w) {
  const int64_t n = std::min(kRows, a.q_len - row), kv_head = h / (a.heads / a.kv_heads), width = packed.width;
  const int64_t first_tile = (b * a.kv_heads + kv_head) * packed.tiles;
  const Sight sight(a, b, row, n);
  load_rows(a.q, b, h, row, n, n, a.dim, a.dim, w.q.data());
  std::fill(w.sum.data(), w.sum.data() + n * width, 0.0f);
  std::fill(w.largest, w.largest + kRows, -kInfinity);
  std::fill(w.total, w.total + kRows, 0.0f);
  std::fill(w.shrink, w.shrink + kRows, 0.0f);
  std::fill(w.added, w.added + kRows, 0.0f);
  for (int64_t tile = sight.begin() / kKeys; tile * kKeys < sight.end(); tile++) {
    const int64_t key = tile * kKeys, end = std::min(key + kKeys, a.kv_len);
    if (!sight.sees(key, end)) continue;
    const bool partial = end - key < kKeys || !sight.sees_all(key, end);
    multiply<false>(Left{w.q.data(), a.dim, 1}, packed.keys.data() + (first_tile + tile) * packed.key_size, kKeys,
                    w.scores.data(), kKeys, n, kKeys, a.dim);
    soften(a, b, row, n, key, partial, w);
    for (int64_t i = 0; i < n; i++) {
      if (w.shrink[i] == 1.0f) continue;
      float* o = w.sum.data() + i * width;
      for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) * splat(w.shrink[i]));
    }
    // From the first key to the last that a row sees: what lies beyond may be memory that nobody has written.
    const int64_t from = std::max<int64_t>(sight.begin() - key, 0), to = std::min(end, sight.end()) - key;
    multiply<true>(Left{w.scores.data() + from, kKeys, 1},
                   packed.values.data() + (first_tile + tile) * packed.value_size + from * width, width, w.sum.data(),
                   width, n, width, to - from);
  }
  store_rows(a, b, h, row, n, width, w);
}

}  // namespace

void attention(const AttentionArgs& a) {
  const int64_t tiles = tiles_of(a.q_len, kRows), items = a.batch * a.heads * tiles;
  if (items == 0) return;
  if (few_rows(a)) return attention_of_few_rows(a);
  const int threads = threads_for(items * kRows * a.kv_len * a.dim, 1 << 20);
  const Packed packed(a, threads);
  for_each(
      threads, items, [&] { return Workspace(a.dim, packed.width); },
      [&](Workspace& w, int64_t item) {
        attend(a, packed, item / tiles / a.heads, item / tiles % a.heads, item % tiles * kRows, w);
      });
}

}  // namespace genfast
