// Attention over the keys that a structured mask lets each row see. With t_ij = scale q_i . k_j,
//
//     m_i = max_j t_ij,   l_i = sum_j e^(t_ij - m_i),   o_i = sum_j e^(t_ij - m_i) v_j / l_i,   lse_i = m_i + log l_i,
//
// up to kKeys keys at a time: in place of m_i stands a base that follows it, and when that grows, l_i and o_i are
// scaled down (Dao et al. 2022, arXiv:2205.14135). Keys and values are packed once per key head, as the right sides of
// the two products, and shared by all query heads and tiles of rows. Keys lie vector by vector, so that a tile of rows
// begins with the first vector in which it sees a key, at any offset, and ends with the last; where all its rows see
// all, there is no mask code. A tile of rows is one thread's, from the first key to the last, so that nothing depends
// on the number of threads. With AVX512-BF16, bfloat16 goes into the products as it is: p is then rounded to it, as the
// peers round it.
#include "cpu/attention.h"

#include <cmath>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/attention_cached.h"
#include "cpu/attention_softmax.h"
#include "cpu/small_gemm.h"
#include "cpu/words.h"

namespace genfast {
namespace {

alignas(64) const char kZeros[256 * sizeof(float)] = {};  // a row

// Asks for n rows of a tensor, those that exist, before they are needed: rows of a head are too short, and too far
// apart in some layouts, for the machine to foresee the next tile.
inline void fetch_rows(const Heads& t, int64_t b, int64_t h, int64_t row, int64_t n, int64_t rows, int64_t dim) {
  for (int64_t i = row; i < std::min(row + n, rows); i++) {
    const char* p = row_of(t, b, h, i);
    for (int64_t at = 0; at < dim * size_of(t.dtype); at += 64) __builtin_prefetch(p + at, 0, 2);
  }
}

// Keys and values that some row sees, as words (words.h): keys vector by vector as [words of dim][kLanes], values as
// [words of keys][width]. What no row of a sequence sees counts as zeros, since it may be memory that nobody has
// written. A few key heads at a time have a slot: so they are still in the caches when rows meet them.
template <bool PAIRS>
class Packed {
 public:
  int64_t width, words;

  Packed(const AttentionArgs& a, int64_t slots)
      : width(padded(a.value_dim)),
        words(words_of(PAIRS, a.dim)),
        a_(a),
        vectors_(padded(a.kv_len) / kLanes),
        memory_(slots * vectors_ * size()) {
    for (int64_t b = 0; b < (a.ranges_stride ? a.batch : 1); b++) seen_.emplace_back(a, b, 0, a.q_len);
  }

  // Keys [first, first + kKeys) of a head.
  void pack(int64_t slot, int64_t b, int64_t h, int64_t first) {
    const Sight& sight = seen_[a_.ranges_stride ? b : 0];
    for (const int64_t last = std::min(first + kKeys, sight.end()); first < last; first += kLanes) {
      if (first + kLanes <= sight.begin()) continue;
      const char *k[kLanes], *v[kLanes];
      for (int64_t j = 0; j < kLanes; j++) {
        const bool some = first + j >= sight.begin() && first + j < sight.end();
        k[j] = some ? row_of(a_.k, b, h, first + j) : kZeros, v[j] = some ? row_of(a_.v, b, h, first + j) : kZeros;
      }
      pack_columns<PAIRS>(k, kLanes, kLanes, a_.k.dtype, a_.dim, keys_at(slot, first));
      pack_rows<PAIRS>(v, kLanes, a_.v.dtype, a_.value_dim, width, values_at(slot, first));
    }
  }

  // Of the vector of keys that begins at `key`; its values follow it.
  float* keys_at(int64_t slot, int64_t key) const { return memory_.data() + (slot * vectors_ + key / kLanes) * size(); }
  float* values_at(int64_t slot, int64_t key) const { return keys_at(slot, key) + words * kLanes; }

  // Four cache lines more than there are words: where vectors of keys lie a multiple of 4096 bytes apart, those that
  // meet in a register tile have the same few places in the cache.
  int64_t size() const { return words * kLanes + words_of(PAIRS, kLanes) * width + 64; }

 private:
  const AttentionArgs& a_;
  int64_t vectors_;  // of keys
  Floats memory_;    // one for both: large enough for pages of 2 MiB, which is a tenth of the time
  std::vector<Sight> seen_;
};

struct Workspace {
  Floats q, scores, sum;  // of a tile of rows: [kRows][words], [kRows][kKeys], [kRows][width]
  alignas(64) float base[kRows], total[kRows];
  Softening softening;
  Workspace(int64_t words, int64_t width) : q(kRows * words), scores(kRows * kKeys), sum(kRows * width) {}
};

// What the rows see of the keys from `key` on.
struct SeesSome {
  const int32_t* ranges;
  int64_t step;  // from one row to the next
  int64_t key;

  vf operator()(int64_t i, int64_t k, vf t) const {
    return seen_lanes(ranges + i * step, key + k * kLanes) ? t : splat(-kInfinity);
  }
};

void store_rows(const AttentionArgs& a, int64_t b, int64_t h, int64_t row, int64_t n, int64_t width, Workspace& w) {
  alignas(64) float share[kRows];
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf total = load<vf>(w.total + i);
    store(share + i, splat(1.0f) / (total == 0.0f ? splat(1.0f) : total));
  }
  for (int64_t i = 0; i < n; i++) {
    float* o = w.sum.data() + i * width;
    for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<vf>(o + d) * splat(share[i]));
    store_run(o, a.value_dim, row_of(a.out, b, h, row + i), a.out.dtype);
    a.lse[(b * a.heads + h) * a.q_len + row + i] = w.total[i] == 0 ? -kInfinity : w.base[i] + std::log(w.total[i]);
  }
}

