// Attention of a few queries over a long cache of keys and an active block after it. With t_ij = scale q_i . k_j, part
// p of the keys gives row i
//
//     m_p = max_j t_ij,   l_p = sum_j e^(t_ij - m_p),   o_p = sum_j e^(t_ij - m_p) v_j,   and all parts
//     m = max_p m_p,   l = sum_p e^(m_p - m) l_p,   o = sum_p e^(m_p - m) o_p / l,   lse = m + log l.
//
// Keys and values come from memory once: the query heads that share a key head are rows of one product, a tile of keys
// is packed where it is used, and all rows meet it while it is in the first-level cache. What a thread does is a key
// head, up to kChunk rows and a part of the keys; the parts depend on the length of the row and the number of heads,
// not on the threads or the rest of the batch, and are added in order.
#include "cpu/attention_cached.h"

#include <cmath>
#include <vector>

#include "cpu/attention_softmax.h"
#include "cpu/small_gemm.h"
#include "cpu/words.h"

namespace genfast {
namespace {

constexpr int64_t kChunk = 256;     // rows of queries that share a packed tile
constexpr int64_t kPartKeys = 512;  // of a part at the least
constexpr int64_t kParts = 64;      // of all key heads of a sequence, about
constexpr int64_t kStateExtra = 2;  // beside a row's sum: its largest score and its total

// What one thread computes at a time: rows [row, row + rows) of the group of heads that share key head h, over keys
// [begin, end).
struct Item {
  int64_t b, h, row, rows, begin, end, parts;
  int64_t state;  // where the row states of this part begin, in units of rows
};

inline int64_t cached_of(const CachedArgs& a, int64_t b) {
  return std::min(std::max<int64_t>(a.lengths[b], 0), a.capacity);
}

// The rows of q and of the block, rotated if that is asked for, rounded to their dtype as they would be if stored.
class Rotated {
 public:
  Heads q, block_k;

  Rotated(const CachedArgs& a, int threads)
      : q(a.q),
        block_k(a.block_k),
        memory_(a.cos ? (a.batch * (a.heads * a.q_len + a.kv_heads * a.block) * a.dim * size_of(a.q.dtype) + 3) / 4
                      : 0) {
    if (!a.cos) return;
    char* p = reinterpret_cast<char*>(memory_.data());
    place(q, p, a.heads, a.q_len, a.dim);
    place(block_k, p + a.batch * a.heads * a.q_len * a.dim * size_of(a.q.dtype), a.kv_heads, a.block, a.dim);
    const int64_t all = a.heads + (a.block ? a.kv_heads : 0);
    for_each(
        threads, a.batch * all, [] { return 0; },
        [&](int, int64_t item) {
          const int64_t b = item / all, h = item % all;
          if (h < a.heads)
            for (int64_t i = 0; i < a.q_len; i++) rotate(a, b, i, row_of(a.q, b, h, i), row_of(q, b, h, i));
          else
            for (int64_t i = 0; i < a.block; i++)
              rotate(a, b, i, row_of(a.block_k, b, h - a.heads, i), row_of(block_k, b, h - a.heads, i));
        });
  }

 private:
  Floats memory_;

  static void place(Heads& t, char* data, int64_t heads, int64_t length, int64_t dim) {
    t.data = data;
    t.row_stride = dim, t.head_stride = length * dim, t.batch_stride = heads * length * dim;
  }

