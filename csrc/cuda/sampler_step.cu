// One step of a sampler that is linear in its inputs (genfast/reference/sampler_step.py):
//
//   x_1 <- uncond + g (x_1 - uncond), times the rescale factor
//   x0   = k_x x_0 + k_m x_1, clipped, or thresholded
//   out  = sum_i c_i x_i + c_x0 x0 + c_noise s z,   second = the same with d
//
// A thread takes V neighbouring elements, 16 bytes of the widest common type. With Philox noise it takes V neighbouring
// Philox blocks, which are four such runs 16 elements apart, so that each block is computed once. The grid is one
// dimension over (sample, tile). What a step has is decided at run time, by branches that all threads share; only the
// dtypes of the usual cases are compiled in.
#include <stdexcept>
#include <string>

#include "cuda/element.cuh"
#include "cuda/philox.cuh"
#include "cuda/sampler_step.h"

namespace genfast {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 4;

// Dtypes of (state, history, noise, outputs) and of the model's outputs (conditional, unconditional, variance).
template <int STATE, int MODEL, int VECTOR>
struct Scheme {
  static constexpr int state = STATE, model = MODEL, vector = VECTOR;
};
using Float32 = Scheme<kFloat32, kFloat32, 4>;
using Mixed = Scheme<kFloat32, kBFloat16, 4>;
using BFloat16 = Scheme<kBFloat16, kBFloat16, 8>;
using BFloat16Philox = Scheme<kBFloat16, kBFloat16, 4>;  // V Philox blocks are 4 V words in registers
using Generic = Scheme<kAny, kAny, 4>;
using GenericFloat64 = Scheme<kAny, kAny, 2>;

// The numbers of one sample, in shared memory: the table's row in its own layout, then what else differs per sample.
// Columns that the step does not use may hold anything finite; they are not read.
template <class C>
struct Numbers {
  C row[2 * kMaxInputs + 8], scale, factor, low, high;
};

// All threads of the block call this. A row that does not exist is NaN, and so is every result of its sample.
template <class C>
__device__ __forceinline__ void gather(Numbers<C>& k, const StepArgs& a, const double* row, int64_t sample) {
  const int i = threadIdx.x;
  if (i < 2 * a.inputs + 8) k.row[i] = coefficient<C>(row, i);
  if (i == 32) {
    k.scale = a.uncond.data ? guidance_scale<C>(a, sample) : C(0);
    k.factor = a.factors ? static_cast<const C*>(a.factors)[sample] : C(0);
    k.high = a.x0 == kThreshold ? static_cast<const C*>(a.limits)[sample] : (C)a.high;
    k.low = a.x0 == kThreshold ? -k.high : (C)a.low;
  }
  __syncthreads();
}

// V elements from e on. `normal` is read for Philox noise only.
template <class C, class S>
__device__ __forceinline__ void process(const StepArgs& a, const Numbers<C>& k, int64_t sample, int64_t e, bool wide,
                                        const float (&normal)[S::vector]) {
  constexpr int V = S::vector;
  const int64_t left = a.inner - e;
  if (left <= 0) return;
  const int count = left < V ? (int)left : V, n = a.inputs;
  const C *c = k.row, *d = k.row + n + 2, *to_x0 = k.row + 2 * n + 4, *log_std = k.row + 2 * n + 6;
  const C c_x0 = k.row[n], c_noise = k.row[n + 1], d_x0 = k.row[2 * n + 2], d_noise = k.row[2 * n + 3];
  C z[V], x_t[V], output[V], total[V], total2[V];
#pragma unroll
  for (int i = 0; i < V; i++) {
    z[i] = (C)normal[i];
    x_t[i] = output[i] = total[i] = total2[i] = C(0);
  }
  // In groups: the loads of a group are in flight together, and more would not fit in registers.
#pragma unroll 1
  for (int base = 0; base < n; base += kGroup) {
    C x[kGroup][V];
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      const int i = base + g;
      if (i < n) {
        const int64_t at = sample * a.x[i].batch_stride + e;
        if (i == 1)
          load<S::model>(x[g], a.x[i], at, count, wide);
        else
          load<S::state>(x[g], a.x[i], at, count, wide);
      }
    }
    if (base == 0) {
      if (a.uncond.data) {
        C extra[V];
        load<S::model>(extra, a.uncond, sample * a.uncond.batch_stride + e, count, wide);
#pragma unroll
        for (int i = 0; i < V; i++) {
          x[1][i] = guided(x[1][i], extra[i], k.scale);
          if (a.factors) x[1][i] = mul(x[1][i], k.factor);
        }
      }
      if (a.x0 != kNoX0) {
#pragma unroll
        for (int i = 0; i < V; i++) {
          x_t[i] = x[0][i];
          output[i] = x[1][i];
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++)
      if (base + g < n) {
#pragma unroll
        for (int j = 0; j < V; j++) {
          total[j] = add(total[j], mul(x[g][j], c[base + g]));
          total2[j] = add(total2[j], mul(x[g][j], d[base + g]));
        }
      }
  }
  if (a.x0 != kNoX0) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      C x0 = estimate_x0(x_t[i], output[i], to_x0[0], to_x0[1]);
      // Comparisons, not minimum and maximum: a NaN stays.
      if (a.x0 != kPlain) {
        x0 = x0 < k.low ? k.low : x0;
        x0 = x0 > k.high ? k.high : x0;
        if (a.x0 == kThreshold) x0 = divide(x0, k.high);
      }
      total[i] = add(total[i], mul(x0, c_x0));
      total2[i] = add(total2[i], mul(x0, d_x0));
    }
  }
  if (a.noise_source != kNoNoise) {
    if (a.noise_source == kNoiseTensor) load<S::state>(z, a.noise, sample * a.noise.batch_stride + e, count, wide);
    if (a.log_variance.data) {
      C extra[V];
      load<S::model>(extra, a.log_variance, sample * a.log_variance.batch_stride + e, count, wide);
#pragma unroll
      for (int i = 0; i < V; i++) z[i] = mul(z[i], exponential(add(log_std[0], mul(log_std[1], extra[i]))));
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      total[i] = add(total[i], mul(z[i], c_noise));
      total2[i] = add(total2[i], mul(z[i], d_noise));
    }
  }
  store<S::state>(total, a.out, sample * a.out.batch_stride + e, count, wide);
  if (a.second.data) store<S::state>(total2, a.second, sample * a.second.batch_stride + e, count, wide);
}