template <bool PAIRS>
void attend(const AttentionArgs& a, const Packed<PAIRS>& packed, int64_t slot, int64_t b, int64_t h, int64_t row,
            int64_t ahead, Workspace& w) {
  const int64_t n = std::min(kRows, a.q_len - row);
  const int64_t width = packed.width, words = packed.words;
  const int32_t all[4] = {0, (int32_t)a.kv_len, 0, 0};
  const SeesSome ranges{a.ranges ? a.ranges + b * a.ranges_stride + row * 4 : all, a.ranges ? 4 : 0, 0};
  for (int64_t i = 0; i < n; i++) to_words<PAIRS>(row_of(a.q, b, h, row + i), a.q.dtype, a.dim, w.q.data() + i * words);
  fetch_rows(a.out, b, h, row, n, a.q_len, a.value_dim);
  fetch_rows(a.q, b, h, row + ahead * kRows, kRows, a.q_len, a.dim);
  std::fill(w.sum.data(), w.sum.data() + n * width, 0.0f);
  std::fill(w.base, w.base + kRows, -kInfinity);
  std::fill(w.total, w.total + kRows, 0.0f);
  const Sight sight(a, b, row, n);
  Span spans[2];
  const int count = sight.spans(spans);
  for (int s = 0; s < count; s++) {
    const auto [begin, end] = spans[s];
    for (int64_t key = begin / kLanes * kLanes; key < end; key += kKeys) {
      const int64_t keys = std::min(kKeys, padded(end - key));
      multiply<PAIRS>(Left{w.q.data(), words, 1}, Right{packed.keys_at(slot, key), kLanes, packed.size()},
                      w.scores.data(), kKeys, n, keys, words, false);
      const auto softened = [&](auto whole, const auto& seen) {
        return soften<PAIRS, whole>(a.scale, n, keys / kLanes, seen, w.scores.data(), w.base, w.total, w.softening);
      };
      const bool grown = !sight.sees_all(key, key + keys)
                             ? softened(std::false_type(), SeesSome{ranges.ranges, ranges.step, key})
                         : keys == kKeys ? softened(std::true_type(), SeesAll())
                                         : softened(std::false_type(), SeesAll());
      if (grown) shrink_rows(w.softening.shrink, n, width, w.sum.data());
      // From the first key to the last that a row sees: the values of others may be anything.
      const int64_t from = std::max<int64_t>(begin - key, 0) / (PAIRS ? 2 : 1),
                    to = words_of(PAIRS, std::min(end - key, kKeys));
      multiply<PAIRS>(Left{w.scores.data() + from, kKeys, 1},
                      Right{packed.values_at(slot, key) + from * width, width, kLanes}, w.sum.data(), width, n, width,
                      to - from, true);
    }
  }
  store_rows(a, b, h, row, n, width, w);
}

// Steps of the work in the order in which threads take them: the keys of head 0; then for each head the keys of the
// next one, and its own tiles of rows. What a step waits for was taken before it, and is seldom not done yet.
template <bool PAIRS>
void attend_all(const AttentionArgs& a) {
  const int64_t tiles = tiles_of(a.q_len, kRows), group = a.heads / a.kv_heads, heads = a.batch * a.kv_heads;
  const int64_t rows = group * tiles, keys = tiles_of(a.kv_len, kKeys), round = rows + keys;
  const int threads = threads_for(heads * rows * kRows * a.kv_len * a.dim, 1 << 20);
  // One is packed and one met, and between them as many as it takes for every thread to have a tile of rows.
  const int64_t slots = std::min(heads, 2 + tiles_of(2 * threads, rows));
  Packed<PAIRS> packed(a, slots);
  std::vector<std::atomic<int64_t>> keys_done(heads), rows_done(heads);
  const auto wait = [](const std::atomic<int64_t>& done, int64_t all) {
    while (done.load(std::memory_order_acquire) < all) std::this_thread::yield();
  };
  const auto pack = [&](int64_t head, int64_t tile) {
    if (head >= slots) wait(rows_done[head - slots], rows);
    packed.pack(head % slots, head / a.kv_heads, head % a.kv_heads, tile * kKeys);
    keys_done[head].fetch_add(1, std::memory_order_release);
  };
  for_each(
      threads, heads * round, [&] { return Workspace(packed.words, packed.width); },
      [&](Workspace& w, int64_t step) {
        if (step < keys) return pack(0, step);
        const int64_t head = (step - keys) / round, next = head + 1 < heads ? keys : 0;
        const int64_t item = step - keys - head * round - next;
        if (item < 0) return pack(head + 1, item + next);
        wait(keys_done[head], keys);
        const int64_t h = head % a.kv_heads * group + item / tiles;
        // Threads take turns, so that the next tile of this one is about as many tiles away as there are threads.
        attend(a, packed, head % slots, head / a.kv_heads, h, item % tiles * kRows, threads, w);
        rows_done[head].fetch_add(1, std::memory_order_release);
      });
}

}  // namespace

void attention(const AttentionArgs& a) {
  if (a.batch * a.heads * a.q_len == 0) return;
  if (few_rows(a)) return attention_of_few_rows(a);
  if (kWordPairs && a.q.dtype == kBFloat16)
    attend_all<kWordPairs>(a);
  else
    attend_all<false>(a);
}

}  // namespace genfast
