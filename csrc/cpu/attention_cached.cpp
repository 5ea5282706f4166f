// Attention of a few queries over a long cache of keys and an active block after it. With t_ij = scale q_i . k_j, part
// p of the keys gives row i
//
//     m_p = max_j t_ij,   l_p = sum_j e^(t_ij - m_p),   o_p = sum_j e^(t_ij - m_p) v_j,   and all parts
//     m = max_p m_p,   l = sum_p e^(m_p - m) l_p,   o = sum_p e^(m_p - m) o_p / l,   lse = m + log l.
//
// Keys and values come from memory once: the query heads that share a key head are rows of one product, and all rows
// meet a tile of keys while it is in the first-level cache. Keys are never packed: they are the left side of their
// product, whose lanes are rows of queries, or, of up to kFewest rows, meet them in products of vectors. Scores lie as
// [key][row], so that maxima and sums over keys go from vector to vector. What a thread does is a key head, up to
// kChunk rows and a part of the keys; the parts depend on the length of the row and the number of heads, not on the
// threads or the rest of the batch, and are added in order.
#include "cpu/attention_cached.h"

#include <cmath>
#include <vector>

#include "cpu/attention_softmax.h"
#include "cpu/attention_tiles.h"
#include "cpu/key_product.h"
#include "cpu/rotation.h"

namespace genfast {
namespace {

constexpr int64_t kChunk = 256;          // rows of queries that share a tile of keys
constexpr int64_t kPartKeys = 512;       // of a part at the least
constexpr int64_t kParts = 64;           // of all key heads of a sequence, about
constexpr int64_t kFewest = kLanes / 2;  // rows that do not make a vector
constexpr int64_t kStateExtra = 2;       // beside a row's sum: its largest score and its total

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
        memory_(a.rotation.cos
                    ? (a.batch * (a.heads * a.q_len + a.kv_heads * a.block) * a.dim * size_of(a.q.dtype) + 3) / 4
                    : 0) {
    if (!a.rotation.cos) return;
    char* p = reinterpret_cast<char*>(memory_.data());
    place(q, p, a.heads, a.q_len, a.dim);
    place(block_k, p + a.batch * a.heads * a.q_len * a.dim * size_of(a.q.dtype), a.kv_heads, a.block, a.dim);
    const int64_t all = a.heads + (a.block ? a.kv_heads : 0);
    for_each(
        threads, a.batch * all, [] { return 0; },
        [&](int, int64_t item) {
          const int64_t b = item / all, h = item % all;
          if (h < a.heads)
            turn(a, b, h, a.q_len, a.q, q);
          else
            turn(a, b, h - a.heads, a.block, a.block_k, block_k);
        });
  }

 private:
  Floats memory_;

  static void place(Heads& t, char* data, int64_t heads, int64_t length, int64_t dim) {
    t.data = data;
    t.row_stride = dim, t.head_stride = length * dim, t.batch_stride = heads * length * dim;
  }

  static void turn(const CachedArgs& a, int64_t b, int64_t h, int64_t length, const Heads& from, const Heads& to) {
    const int64_t first = a.rotation.first[b];
    for (int64_t i = 0; i < length; i++)
      rotate(a.rotation, first + i, from.dtype, a.dim, row_of(from, b, h, i), row_of(to, b, h, i));
  }
};

// Memory of one thread. Keys and values have rows here where they are not read as they lie.
struct Scratch {
  Floats q, keys, values, scores, sum;
  const float *key[kKeys + kLanes], *value[kKeys];
  alignas(64) float largest[kChunk], total[kChunk], shrink[kLanes];
  Scratch(int64_t rows, int64_t words, int64_t width)
      : q(tiles_of(rows, kRows) * kRows * words),
        keys(kKeys * words),
        values(kKeys * width),
        scores(kRows * kKeys),
        sum(rows * width) {}
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

// Rows of so many bytes towards the second-level cache.
void fetch(const char* const* rows, int64_t n, int64_t bytes) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows[i] + at, 0, 2);
}

// Rows of whole vectors of words, `words` of them: as they lie, or in `memory`.
template <bool PAIRS>
void rows_of_words(const char* const* rows, int64_t n, int dtype, int64_t dim, int64_t words, float* memory,
                   const float** to) {
  const bool as_stored = words == words_of(PAIRS, dim) && (PAIRS ? dim % 2 == 0 : dtype == kFloat32);
  for (int64_t i = 0; i < n; i++) {
    if (as_stored) {
      to[i] = reinterpret_cast<const float*>(rows[i]);
      continue;
    }
    float* words_of_row = memory + i * words;
    to_words<PAIRS>(rows[i], dtype, dim, words_of_row);
    std::fill(words_of_row + words_of(PAIRS, dim), words_of_row + words, 0.0f);
    to[i] = words_of_row;
  }
}

