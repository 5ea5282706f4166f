// Gradients of attention. With p_ij = e^(scale q_i . k_j - lse_i),
//
//     ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i),
//     dv_j = sum_i p_ij do_i,    dk_j = scale sum_i ds_ij q_i,    dq_i = scale sum_j ds_ij k_j.
//
// One walk over the pairs of a tile of keys and a tile of rows gives all three, five products a pair: a tile of keys
// keeps its dk and dv in the cache while all rows that see it go by, and dq grows in memory. The walk of a key head is
// one thread's, so that sums have one order. Where there are few key heads, their keys are divided into some parts with
// a dq each, added up in the end: into how many depends on the shape alone, never on the number of threads.
#include <cmath>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_softmax.h"
#include "cpu/small_gemm.h"
#include "cpu/words.h"

namespace genfast {
namespace {

constexpr int64_t kLeastItems = 16;  // for threads to share

struct Plan {
  int64_t rows, keys, parts;   // tiles of rows and of keys, parts of the keys of a head
  int64_t width, value_width;  // of rows of q, k and of v, do in whole vectors
  int64_t group;               // query heads of a key head
  std::vector<Sight> sights;   // [B or 1, rows]
  int64_t sights_stride;

  explicit Plan(const AttentionArgs& a)
      : rows(tiles_of(a.q_len, kRows)),
        keys(tiles_of(a.kv_len, kKeys)),
        parts(std::min(keys, tiles_of(kLeastItems, a.batch * a.kv_heads))),
        width(padded(a.dim)),
        value_width(padded(a.value_dim)),
        group(a.heads / a.kv_heads),
        sights_stride(a.ranges_stride ? rows : 0) {
    for (int64_t b = 0; b < (a.ranges_stride ? a.batch : 1); b++)
      for (int64_t r = 0; r < rows; r++) sights.emplace_back(a, b, r * kRows, std::min(kRows, a.q_len - r * kRows));
  }
  const Sight& sight(int64_t b, int64_t r) const { return sights[b * sights_stride + r]; }
  // Of one part: dq [B, H, Lq, width].
  int64_t grad_q_size(const AttentionArgs& a) const { return a.batch * a.heads * a.q_len * width; }
};

struct Workspace {
  Floats key_columns, value_columns, key_rows, grad_k, grad_v;  // of a tile of keys
  Floats q, grad_out, scores, products;                         // of a tile of rows
  explicit Workspace(const AttentionArgs& a, const Plan& p)
      : key_columns(a.dim * kKeys),
        value_columns(a.value_dim * kKeys),
        key_rows(kKeys * p.width),
        grad_k(kKeys * p.width),
        grad_v(kKeys * p.value_width),
        q(kRows * p.width),
        grad_out(kRows * p.value_width),
        scores(kRows * kKeys),
        products(kRows * kKeys) {}
};

// do . o and lse of every row [B, H, Lq]; a row that sees nothing gets lse infinity, and so no probabilities. The sums
// are added in the order of the product do v^T: where o is v, their difference is 0 and not a rounding.
void find_sums(const AttentionArgs& a, float* sums, float* lse, int threads) {
  constexpr int64_t kAtOnce = 8;
  for_each(
      threads, a.batch * a.heads, [] { return 0; },
      [&](int, int64_t item) {
        const int64_t b = item / a.heads, h = item % a.heads;
        float o[kAtOnce][256] = {}, g[kAtOnce][256] = {};
        for (int64_t row = 0; row < a.q_len; row += kAtOnce) {
          const int64_t n = std::min(kAtOnce, a.q_len - row), at = item * a.q_len + row;
          for (int64_t i = 0; i < n; i++) {
            load_run(row_of(a.out, b, h, row + i), a.out.dtype, a.value_dim, o[i]);
            load_run(row_of(a.grad_out, b, h, row + i), a.grad_out.dtype, a.value_dim, g[i]);
          }
          float sum[kAtOnce] = {};
          for (int64_t first = 0; first < a.value_dim; first += kLongestSum) {
            float part[kAtOnce] = {};
            for (int64_t d = first; d < std::min(first + kLongestSum, a.value_dim); d++)
              for (int64_t i = 0; i < kAtOnce; i++) part[i] = fma1(g[i][d], o[i][d], part[i]);
            for (int64_t i = 0; i < kAtOnce; i++) sum[i] += part[i];
          }
          for (int64_t i = 0; i < n; i++) {
            sums[at + i] = sum[i];
            lse[at + i] = a.lse[at + i] == -kInfinity ? kInfinity : a.lse[at + i];
          }
        }
      });
}

// Scores to p and products do . v to ds, in place.
void differentiate(const AttentionArgs& a, int64_t b, int64_t row, int64_t n, int64_t key, bool partial,
                   const float* sums, const float* lse, const float* grad_lse, Workspace& w) {
  const int32_t all[4] = {0, (int32_t)a.kv_len, 0, 0};
  const vf scale = splat(a.scale);
  for (int64_t i = 0; i < n; i++) {
    float *s = w.scores.data() + i * kKeys, *g = w.products.data() + i * kKeys;
    const int32_t* range = a.ranges ? a.ranges + b * a.ranges_stride + (row + i) * 4 : all;
    const vf base = splat(lse[i]), own = splat(sums[i]), more = splat(grad_lse ? grad_lse[i] : 0.0f);
    for (int64_t k = 0; k < kKeys; k += kLanes) {
      vf p = exponential(load<vf>(s + k) * scale - base);
      vf ds = p * ((load<vf>(g + k) - own) + more);
      if (partial) {
        const vi seen = seen_lanes(range, key + k);
        p = as_float(as_int(p) & seen), ds = as_float(as_int(ds) & seen);
      }
      store(s + k, p);
      store(g + k, ds);
    }
  }
}

// All rows of the query heads of a key head against one tile of keys.
void walk(const AttentionArgs& a, const Plan& plan, int64_t b, int64_t kv_head, int64_t tile, const float* sums,
          const float* lse, float* grad_q, Workspace& w) {
  const int64_t key = tile * kKeys, keys = std::min(kKeys, a.kv_len - key);
  const char *k_rows[kKeys], *v_rows[kKeys];
  for (int64_t j = 0; j < keys; j++)
    k_rows[j] = row_of(a.k, b, kv_head, key + j), v_rows[j] = row_of(a.v, b, kv_head, key + j);
  pack_columns<false>(k_rows, keys, kKeys, a.k.dtype, a.dim, w.key_columns.data());
  pack_columns<false>(v_rows, keys, kKeys, a.v.dtype, a.value_dim, w.value_columns.data());
  load_rows(a.k, b, kv_head, key, keys, kKeys, a.dim, plan.width, w.key_rows.data());
  std::fill(w.grad_k.data(), w.grad_k.data() + kKeys * plan.width, 0.0f);
  std::fill(w.grad_v.data(), w.grad_v.data() + kKeys * plan.value_width, 0.0f);
  for (int64_t h = kv_head * plan.group; h < (kv_head + 1) * plan.group; h++)
    for (int64_t r = 0; r < plan.rows; r++) {
      const Sight& sight = plan.sight(b, r);
      if (!sight.sees(key, key + keys)) continue;
      const int64_t row = r * kRows, n = std::min(kRows, a.q_len - row), at = (b * a.heads + h) * a.q_len + row;
      load_rows(a.q, b, h, row, n, n, a.dim, plan.width, w.q.data());
      load_rows(a.grad_out, b, h, row, n, n, a.value_dim, plan.value_width, w.grad_out.data());
      multiply<false>(Left{w.q.data(), plan.width, 1}, Right{w.key_columns.data(), kKeys, kLanes}, w.scores.data(),
                      kKeys, n, kKeys, a.dim, false);
      multiply<false>(Left{w.grad_out.data(), plan.value_width, 1}, Right{w.value_columns.data(), kKeys, kLanes},
                      w.products.data(), kKeys, n, kKeys, a.value_dim, false);
      const bool partial = keys < kKeys || !sight.sees_all(key, key + keys);
      differentiate(a, b, row, n, key, partial, sums + at, lse + at, a.grad_lse ? a.grad_lse + at : nullptr, w);
      multiply<false>(Left{w.scores.data(), 1, kKeys}, Right{w.grad_out.data(), plan.value_width, kLanes},
                      w.grad_v.data(), plan.value_width, kKeys, plan.value_width, n, true);
      multiply<false>(Left{w.products.data(), 1, kKeys}, Right{w.q.data(), plan.width, kLanes}, w.grad_k.data(),
                      plan.width, kKeys, plan.width, n, true);
      // As in the forward pass, no key beyond those that a row sees.
      const int64_t from = std::max<int64_t>(sight.begin() - key, 0), to = std::min(keys, sight.end() - key);
      multiply<false>(Left{w.products.data() + from, kKeys, 1},
                      Right{w.key_rows.data() + from * plan.width, plan.width, kLanes}, grad_q + at * plan.width,
                      plan.width, n, plan.width, to - from, true);
    }
  for (int64_t i = 0; i < keys; i++) {
    float* dk = w.grad_k.data() + i * plan.width;
    for (int64_t d = 0; d < plan.width; d += kLanes) store(dk + d, load<vf>(dk + d) * splat(a.scale));
    store_run(dk, a.dim, row_of(a.grad_k, b, kv_head, key + i), a.grad_k.dtype);
    store_run(w.grad_v.data() + i * plan.value_width, a.value_dim, row_of(a.grad_v, b, kv_head, key + i),
              a.grad_v.dtype);
  }
}

// The parts of dq, added in order and scaled.
void store_grad_q(const AttentionArgs& a, const Plan& plan, const float* grad_q, int threads) {
  const int64_t size = plan.grad_q_size(a);
  for_each(
      threads, a.batch * a.heads * plan.rows, [] { return 0; },
      [&](int, int64_t item) {
        const int64_t r = item % plan.rows, h = item / plan.rows % a.heads, b = item / plan.rows / a.heads;
        alignas(64) float sum[256];
        for (int64_t i = r * kRows; i < std::min((r + 1) * kRows, a.q_len); i++) {
          const float* from = grad_q + ((b * a.heads + h) * a.q_len + i) * plan.width;
          for (int64_t d = 0; d < plan.width; d += kLanes) {
            vf total{};
            for (int64_t part = 0; part < plan.parts; part++) total += load<vf>(from + part * size + d);
            store(sum + d, total * splat(a.scale));
          }
          store_run(sum, a.dim, row_of(a.grad_q, b, h, i), a.grad_q.dtype);
        }
      });
}

}  // namespace

void attention_backward(const AttentionArgs& a) {
  if (a.batch == 0) return;
  const Plan plan(a);
  const int threads = threads_for(a.batch * a.heads * a.q_len * a.kv_len * a.dim, 1 << 18);
  const int64_t size = plan.grad_q_size(a), heads = a.batch * a.kv_heads;
  const Floats sums(a.batch * a.heads * a.q_len), lse(a.batch * a.heads * a.q_len), grad_q(plan.parts * size);
  find_sums(a, sums.data(), lse.data(), threads);
  for_each(
      threads, heads * plan.parts, [&] { return Workspace(a, plan); },
      [&](Workspace& w, int64_t item) {
        const int64_t part = item % plan.parts, kv_head = item / plan.parts % a.kv_heads,
                      b = item / plan.parts / a.kv_heads;
        float* own = grad_q.data() + part * size;
        const int64_t first = (b * a.heads + kv_head * plan.group) * a.q_len * plan.width;
        std::fill(own + first, own + first + plan.group * a.q_len * plan.width, 0.0f);
        // Parts take turns: where later keys are seen by fewer rows, all have as much to do.
        for (int64_t tile = part; tile < plan.keys; tile += plan.parts)
          walk(a, plan, b, kv_head, tile, sums.data(), lse.data(), own, w);
      });
  store_grad_q(a, plan, grad_q.data(), threads);
}

}  // namespace genfast