  static void rotate(const CachedArgs& a, int64_t b, int64_t i, const char* from, char* to) {
    const int64_t half = a.dim / 2, at = std::min(std::max<int64_t>(a.first[b] + i, 0), a.positions - 1) * half;
    const float *cos = a.cos + at, *sin = a.sin + at;
    // Number d of the first halves is x[d * step], its partner lies `apart` from it.
    const int64_t step = a.interleaved ? 2 : 1, apart = a.interleaved ? 1 : half;
    float x[256], y[256];
    load_run(from, a.q.dtype, a.dim, x);
    for (int64_t d = 0; d < half; d++) {
      const float u = x[d * step], v = x[d * step + apart];
      y[d * step] = u * cos[d] - v * sin[d];
      y[d * step + apart] = v * cos[d] + u * sin[d];
    }
    store_run(y, a.dim, to, a.q.dtype);
  }
};

struct Scratch {
  Floats q, keys, values, scores, sum;
  alignas(64) float largest[kChunk], total[kChunk], base[kRows], shrink[kRows], across[kRows * kLanes];
  Scratch(int64_t rows, int64_t words, int64_t width)
      : q(rows * words), keys(words * kKeys), values(kKeys * width), scores(kRows * kKeys), sum(rows * width) {}
};

// Where key j of a row, and its value, are: in the cache up to its length, then in the block.
void locate(const CachedArgs& a, const Heads& block_k, int64_t b, int64_t h, int64_t first, int64_t n,
            const char** keys, const char** values) {
  const int64_t cached = cached_of(a, b);
  for (int64_t i = 0; i < n; i++) {
    const int64_t j = first + i;
    if (j >= cached) {
      keys[i] = row_of(block_k, b, h, j - cached), values[i] = row_of(a.block_v, b, h, j - cached);
    } else if (a.table) {
      const int64_t page = a.table[b * a.table_stride + j / a.page_size], at = j % a.page_size;
      keys[i] = row_of(a.keys, page, h, at), values[i] = row_of(a.values, page, h, at);
    } else {
      keys[i] = row_of(a.keys, b, h, j), values[i] = row_of(a.values, b, h, j);
    }
  }
}

// Scores of n keys to probabilities relative to the largest score so far, in place, or as pairs of bfloat16. What was
// summed before is to be multiplied by `shrink`.
template <bool PAIRS>
void soften(float scale, int64_t rows, int64_t n, float* largest, float* total, Scratch& w) {
  constexpr int kVectors = kKeys / kLanes;
  const vf c = splat(scale), nothing = splat(-kInfinity);
  const int32_t present[4] = {0, (int32_t)n, 0, 0};
  const int64_t groups = tiles_of(rows, kLanes) * kLanes;
  for (int64_t i = 0; i < groups; i++) {
    float* s = w.scores.data() + i * kKeys;
    vf most = nothing;
    for (int k = 0; i < rows && k < kVectors; k++) {
      vf t = load<vf>(s + k * kLanes) * c;
      if (n < kKeys) {
        const vi seen = seen_lanes(present, k * kLanes);
        t = as_float((as_int(t) & seen) | (as_int(nothing) & ~seen));
      }
      store(s + k * kLanes, t);
      most = larger(t, most);
    }
    store(w.across + i * kLanes, most);
  }
  for (int64_t i = 0; i < groups; i += kLanes) {
    const vf before = load<vf>(largest + i);
    const vf now = larger(across(w.across + i * kLanes, larger), before);
    const vi some = now > nothing;
    const vf base = as_float(as_int(now) & some);
    store(largest + i, now);
    store(w.base + i, base);
    store(w.shrink + i, exponential(before - base));
  }
  for (int64_t i = 0; i < groups; i++) {
    float* s = w.scores.data() + i * kKeys;
    vf sum{};
    if (i < rows) {
      const vf base = splat(w.base[i]);
      vf p[kVectors];
      for (int k = 0; k < kVectors; k++) {
        p[k] = exponential(load<vf>(s + k * kLanes) - base);
        sum += p[k];
      }
#if defined(__AVX512BF16__)
      if constexpr (PAIRS)
        for (int k = 0; k < kVectors; k += 2)
          store(s + k / 2 * kLanes, _mm512_cvtne2ps_pbh((__m512)p[k + 1], (__m512)p[k]));
#endif
      if constexpr (!PAIRS)
        for (int k = 0; k < kVectors; k++) store(s + k * kLanes, p[k]);
    }
    store(w.across + i * kLanes, sum);
  }
  for (int64_t i = 0; i < groups; i += kLanes) {
    const vf added = across(w.across + i * kLanes, [](vf a, vf b) { return a + b; });
    store(total + i, load<vf>(total + i) * load<vf>(w.shrink + i) + added);
  }
}

// Leaves the row states of the item in the scratch memory.
template <bool PAIRS>
void attend(const CachedArgs& a, const Rotated& turned, const Item& item, int64_t width, Scratch& w) {
  const int64_t group = a.heads / a.kv_heads, words = words_of(PAIRS, a.dim);
  for (int64_t r = 0; r < item.rows; r++) {
    const int64_t head = item.h * group + (item.row + r) / a.q_len, i = (item.row + r) % a.q_len;
    to_words<PAIRS>(row_of(turned.q, item.b, head, i), a.q.dtype, a.dim, w.q.data() + r * words);
  }
  std::fill(w.sum.data(), w.sum.data() + item.rows * width, 0.0f);
  std::fill(w.largest, w.largest + kChunk, -kInfinity);
  std::fill(w.total, w.total + kChunk, 0.0f);
  for (int64_t first = item.begin; first < item.end; first += kKeys) {
    const int64_t n = std::min(kKeys, item.end - first);
    const char *keys[kKeys], *values[kKeys];
    locate(a, turned.block_k, item.b, item.h, first, n, keys, values);
    pack_columns<PAIRS>(keys, n, kKeys, a.q.dtype, a.dim, w.keys.data());
    pack_rows<PAIRS>(values, n, a.q.dtype, a.value_dim, width, w.values.data());
    for (int64_t row = 0; row < item.rows; row += kRows) {
      const int64_t rows = std::min(kRows, item.rows - row);
      float* sum = w.sum.data() + row * width;
      multiply<PAIRS>(Left{w.q.data() + row * words, words, 1}, Right{w.keys.data(), kKeys, kLanes}, w.scores.data(),
                      kKeys, rows, kKeys, words, false);
      soften<PAIRS>(a.scale, rows, n, w.largest + row, w.total + row, w);
      for (int64_t i = 0; i < rows; i++) {
        if (w.shrink[i] == 1.0f) continue;
        float* o = sum + i * width;
        for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) * splat(w.shrink[i]));
      }
      multiply<PAIRS>(Left{w.scores.data(), kKeys, 1}, Right{w.values.data(), width, kLanes}, sum, width, rows, width,
                      words_of(PAIRS, n), true);
    }
  }
}

