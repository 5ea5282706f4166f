#include "cpu/pool.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace genfast {
namespace {

constexpr size_t kLine = 64, kHugePage = size_t(2) << 20;

struct Block {
  DLManagedTensor managed;  // first: the deleter gets its address
  int64_t shape[kMaxDims], strides[kMaxDims];
  size_t bytes;
};

struct Pool {
  std::mutex lock;
  std::deque<Block*> idle;  // oldest first
  size_t idle_bytes = 0;
};

// Never destroyed: tensors may outlive everything else at the end of the process.
Pool& pool() {
  static Pool* const p = new Pool;
  return *p;
}

void destroy(Block* b) {
  std::free(b->managed.tensor.data);
  delete b;
}

void put_back(DLManagedTensor* managed) {
  Block* b = reinterpret_cast<Block*>(managed);
  Pool& p = pool();
  std::lock_guard<std::mutex> guard(p.lock);
  p.idle.push_back(b);
  p.idle_bytes += b->bytes;
  while (p.idle.size() > kPoolBlocks || p.idle_bytes > kPoolBytes) {
    Block* oldest = p.idle.front();
    p.idle.pop_front();
    p.idle_bytes -= oldest->bytes;
    destroy(oldest);
  }
}

Block* reuse(size_t bytes) {
  Pool& p = pool();
  std::lock_guard<std::mutex> guard(p.lock);
  // The one dropped last is the likeliest to be in the cache.
  const auto found =
      std::find_if(p.idle.rbegin(), p.idle.rend(), [bytes](const Block* b) { return b->bytes == bytes; });
  if (found == p.idle.rend()) return nullptr;
  Block* b = *found;
  p.idle.erase(std::next(found).base());
  p.idle_bytes -= bytes;
  return b;
}

Block* create(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
  const size_t size = (bytes + alignment - 1) / alignment * alignment;  // a huge page begun is asked for whole
  void* memory = std::aligned_alloc(alignment, size);
  if (!memory) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
  Block* b = new (std::nothrow) Block;
  if (!b) {
    std::free(memory);
    return nullptr;
  }
  b->bytes = bytes;
  b->managed.tensor.data = memory;
  return b;
}

}  // namespace

DLManagedTensor* pool_take(int ndim, const int64_t* shape, uint8_t type_code, uint8_t bits) {
  int64_t count = 1;
  for (int d = 0; d < ndim; d++) count *= shape[d];
  const size_t bytes = ((size_t)count * (bits / 8) + kLine - 1) / kLine * kLine;
  Block* b = reuse(bytes);
  if (!b && !(b = create(bytes))) return nullptr;
  int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; d--) {
    b->shape[d] = shape[d];
    b->strides[d] = stride;
    stride *= shape[d];
  }
  DLManagedTensor& m = b->managed;
  m.major = 1;
  m.minor = 0;
  m.context = nullptr;
  m.deleter = put_back;
  m.flags = 0;
  void* data = m.tensor.data;
  m.tensor = {data, kDLCpu, 0, ndim, type_code, bits, 1, b->shape, b->strides, 0};
  return &m;
}

size_t pool_release() {
  Pool& p = pool();
  std::lock_guard<std::mutex> guard(p.lock);
  const size_t bytes = p.idle_bytes;
  for (Block* b : p.idle) destroy(b);
  p.idle.clear();
  p.idle_bytes = 0;
  return bytes;
}

}  // namespace genfast