// What the rows of a sequence see: over the rows, of both intervals, where keys are seen by some row, and where by all.
struct Seen {
  const int32_t* ranges;  // of the first row, or null: all keys
  int64_t some_begin[2], some_end[2], all_begin[2], all_end[2];

  Seen(const CachedArgs& a, int64_t b) : ranges(a.ranges ? a.ranges + b * a.ranges_stride : nullptr) {
    const int64_t keys = cached_of(a, b) + a.block;
    for (int k = 0; k < 2; k++) {
      some_begin[k] = ranges ? keys : 0, some_end[k] = ranges ? 0 : keys;
      all_begin[k] = 0, all_end[k] = keys;
      for (int64_t i = 0; ranges && i < a.q_len; i++) {
        const int64_t begin = ranges[4 * i + 2 * k], end = ranges[4 * i + 2 * k + 1];
        all_begin[k] = std::max(all_begin[k], begin), all_end[k] = std::min(all_end[k], end);
        if (begin < end) some_begin[k] = std::min(some_begin[k], begin), some_end[k] = std::max(some_end[k], end);
      }
    }
  }
  bool some(int64_t first, int64_t last) const {
    return (first < some_end[0] && last > some_begin[0]) || (first < some_end[1] && last > some_begin[1]);
  }
  bool all(int64_t first, int64_t last) const {
    return (first >= all_begin[0] && last <= all_end[0]) || (first >= all_begin[1] && last <= all_end[1]);
  }
  int64_t begin() const { return std::min(some_begin[0], some_begin[1]); }
  int64_t end() const { return std::max(some_end[0], some_end[1]); }
};

// The lanes of a vector of scores are LANES rows of each of kLanes / LANES keys; `combine` goes over the keys.
template <int LANES, class Combine>
inline vf over_keys(vf v, const Combine& combine) {
  if constexpr (LANES < kLanes) {
    vi other;
    for (int j = 0; j < kLanes; j++) other[j] = j ^ LANES;
    return over_keys<2 * LANES>(combine(v, __builtin_shuffle(v, other)), combine);
  }
  return v;
}

// Scores of n keys and LANES rows to probabilities relative to the largest score so far, in place, or as pairs of
// bfloat16 of neighbouring keys. What was summed before is to be multiplied by `shrink`.
template <bool PAIRS, int LANES>
void soften(float scale, int64_t n, float* s, float* largest, float* total, float* shrink) {
  constexpr int kSums = 4;  // at a time, for their latency
  const int64_t vectors = tiles_of(n * LANES, kLanes);
  const vf c = splat(scale), before = load<vf>(largest);
  vf most[kSums], sum[kSums];
  for (int k = 0; k < kSums; k++) most[k] = before, sum[k] = vf{};
  int64_t j = 0;
  for (; j + kSums <= vectors; j += kSums)
    for (int k = 0; k < kSums; k++) most[k] = larger(load<vf>(s + (j + k) * kLanes) * c, most[k]);
  for (; j < vectors; j++) most[0] = larger(load<vf>(s + j * kLanes) * c, most[0]);
  const vf now = over_keys<LANES>(larger(larger(most[0], most[1]), larger(most[2], most[3])), larger);
  const vf base = as_float(as_int(now) & (now > splat(-kInfinity)));
  const auto probability = [&](int64_t j) { return exponential(load<vf>(s + j * kLanes) * c - base); };
  for (j = 0; j + kSums <= vectors; j += kSums) {
    vf p[kSums];
    for (int k = 0; k < kSums; k++) {
      p[k] = probability(j + k);
      sum[k] += p[k];
    }
    for (int k = 0; k < kSums; k++) {
      if constexpr (!PAIRS) store(s + (j + k) * kLanes, p[k]);
      if constexpr (PAIRS)
        if (k % 2) store(s + (j + k) / 2 * kLanes, paired(p[k - 1], p[k]));
    }
  }
  for (; j < vectors; j += PAIRS ? 2 : 1) {
    const vf p = probability(j);
    sum[0] += p;
    if constexpr (!PAIRS) store(s + j * kLanes, p);
    if constexpr (PAIRS) {
      const vf next = j + 1 < vectors ? probability(j + 1) : vf{};
      sum[1] += next;
      store(s + j / 2 * kLanes, paired(p, next));
    }
  }
  const vf fade = exponential(before - base);
  const vf added = over_keys<LANES>((sum[0] + sum[1]) + (sum[2] + sum[3]), [](vf a, vf b) { return a + b; });
  store(largest, now);
  store(shrink, fade);
  store(total, load<vf>(total) * fade + added);
}

