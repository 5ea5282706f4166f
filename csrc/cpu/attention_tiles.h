// What the forward and the backward pass of `attention` share: tiles of rows and keys, memory, what a tile of rows
// sees.
#pragma once
#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/attention.h"
#include "cpu/dtype.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

// Rows and keys of a tile. 32 rows are a block of most block-wise models, so that a tile seldom sees two of them; with
// 64 keys the scores, a packed tile of keys and one of values stay in the first-level cache at 64 numbers a head.
constexpr int64_t kRows = 32, kKeys = 64;
static_assert(kKeys % kLanes == 0 && kRows % kLanes == 0, "tiles are whole vectors");

inline int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Memory of the pool, for floats.
class Floats {
 public:
  explicit Floats(int64_t n) {
    const int64_t shape[1] = {std::max<int64_t>(n, 1)};
    memory_ = pool_take(1, shape, kDLFloat, 32);
    if (!memory_) throw std::bad_alloc();
  }
  ~Floats() { memory_->deleter(memory_); }
  Floats(const Floats&) = delete;
  float* data() const { return static_cast<float*>(memory_->tensor.data); }

 private:
  DLManagedTensor* memory_;
};

inline char* row_of(const Heads& t, int64_t b, int64_t h, int64_t row) {
  return t.data + (b * t.batch_stride + h * t.head_stride + row * t.row_stride) * size_of(t.dtype);
}

// Rows [first, first + n) as floats, each padded with zeros to `width`; rows up to `rows` are zeros.
inline void load_rows(const Heads& t, int64_t b, int64_t h, int64_t first, int64_t n, int64_t rows, int64_t dim,
                      int64_t width, float* to) {
  for (int64_t i = 0; i < n; i++) {
    load_run(row_of(t, b, h, first + i), t.dtype, dim, to + i * width);
    std::fill(to + i * width + dim, to + (i + 1) * width, 0.0f);
  }
  std::fill(to + n * width, to + rows * width, 0.0f);
}

struct Span {
  int64_t begin, end;
};

// The intervals of a tile of rows.
struct Sight {
  // Over the rows, of both intervals: where keys are seen by some row, and where by all.
  int64_t some_begin[2], some_end[2], all_begin[2], all_end[2];

  Sight(const AttentionArgs& a, int64_t b, int64_t first, int64_t n) {
    for (int k = 0; k < 2; k++) {
      some_begin[k] = a.ranges ? a.kv_len : 0, some_end[k] = a.ranges || k ? 0 : a.kv_len;
      all_begin[k] = 0, all_end[k] = a.ranges ? a.kv_len : some_end[k];
    }
    if (!a.ranges) return;
    const int32_t* r = a.ranges + b * a.ranges_stride + first * 4;
    for (int64_t i = 0; i < n; i++, r += 4)
      for (int k = 0; k < 2; k++) {
        const int64_t begin = r[2 * k], end = r[2 * k + 1];
        if (begin < end) {
          some_begin[k] = std::min(some_begin[k], begin), some_end[k] = std::max(some_end[k], end);
          all_begin[k] = std::max(all_begin[k], begin), all_end[k] = std::min(all_end[k], end);
        } else {
          all_end[k] = 0;
        }
      }
  }
  bool sees(int64_t begin, int64_t end) const {
    return (begin < some_end[0] && end > some_begin[0]) || (begin < some_end[1] && end > some_begin[1]);
  }
  bool sees_all(int64_t begin, int64_t end) const {
    return (begin >= all_begin[0] && end <= all_end[0]) || (begin >= all_begin[1] && end <= all_end[1]);
  }
  int64_t begin() const { return std::min(some_begin[0], some_begin[1]); }
  int64_t end() const { return std::max(some_end[0], some_end[1]); }

  // The keys that some row sees, in order: up to two spans that have no vector of keys in common.
  int spans(Span (&to)[2]) const {
    const int first = some_begin[1] < some_begin[0];
    int count = 0;
    for (int k : {first, 1 - first}) {
      const Span span{some_begin[k], some_end[k]};
      if (span.begin >= span.end) continue;
      if (count && span.begin / kLanes * kLanes <= padded(to[0].end))
        to[0].end = std::max(to[0].end, span.end);
      else
        to[count++] = span;
    }
    return count;
  }
};

// Which of the keys [first, first + kLanes) a row sees, as a mask.
inline vi seen_lanes(const int32_t* range, int64_t first) {
  vi at;
  for (int k = 0; k < kLanes; k++) at[k] = k;
  at += (vi{} + (int32_t)first);
  return ((at >= (vi{} + range[0])) & (at < (vi{} + range[1]))) |
         ((at >= (vi{} + range[2])) & (at < (vi{} + range[3])));
}

// body(make(), item) for every item, each by one thread, in any order: what an item computes must not depend on others.
// `make` is called once by each thread.
template <class Make, class Body>
void for_each(int threads, int64_t count, const Make& make, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t first, int64_t last) {
    auto&& workspace = make();
    for (int64_t share = first; share < last; share++)
      for (int64_t item; (item = next.fetch_add(1)) < count;) body(workspace, item);
  });
}

}  // namespace
}  // namespace genfast
