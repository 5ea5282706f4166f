// What kernels that work in tiles share: memory of the pool, and items that threads take in turn.
#pragma once
#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

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