// Blocks per multiprocessor that the registers must leave room for: as many as fit without a spill.
template <class S, bool PHILOX>
constexpr int kResident = PHILOX          ? 4
                          : S::vector > 4 ? 5
                                          : 8;

template <class C, class S, bool PHILOX>
__global__ void __launch_bounds__(kThreads, kResident<S, PHILOX>)
    step_kernel(const __grid_constant__ StepArgs a, uint32_t tiles, bool wide) {
  constexpr int V = S::vector;
  const int64_t sample = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  int64_t index;
  const double* row = table_row(a, sample, index);
  __shared__ Numbers<C> k;
  gather(k, a, row, sample);
  const int64_t unit = tile * kThreads + threadIdx.x;
  float z[V] = {};
  if constexpr (!PHILOX) {
    process<C, S>(a, k, sample, unit * V, wide, z);
  } else {
    const int64_t block = unit * V;  // V divides 16, so the V blocks lie in one run
    const int64_t first = (block >> 4) * 64 + (block & 15);
    if (first >= a.inner) return;
    const uint64_t seed = (uint64_t)(a.seeds ? a.seeds[sample * a.seed_stride] : a.seed);
    // A seed of its own makes a row the first sample of that seed.
    const uint32_t counter = a.offset + (uint32_t)(a.seed_stride ? 0 : sample);
    const uint32_t draw = a.stream + (a.step ? (uint32_t)index : 0u);
    uint4 w[V];
#pragma unroll
    for (int i = 0; i < V; i++)
      w[i] = philox((uint32_t)seed, (uint32_t)(seed >> 32),
                    make_uint4((uint32_t)(block + i), (uint32_t)((block + i) >> 32), counter, draw));
    // Rolled loops: the code of a step once, not four times.
#pragma unroll 1
    for (int pair = 0; pair < 2; pair++) {
      float sine[V];
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float2 n = pair ? normal_pair(w[i].z, w[i].w) : normal_pair(w[i].x, w[i].y);
        z[i] = n.x;
        sine[i] = n.y;
      }
#pragma unroll 1
      for (int half = 0; half < 2; half++) {
        process<C, S>(a, k, sample, first + 32 * pair + 16 * half, wide, z);
#pragma unroll
        for (int i = 0; i < V; i++) z[i] = sine[i];
      }
    }
  }
}

