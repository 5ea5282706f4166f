// A stand-in for the CUDA runtime that runs kernels on the CPU, for tests on machines with no GPU: the real sources in
// csrc/cuda are compiled against it by a C++ compiler. The threads of a block are fibers that take turns, one block
// after the other; a fiber gives way at barriers and warp exchanges only.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static  // blocks run one at a time, so one copy per kernel is enough
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// --- runtime ---------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = struct Stream*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// --- threads ---------------------------------------------------------------------------------------------------------

namespace host {

// Released once `participants` threads have arrived.
struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier all, some;
  uint64_t slot[32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline int current;
inline const std::function<void()>* body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void wait(Barrier& barrier, int participants) {
  const long mine = barrier.generation;
  if (++barrier.arrived == participants) {
    barrier.arrived = 0;
    barrier.generation++;
  } else {
    while (barrier.generation == mine) yield();
  }
}

inline void enter() {
  (*body)();
  fibers[current].done = true;
  yield();
}

inline Warp& warp() { return warps[current / 32]; }

}  // namespace host

inline dim3 threadIdx, blockIdx;

namespace host {

inline void launch(unsigned grid, int threads, const std::function<void()>& kernel) {
  constexpr size_t kStack = 1 << 16;
  if ((int)fibers.size() < threads) fibers.resize(threads);
  body = &kernel;
  for (unsigned block = 0; block < grid; block++) {
    blockIdx.x = block;
    warps.assign(threads / 32, Warp{});
    block_barrier = Barrier{};
    for (int t = 0; t < threads; t++) {
      Fiber& f = fibers[t];
      if (!f.stack) f.stack.reset(new char[kStack]);
      f.done = false;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = &scheduler;
      makecontext(&f.context, enter, 0);
    }
    for (int left = threads; left > 0;) {
      for (int t = 0; t < threads; t++) {
        if (fibers[t].done) continue;
        current = t;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
        left -= fibers[t].done;
      }
    }
    if (block_barrier.arrived) std::abort();  // a barrier that some threads of the block left out
  }
}

inline int threads_in_block() { return (int)warps.size() * 32; }

// Every lane of `mask` gives a value and sees those of the others.
template <class T>
T exchange(Barrier& barrier, int participants, T value, const std::function<T(const uint64_t*)>& read) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  warp().slot[threadIdx.x % 32] = bits;
  wait(barrier, participants);
  const T result = read(warp().slot);
  wait(barrier, participants);
  return result;
}

template <class T>
T lane_value(const uint64_t* slot, int lane) {
  T value;
  std::memcpy(&value, &slot[lane], sizeof value);
  return value;
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block_barrier, host::threads_in_block()); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % 32, from = lane + delta < 32 ? lane + delta : lane;
  return host::exchange<T>(host::warp().all, 32, value,
                           [=](const uint64_t* slot) { return host::lane_value<T>(slot, from); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % 32, from = lane >= delta ? lane - delta : lane;
  return host::exchange<T>(host::warp().all, 32, value,
                           [=](const uint64_t* slot) { return host::lane_value<T>(slot, from); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int from = (threadIdx.x % 32) ^ mask;
  return host::exchange<T>(host::warp().all, 32, value,
                           [=](const uint64_t* slot) { return host::lane_value<T>(slot, from); });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return host::exchange<unsigned>(host::warp().all, 32, vote, [](const uint64_t* slot) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= (unsigned)(slot[lane] != 0) << lane;
    return votes;
  });
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  return host::exchange<unsigned>(host::warp().some, __popc(mask), (unsigned)value, [=](const uint64_t* slot) {
    unsigned equal = 0;
    for (int lane = 0; lane < 32; lane++)
      if (mask >> lane & 1 && (unsigned)slot[lane] == (unsigned)value) equal |= 1u << lane;
    return equal;
  });
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

// --- arithmetic (compiled with -ffp-contract=off) --------------------------------------------------------------------

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float __uint2float_rn(unsigned v) { return (float)v; }
inline float __int2float_rn(int v) { return (float)v; }

namespace host {
template <class To, class From>
To bits(From v) {
  To to;
  static_assert(sizeof to == sizeof v);
  std::memcpy(&to, &v, sizeof to);
  return to;
}
}  // namespace host

inline int __float_as_int(float v) { return host::bits<int>(v); }
inline unsigned __float_as_uint(float v) { return host::bits<unsigned>(v); }
inline float __int_as_float(int v) { return host::bits<float>(v); }
inline float __uint_as_float(unsigned v) { return host::bits<float>(v); }
inline long long __double_as_longlong(double v) { return host::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return host::bits<double>(v); }
