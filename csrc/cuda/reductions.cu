// What a step needs to know about a whole sample: the factor of guidance rescaling, the limit of dynamic thresholding.
//
// Both give the same bits in every run: sums are added in a fixed order, histograms count integers. How many blocks
// share a sample depends on its size alone, so that its result does not depend on the batch around it.
#include <cstring>

#include "cuda/element.cuh"
#include "cuda/sampler_step.h"

namespace genfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kVector = 4;
constexpr int64_t kTile = kThreads * kVector;
constexpr int kMaxParts = 256;
constexpr int kBins = 256;

static_assert(kBins == kThreads, "a thread takes one bin");
static_assert(kMaxParts <= kThreads, "a thread takes one part");

int64_t parts_of(int64_t inner) {
  const int64_t parts = (inner + 4 * kTile - 1) / (4 * kTile);
  return parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts;
}

int64_t tiles_per_part(int64_t inner, int64_t parts) { return (inner + parts * kTile - 1) / (parts * kTile); }

// --- Guidance rescaling: guided * factor, factor = rescale std(cond) / std(guided) + 1 - rescale ---------------------

// Sum over the block, in thread 0.
__device__ double block_sum(double value, double* scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) value += __shfl_down_sync(0xFFFFFFFFu, value, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; warp++) sum += scratch[warp];
  return sum;
}

// Sums of (x - K) and (x - K)^2 in float64; K is the sample's first value, so that the variance of a constant sample
// is exactly 0. partials: [batch, parts, 4].
template <class C>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ StepArgs a, uint32_t parts, int64_t tiles, bool wide, double* partials) {
  __shared__ double scratch[kWarps];
  const int64_t sample = blockIdx.x / parts;
  const uint32_t part = blockIdx.x % parts;
  const int64_t cond = sample * a.x[1].batch_stride, uncond = sample * a.uncond.batch_stride;
  const C scale = guidance_scale<C>(a, sample);
  C first[1], other[1];
  load<kAny>(first, a.x[1], cond, 1, false);
  load<kAny>(other, a.uncond, uncond, 1, false);
  const double shift_cond = first[0], shift_guided = guided(first[0], other[0], scale);
  double sums[4] = {};
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t e = (part * tiles + tile) * kTile + threadIdx.x * kVector, left = a.inner - e;
    if (left <= 0) break;
    const int count = left < kVector ? (int)left : kVector;
    C c[kVector], u[kVector];
    load<kAny>(c, a.x[1], cond + e, count, wide);
    load<kAny>(u, a.uncond, uncond + e, count, wide);
#pragma unroll
    for (int i = 0; i < kVector; i++)
      if (i < count) {
        const double x = (double)c[i] - shift_cond, g = (double)guided(c[i], u[i], scale) - shift_guided;
        sums[0] += x;
        sums[1] = __fma_rn(x, x, sums[1]);
        sums[2] += g;
        sums[3] = __fma_rn(g, g, sums[3]);
      }
  }
  for (int k = 0; k < 4; k++) {
    const double sum = block_sum(sums[k], scratch);
    if (threadIdx.x == 0) partials[(int64_t)blockIdx.x * 4 + k] = sum;
  }
}

template <class C>
__device__ C standard_deviation(double sum, double square, int64_t inner) {
  const double mean = sum / (double)inner, variance = square / (double)inner - mean * mean;
  return root((C)(variance < 0 ? 0 : variance));
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    rescale_kernel(const double* partials, uint32_t parts, int64_t inner, double rescale, C* factors) {
  __shared__ double scratch[kWarps];
  const double* mine = partials + ((int64_t)blockIdx.x * parts + threadIdx.x) * 4;
  double sums[4];
  for (int k = 0; k < 4; k++) sums[k] = block_sum(threadIdx.x < parts ? mine[k] : 0.0, scratch);
  if (threadIdx.x == 0) {
    const C cond = standard_deviation<C>(sums[0], sums[1], inner);
    const C result = standard_deviation<C>(sums[2], sums[3], inner);
    const C ratio = result > 0 ? divide(cond, result) : C(1);
    factors[blockIdx.x] = add(mul((C)rescale, ratio), (C)(1 - rescale));
  }
}

// --- Dynamic thresholding: the exact quantile of |x0| by radix selection ---------------------------------------------
//
// Non-negative floats are ordered as their bits. Every pass keeps the values whose leading bits match the order
// statistic found so far and counts their next 8 bits: 4 passes for float32, 8 for float64. The two order statistics
// that the quantile lies between are followed together; the upper one has a histogram of its own once they part.

template <class C>
constexpr int kPasses = sizeof(C);
template <class C>
using Key = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;

__device__ uint32_t key_of(float v) { return __float_as_uint(v) & 0x7FFFFFFFu; }
__device__ uint64_t key_of(double v) { return (uint64_t)__double_as_longlong(v) & 0x7FFFFFFFFFFFFFFFull; }
__device__ float value_of(uint32_t key) { return __uint_as_float(key); }
__device__ double value_of(uint64_t key) { return __longlong_as_double((int64_t)key); }

// Leading bits of an order statistic, and its rank among the values that share them.
struct Found {
  uint64_t prefix, rank;
};

// Per sample, in global memory. N counts; 32 bits unless a sample has 2^31 elements.
template <class C, class N>
struct Selection {
  N counts[kPasses<C>][2][kBins];
  Found low[kPasses<C>], high[kPasses<C>];  // at [k]: before pass k; [0] is not stored
  N nan;
};

// Add one digit to `found`. All threads of the block call this together; thread t holds the count of bin t.
__device__ Found extend(Found found, uint64_t count, uint64_t* scratch, Found* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t upto = count;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const uint64_t below = __shfl_up_sync(0xFFFFFFFFu, upto, step);
    if (lane >= step) upto += below;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; w++) upto += scratch[w];
  if (upto - count <= found.rank && found.rank < upto)
    *shared = {found.prefix * kBins + threadIdx.x, found.rank - (upto - count)};
  __syncthreads();
  return *shared;
}