template <class C, class S, bool PHILOX>
void launch(const StepArgs& a, cudaStream_t stream) {
  constexpr int V = S::vector;
  bool wide = true;
  for (int i = 0; i < a.inputs; i++) wide &= is_aligned(a.x[i], V, a.batch);
  for (const Operand* o : {&a.uncond, &a.log_variance, &a.noise, &a.out, &a.second}) wide &= is_aligned(*o, V, a.batch);
  // A Philox block is four elements, in units of whole groups of 16 blocks.
  const int64_t units = PHILOX ? (a.inner + 63) / 64 * 16 / V : (a.inner + V - 1) / V;
  const int64_t tiles = (units + kThreads - 1) / kThreads, grid = tiles * a.batch;
  if (grid > INT32_MAX) throw std::runtime_error("sampler_step: the tensors are too large for one CUDA grid");
  step_kernel<C, S, PHILOX><<<(unsigned)grid, kThreads, 0, stream>>>(a, (uint32_t)tiles, wide);
  check(cudaGetLastError(), "the launch of the step kernel failed");
}

template <class C, class S, class PHILOX>
void launch(const StepArgs& a, cudaStream_t stream) {
  if (a.noise_source == kPhilox)
    launch<C, PHILOX, true>(a, stream);
  else
    launch<C, S, false>(a, stream);
}

template <class S>
bool fits(const StepArgs& a) {
  auto is = [](const Operand& o, int dtype) { return !o.data || o.dtype == dtype; };
  bool all = is(a.uncond, S::model) && is(a.log_variance, S::model);
  all = all && is(a.noise, S::state) && is(a.out, S::state) && is(a.second, S::state);
  for (int i = 0; i < a.inputs; i++) all = all && is(a.x[i], i == 1 ? S::model : S::state);
  return all;
}

int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sampler_step: ") + what + ": " + cudaGetErrorString(error));
}

int64_t workspace_bytes(int64_t batch, int64_t inner, bool float64, bool rescale, bool threshold) {
  const int64_t numbers = rounded(batch * (float64 ? 8 : 4));
  int64_t bytes = 0;
  if (rescale) bytes += numbers + rounded(partials_bytes(batch, inner));
  if (threshold) bytes += numbers + rounded(selection_bytes(batch, inner, float64));
  return bytes;
}

void sampler_step(StepArgs a, bool float64, char* workspace, cudaStream_t stream) {
  if (a.batch == 0 || a.inner == 0) return;
  a.factors = a.limits = nullptr;
  const int64_t numbers = rounded(a.batch * (float64 ? 8 : 4));
  if (a.uncond.data && a.rescale != 0) {
    a.factors = workspace;
    workspace += numbers;
    rescale_factors(a, float64, reinterpret_cast<double*>(workspace), stream);
    workspace += rounded(partials_bytes(a.batch, a.inner));
  }
  if (a.x0 == kThreshold) {
    a.limits = workspace;
    threshold_limits(a, float64, workspace + numbers, stream);
  }
  if (float64)
    launch<double, GenericFloat64, GenericFloat64>(a, stream);
  else if (fits<Float32>(a))
    launch<float, Float32, Float32>(a, stream);
  else if (fits<Mixed>(a))
    launch<float, Mixed, Mixed>(a, stream);
  else if (fits<BFloat16>(a))
    launch<float, BFloat16, BFloat16Philox>(a, stream);
  else
    launch<float, Generic, Generic>(a, stream);
}

}  // namespace genfast