// -inf to what rows [row, row + LANES) do not see of keys [first, first + n), and to keys from n on in the last vector;
// scores are then scaled.
template <int LANES>
void hide(const CachedArgs& a, const Seen& seen, int64_t row, int64_t rows, int64_t first, int64_t n, float* s) {
  vi key, begin[2], end[2];
  for (int j = 0; j < kLanes; j++) {
    const int64_t r = row + std::min<int64_t>(j % LANES, rows - 1);
    key[j] = (int32_t)(first + j / LANES);
    for (int k = 0; k < 2; k++) {
      begin[k][j] = seen.ranges ? seen.ranges[r % a.q_len * 4 + 2 * k] : 0;
      end[k][j] =
          (int32_t)std::min<int64_t>(first + n, seen.ranges ? seen.ranges[r % a.q_len * 4 + 2 * k + 1] : first + n);
    }
  }
  for (int64_t j = 0; j < n * LANES; j += kLanes) {
    const vi shown = ((key >= begin[0]) & (key < end[0])) | ((key >= begin[1]) & (key < end[1]));
    const vf t = load<vf>(s + j) * splat(a.scale);
    store(s + j, as_float((as_int(t) & shown) | (as_int(splat(-kInfinity)) & ~shown)));
    key += (vi{} + (int32_t)(kLanes / LANES));
  }
}

// A group of LANES rows from scores to its sum.
template <bool PAIRS, int LANES>
void add_group(const CachedArgs& a, const Seen& seen, const Item& item, int64_t row, int64_t first, int64_t n,
               int64_t width, float* s, Scratch& w) {
  const int64_t rows = std::min<int64_t>(LANES, item.rows - row);
  const bool hidden = n * LANES % kLanes || !seen.all(first, first + n);
  if (hidden) hide<LANES>(a, seen, item.row + row, rows, first, n, s);
  soften<PAIRS, LANES>(hidden ? 1.0f : a.scale, n, s, w.largest + row, w.total + row, w.shrink);
  float* sum = w.sum.data() + row * width;
  for (int64_t i = 0; i < rows; i++) {
    if (w.shrink[i] == 1.0f) continue;
    float* o = sum + i * width;
    for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) * splat(w.shrink[i]));
  }
  value_product<PAIRS>(s, LANES, rows, w.value, words_of(PAIRS, n), width, sum);
}

