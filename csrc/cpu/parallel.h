// Threads of the OpenMP runtime that the process already has (the one torch loaded), found by symbol at run time.
// Linking our own libgomp would bring a second thread pool, deaf to torch.set_num_threads.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace genfast {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*max_threads)();
  int (*thread_num)();
  int (*num_threads)();

  OpenMP() {
    find(parallel, "GOMP_parallel");
    find(max_threads, "omp_get_max_threads");
    find(thread_num, "omp_get_thread_num");
    find(num_threads, "omp_get_num_threads");
  }
  bool found() const { return parallel && max_threads && thread_num && num_threads; }
  static const OpenMP& get() {
    static const OpenMP runtime;
    return runtime;
  }

 private:
  template <class F>
  static void find(F& f, const char* name) {
    f = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
};

// Threads worth starting for `work` units when one thread should have at least `grain` of them.
inline int threads_for(int64_t work, int64_t grain) {
  const OpenMP& omp = OpenMP::get();
  if (!omp.found() || work < 2 * grain) return 1;
  const int64_t most = omp.max_threads(), useful = work / grain;
  return (int)(useful < most ? useful : most);
}

// body(first, last) on contiguous shares of [0, count); with one thread it is a plain call.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  if (threads > count) threads = (int)count;
  if (threads <= 1) {
    if (count > 0) body((int64_t)0, count);
    return;
  }
  struct Context {
    const Body* body;
    int64_t count;
  } context{&body, count};
  OpenMP::get().parallel(
      [](void* p) {
        const Context& c = *static_cast<Context*>(p);
        const OpenMP& omp = OpenMP::get();
        const int64_t id = omp.thread_num(), n = omp.num_threads();
        const int64_t first = c.count * id / n, last = c.count * (id + 1) / n;
        if (first < last) (*c.body)(first, last);
      },
      &context, (unsigned)threads, 0);
}

}  // namespace
}  // namespace genfast