struct Pair {
  Found low, high;
};

// Both order statistics after `number` passes.
template <class C, class N>
__device__ Pair narrow_down(const Selection<C, N>& s, int number, int64_t below, int64_t above) {
  __shared__ uint64_t scratch[kWarps];
  __shared__ Found shared[2];
  Pair p{{0, (uint64_t)below}, {0, (uint64_t)above}};
  if (number == 0) return p;
  if (number > 1) p = {s.low[number - 1], s.high[number - 1]};
  const int upper = p.low.prefix == p.high.prefix ? 0 : 1;
  const uint64_t low = s.counts[number - 1][0][threadIdx.x], high = s.counts[number - 1][upper][threadIdx.x];
  p.low = extend(p.low, low, scratch, &shared[0]);
  p.high = extend(p.high, high, scratch, &shared[1]);
  return p;
}

// Count one digit per lane; equal digits of a warp share one atomic, because most values of a sample share theirs.
__device__ __forceinline__ void count_digit(uint32_t* bins, bool counted, int digit) {
  const unsigned active = __ballot_sync(0xFFFFFFFFu, counted);
  if (!counted) return;
  const unsigned peers = __match_any_sync(active, digit);
  if ((threadIdx.x % 32) == __ffs(peers) - 1) atomicAdd(&bins[digit], (uint32_t)__popc(peers));
}

__device__ void add_count(uint32_t* to, uint32_t count) { atomicAdd(to, count); }
__device__ void add_count(unsigned long long* to, uint32_t count) { atomicAdd(to, (unsigned long long)count); }

template <class C, class N>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const __grid_constant__ StepArgs a, uint32_t parts, int64_t tiles, bool wide, int number,
                     Selection<C, N>* selections, int64_t below, int64_t above) {
  __shared__ uint32_t bins[2][kBins];
  const int64_t sample = blockIdx.x / parts;
  const uint32_t part = blockIdx.x % parts;
  Selection<C, N>& s = selections[sample];
  bins[0][threadIdx.x] = bins[1][threadIdx.x] = 0;
  const Pair p = narrow_down(s, number, below, above);
  if (part == 0 && threadIdx.x == 0 && number > 0) {
    s.low[number] = p.low;
    s.high[number] = p.high;
  }
  const bool split = p.low.prefix != p.high.prefix;
  int64_t index;
  const double* row = table_row(a, sample, index);
  const C k_x = coefficient<C>(row, 2 * a.inputs + 4), k_m = coefficient<C>(row, 2 * a.inputs + 5);
  const C scale = a.uncond.data ? guidance_scale<C>(a, sample) : C(0);
  const C factor = a.factors ? static_cast<const C*>(a.factors)[sample] : C(0);
  const int shift = 8 * (kPasses<C> - 1 - number);
  bool nan = false;
  __syncthreads();
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t e = (part * tiles + tile) * kTile + threadIdx.x * kVector, left = a.inner - e;
    const int count = left < 0 ? 0 : left < kVector ? (int)left : kVector;
    C x[kVector], m[kVector], u[kVector];
    load<kAny>(x, a.x[0], sample * a.x[0].batch_stride + e, count, wide);
    load<kAny>(m, a.x[1], sample * a.x[1].batch_stride + e, count, wide);
    if (a.uncond.data) load<kAny>(u, a.uncond, sample * a.uncond.batch_stride + e, count, wide);
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if (a.uncond.data) {
        m[i] = guided(m[i], u[i], scale);
        if (a.factors) m[i] = mul(m[i], factor);
      }
      const C x0 = estimate_x0(x[i], m[i], k_x, k_m);
      nan |= i < count && x0 != x0;
      const Key<C> key = key_of(x0);
      const int digit = (int)(key >> shift) & (kBins - 1);
      // Two shifts, because the first pass would otherwise shift by the width of the type.
      const uint64_t prefix = (key >> shift) >> 8;
      count_digit(bins[0], i < count && prefix == p.low.prefix, digit);
      if (split) count_digit(bins[1], i < count && prefix == p.high.prefix, digit);
    }
  }
  __syncthreads();
  if (bins[0][threadIdx.x]) add_count(&s.counts[number][0][threadIdx.x], bins[0][threadIdx.x]);
  if (bins[1][threadIdx.x]) add_count(&s.counts[number][1][threadIdx.x], bins[1][threadIdx.x]);
  if (number == 0 && nan) s.nan = 1;
}