// The rows of an item out of the states of `parts` parts, each `apart` floats from the last.
void finish(const CachedArgs& a, const Item& item, int64_t parts, int64_t width, const float* sums,
            const float* largest, const float* total, int64_t apart) {
  const int64_t group = a.heads / a.kv_heads;
  alignas(64) float mean[256];
  for (int64_t r = 0; r < item.rows; r++) {
    const int64_t head = item.h * group + (item.row + r) / a.q_len, i = (item.row + r) % a.q_len;
    float most = -kInfinity, all = 0;
    for (int64_t p = 0; p < parts; p++) most = std::max(most, largest[p * apart + r]);
    const float base = most == -kInfinity ? 0.0f : most;
    std::fill(mean, mean + width, 0.0f);
    for (int64_t p = 0; p < parts; p++) {
      const vf share = exponential(splat(largest[p * apart + r] - base));
      all += share[0] * total[p * apart + r];
      const float* o = sums + p * apart + r * width;
      for (int64_t d = 0; d < width; d += kLanes) store(mean + d, load<vf>(mean + d) + load<vf>(o + d) * share);
    }
    const vf divisor = splat(all == 0 ? 1.0f : all);
    for (int64_t d = 0; d < width; d += kLanes) store(mean + d, load<vf>(mean + d) / divisor);
    store_run(mean, a.value_dim, row_of(a.out, item.b, head, i), a.out.dtype);
    a.lse[(item.b * a.heads + head) * a.q_len + i] = all == 0 ? -kInfinity : most + std::log(all);
  }
}

template <bool PAIRS>
void run(const CachedArgs& a) {
  const int64_t width = padded(a.value_dim), words = words_of(PAIRS, a.dim);
  const int64_t rows = a.heads / a.kv_heads * a.q_len, most_rows = std::min(rows, kChunk);
  std::vector<Item> items, whole;  // whole: the first of the parts of each chunk of rows that has several
  int64_t states = 0, work = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t keys = cached_of(a, b) + a.block;
    const int64_t most = std::min(tiles_of(keys, kPartKeys), tiles_of(kParts, a.kv_heads));
    const int64_t part = tiles_of(tiles_of(keys, std::max<int64_t>(most, 1)), kKeys) * kKeys;
    const int64_t parts = std::max<int64_t>(keys ? tiles_of(keys, part) : 0, 1);
    work += keys * a.heads * a.q_len * a.dim;
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t row = 0; row < rows; row += kChunk) {
        const int64_t count = std::min(kChunk, rows - row);
        for (int64_t p = 0; p < parts; p++) {
          items.push_back({b, h, row, count, p * part, std::min(keys, (p + 1) * part), parts, states});
          if (p == 0 && parts > 1) whole.push_back(items.back());
          if (parts > 1) states += count;
        }
      }
  }
  if (items.empty()) return;
  const int threads = threads_for(work, 1 << 18);
  const Rotated turned(a, threads);
  const int64_t state = width + kStateExtra;
  const Floats kept(states * state);
  for_each(
      threads, (int64_t)items.size(), [&] { return Scratch(most_rows, words, width); },
      [&](Scratch& w, int64_t index) {
        const Item& item = items[index];
        attend<PAIRS>(a, turned, item, width, w);
        if (item.parts == 1) return finish(a, item, 1, width, w.sum.data(), w.largest, w.total, 0);
        float* to = kept.data() + item.state * state;
        std::copy(w.sum.data(), w.sum.data() + item.rows * width, to);
        std::copy(w.largest, w.largest + item.rows, to + item.rows * width);
        std::copy(w.total, w.total + item.rows, to + item.rows * (width + 1));
      });
  for_each(
      threads, (int64_t)whole.size(), [] { return 0; },
      [&](int, int64_t index) {
        const Item& item = whole[index];
        const float* from = kept.data() + item.state * state;
        finish(a, item, item.parts, width, from, from + item.rows * width, from + item.rows * (width + 1),
               item.rows * state);
      });
}

}  // namespace

bool few_rows(const AttentionArgs& a) { return !a.ranges && a.heads / a.kv_heads * a.q_len <= kChunk; }

void attention_of_few_rows(const AttentionArgs& a) {
  const std::vector<int64_t> lengths(a.batch, a.kv_len);
  CachedArgs c;
  c.q = a.q, c.keys = a.k, c.values = a.v, c.out = a.out, c.lse = a.lse, c.lengths = lengths.data();
  c.batch = a.batch, c.heads = a.heads, c.kv_heads = a.kv_heads, c.q_len = a.q_len, c.capacity = a.kv_len;
  c.dim = a.dim, c.value_dim = a.value_dim, c.scale = a.scale;
  attention_cached(c);
}

void attention_cached(const CachedArgs& a) {
  if (a.q_len == 0) return;
  if (kWordPairs && a.q.dtype == kBFloat16)
    run<kWordPairs>(a);
  else
    run<false>(a);
}

}  // namespace genfast