// Leaves the row states of the item in the scratch memory. Its rows are LANES that do not make a vector; or 0, and
// vectors of rows.
template <bool PAIRS, int LANES>
void attend(const CachedArgs& a, const Rotated& turned, const Item& item, int64_t words, int64_t width, Scratch& w) {
  const int64_t group = a.heads / a.kv_heads;
  const auto query = [&](int64_t r) {
    return row_of(turned.q, item.b, item.h * group + (item.row + r) / a.q_len, (item.row + r) % a.q_len);
  };
  const char* rows[kKeys];
  if constexpr (LANES) {
    std::fill(w.q.data(), w.q.data() + LANES * words, 0.0f);
    for (int64_t r = 0; r < item.rows; r++) to_words<PAIRS>(query(r), a.q.dtype, a.dim, w.q.data() + r * words);
  } else {
    for (int64_t row = 0; row < item.rows; row += kRows) {
      const int64_t n = std::min(kRows, item.rows - row);
      for (int64_t r = 0; r < n; r++) rows[r] = query(row + r);
      pack_columns<PAIRS>(rows, n, kRows, a.q.dtype, a.dim, w.q.data() + row * words);
    }
  }
  std::fill(w.sum.data(), w.sum.data() + item.rows * width, 0.0f);
  std::fill(w.largest, w.largest + kChunk, -kInfinity);
  std::fill(w.total, w.total + kChunk, 0.0f);
  const Seen seen(a, item.b);
  for (int64_t first = item.begin; first < item.end; first += kKeys) {
    const int64_t n = std::min(kKeys, item.end - first);
    if (!seen.some(first, first + n)) continue;
    const char* values[kKeys];
    // The next tile is asked for while vectors of rows are worked on; few rows read so steadily that it would disturb.
    if constexpr (!LANES) {
      const int64_t next = std::min(kKeys, item.end - first - n);
      locate(a, turned.block_k, item.b, item.h, first + n, next, rows, values);
      fetch(rows, next, a.dim * size_of(a.q.dtype));
      fetch(values, next, a.value_dim * size_of(a.q.dtype));
    }
    locate(a, turned.block_k, item.b, item.h, first, n, rows, values);
    rows_of_words<PAIRS>(rows, n, a.q.dtype, a.dim, words, w.keys.data(), w.key);
    std::fill(w.key + n, w.key + n + kLanes, w.key[n - 1]);
    if constexpr (PAIRS && !LANES) {
      pack_rows<true>(values, n, a.q.dtype, a.value_dim, width, w.values.data());
      for (int64_t k = 0; k < words_of(true, n); k++) w.value[k] = w.values.data() + k * width;
    } else {
      rows_of_words<false>(values, n, a.q.dtype, a.value_dim, width, w.values.data(), w.value);
    }
    if constexpr (LANES) {
      key_dots<PAIRS, LANES>(w.key, n, w.q.data(), words, w.scores.data());
      add_group<false, LANES>(a, seen, item, 0, first, n, width, w.scores.data(), w);
    } else {
      for (int64_t row = 0; row < item.rows; row += kRows) {
        const int64_t groups = tiles_of(std::min(kRows, item.rows - row), kLanes), group_size = kKeys * kLanes;
        key_product<PAIRS>(w.key, n, w.q.data() + row * words, kRows, groups, words, w.scores.data(), group_size);
        for (int64_t g = 0; g < groups; g++)
          add_group<PAIRS, kLanes>(a, seen, item, row + g * kLanes, first, n, width, w.scores.data() + g * group_size,
                                   w);
      }
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
  const int64_t rows = a.heads / a.kv_heads * a.q_len, most_rows = std::min(rows, kChunk);
  // Of heads of one vector a product's sum across lanes would cost more than the lanes left empty.
  const bool fewest = rows <= kFewest && words_of(PAIRS, a.dim) > kLanes;
  const int64_t width = padded(a.value_dim), words = fewest ? padded(words_of(PAIRS, a.dim)) : words_of(PAIRS, a.dim);
  std::vector<Item> items, whole;  // whole: the first of the parts of each chunk of rows that has several
  int64_t states = 0, work = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    const Seen seen(a, b);
    const int64_t begin = seen.begin(), end = seen.end(), keys = std::max<int64_t>(end - begin, 0);
    const int64_t most = std::min(tiles_of(keys, kPartKeys), tiles_of(kParts, a.kv_heads));
    const int64_t part = tiles_of(tiles_of(keys, std::max<int64_t>(most, 1)), kKeys) * kKeys;
    const int64_t parts = std::max<int64_t>(keys ? tiles_of(keys, part) : 0, 1);
    work += keys * a.heads * a.q_len * a.dim;
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t row = 0; row < rows; row += kChunk) {
        const int64_t count = std::min(kChunk, rows - row);
        for (int64_t p = 0; p < parts; p++) {
          items.push_back({b, h, row, count, begin + p * part, std::min(end, begin + (p + 1) * part), parts, states});
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
  const auto attend = !fewest                   ? genfast::attend<PAIRS, 0>
                      : rows == 1               ? genfast::attend<PAIRS, 1>
                      : rows == 2               ? genfast::attend<PAIRS, 2>
                      : rows <= 4 || kLanes < 8 ? genfast::attend<PAIRS, std::min(kLanes / 2, 4)>
                                                : genfast::attend<PAIRS, kLanes / 2>;
  for_each(
      threads, (int64_t)items.size(), [&] { return Scratch(most_rows, words, width); },
      [&](Scratch& w, int64_t index) {
        const Item& item = items[index];
        attend(a, turned, item, words, width, w);
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

bool few_rows(const AttentionArgs& a) { return a.heads / a.kv_heads * a.q_len <= kChunk; }

void attention_of_few_rows(const AttentionArgs& a) {
  const std::vector<int64_t> lengths(a.batch, a.kv_len);
  CachedArgs c;
  c.q = a.q, c.keys = a.k, c.values = a.v, c.out = a.out, c.lse = a.lse, c.lengths = lengths.data();
  c.batch = a.batch, c.heads = a.heads, c.kv_heads = a.kv_heads, c.q_len = a.q_len, c.capacity = a.kv_len;
  c.dim = a.dim, c.value_dim = a.value_dim, c.scale = a.scale;
  c.ranges = a.ranges, c.ranges_stride = a.ranges_stride;
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