template <class C, class N>
__global__ void __launch_bounds__(kThreads) limit_kernel(const Selection<C, N>* selections, C* limits, int64_t below,
                                                         int64_t above, double weight, double most) {
  const Selection<C, N>& s = selections[blockIdx.x];
  const Pair p = narrow_down(s, kPasses<C>, below, above);
  if (threadIdx.x) return;
  const C a = value_of((Key<C>)p.low.prefix), b = value_of((Key<C>)p.high.prefix), w = (C)weight, top = (C)most;
  // torch.lerp: from the nearer end, so that both ends are met exactly.
  C limit = w < C(0.5) ? fused(w, add(b, -a), a) : fused(add(w, C(-1)), add(b, -a), b);
  limit = limit < C(1) ? C(1) : limit;
  limit = limit > top ? top : limit;
  limits[blockIdx.x] = s.nan ? (C)__longlong_as_double(0x7FF8000000000000LL) : limit;
}

template <class C, class N>
void select_limits(const StepArgs& a, char* workspace, cudaStream_t stream) {
  auto* selections = reinterpret_cast<Selection<C, N>*>(workspace);
  check(cudaMemsetAsync(selections, 0, sizeof(Selection<C, N>) * a.batch, stream), "clearing the histograms failed");
  bool wide = is_aligned(a.x[0], kVector, a.batch) && is_aligned(a.x[1], kVector, a.batch) &&
              is_aligned(a.uncond, kVector, a.batch);
  const int64_t parts = parts_of(a.inner), tiles = tiles_per_part(a.inner, parts);
  const int64_t above = a.below + 1 < a.inner ? a.below + 1 : a.inner - 1;
  for (int number = 0; number < kPasses<C>; number++)
    histogram_kernel<C, N><<<(unsigned)(a.batch * parts), kThreads, 0, stream>>>(a, (uint32_t)parts, tiles, wide,
                                                                                 number, selections, a.below, above);
  limit_kernel<C, N><<<(unsigned)a.batch, kThreads, 0, stream>>>(selections, static_cast<C*>(a.limits), a.below, above,
                                                                 a.weight, a.most);
  check(cudaGetLastError(), "the launch of the threshold kernels failed");
}

template <class C>
void launch_rescale(const StepArgs& a, double* partials, cudaStream_t stream) {
  const int64_t parts = parts_of(a.inner);
  const bool wide = is_aligned(a.x[1], kVector, a.batch) && is_aligned(a.uncond, kVector, a.batch);
  moments_kernel<C><<<(unsigned)(a.batch * parts), kThreads, 0, stream>>>(
      a, (uint32_t)parts, tiles_per_part(a.inner, parts), wide, partials);
  rescale_kernel<C><<<(unsigned)a.batch, kThreads, 0, stream>>>(partials, (uint32_t)parts, a.inner, a.rescale,
                                                                static_cast<C*>(a.factors));
  check(cudaGetLastError(), "the launch of the rescale kernels failed");
}

bool is_wide(int64_t inner) { return inner >= (int64_t)1 << 31; }

}  // namespace

int64_t partials_bytes(int64_t batch, int64_t inner) { return batch * parts_of(inner) * 4 * (int64_t)sizeof(double); }

int64_t selection_bytes(int64_t batch, int64_t inner, bool float64) {
  const size_t narrow = float64 ? sizeof(Selection<double, uint32_t>) : sizeof(Selection<float, uint32_t>);
  const size_t wide =
      float64 ? sizeof(Selection<double, unsigned long long>) : sizeof(Selection<float, unsigned long long>);
  return batch * (int64_t)(is_wide(inner) ? wide : narrow);
}

void rescale_factors(const StepArgs& a, bool float64, double* partials, cudaStream_t stream) {
  if (float64)
    launch_rescale<double>(a, partials, stream);
  else
    launch_rescale<float>(a, partials, stream);
}

void threshold_limits(const StepArgs& a, bool float64, char* workspace, cudaStream_t stream) {
  if (float64 && is_wide(a.inner))
    select_limits<double, unsigned long long>(a, workspace, stream);
  else if (float64)
    select_limits<double, uint32_t>(a, workspace, stream);
  else if (is_wide(a.inner))
    select_limits<float, unsigned long long>(a, workspace, stream);
  else
    select_limits<float, uint32_t>(a, workspace, stream);
}

}  // namespace genfast
