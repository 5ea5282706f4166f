// One step of a sampler that is linear in its inputs (genfast/reference/sampler_step.py is the specification):
//
//   x_1   <- u + g (x_1 - u), times f                       f from per-sample standard deviations (guidance rescale)
//   x0     = k_x x_0 + k_m x_1, limited                     clip, or the exact quantile of |x0| (dynamic threshold)
//   out    = sum_i c_i x_i + c_x0 x0 + c_z s z,  second = the same sums with d
//
// Floor: every input read once, every output written once. A tile of a sample is brought through L1: operands that are
// contiguous and already of the arithmetic's type are read where they lie, the others are converted (or gathered, when
// strided) into a buffer of one tile; guidance, x0 and noise make tiles of their own; then one loop over all of them
// forms both sums. Converting per tile keeps the number of compiled kernels at (terms x outputs x type) instead of its
// power with the dtypes. Statistics over a sample need their own pass, which reads and writes no temporaries.
#include "cpu/sampler_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/dtype.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace genfast {
namespace {

constexpr int64_t kTile = 512;                // elements; a multiple of kGroup, and ten buffers fit L1
constexpr int64_t kPlainTile = 16 * kTile;    // when nothing is buffered: just the unit of work for a thread
constexpr int64_t kGrain = 24 * 1024;         // elements that pay for another thread
constexpr int64_t kMomentChunk = 16 * kTile;  // fixed, so that sums do not depend on the number of threads
constexpr int kMaxTerms = kMaxInputs + 2;

template <class C>
C exponential(C x) {
  return std::exp(x);
}
// Vectorisable: exp(x) = 2^k exp(r), |r| <= ln(2)/2, Taylor to r^7 (3e-8 relative); saturates like expf.
template <>
inline float exponential(float x) {
  const float limited = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float k = std::nearbyint(limited * 1.44269504f);
  const float r = fma1(k, -1.42860677e-6f, fma1(k, -0.693145752f, limited));
  float p = 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma1(p, r, c);
  // Two factors, because 2^k alone leaves the range of normal numbers at both ends.
  const int32_t e = (int32_t)k, half = e >> 1;
  return p * from_bits((uint32_t)(half + 127) << 23) * from_bits((uint32_t)(e - half + 127) << 23);
}

template <class C>
void gather(const Operand& o, const std::vector<int64_t>& sizes, int64_t b, int64_t start, int64_t n, C* to);
template <class C>
void scatter(const C* from, const Operand& o, const std::vector<int64_t>& sizes, int64_t b, int64_t start, int64_t n);

// The elements [start, start + n) of sample b: in place when they can be, else converted into `buffer`.
template <class C>
inline const C* fetch(const Operand& o, const StepArgs& a, int64_t b, int64_t start, int64_t n, C* buffer) {
  if (!o.strides.empty()) {
    gather(o, a.sizes, b, start, n, buffer);
    return buffer;
  }
  const char* p = o.data + (b * o.batch_stride + start) * size_of(o.dtype);
  if (o.dtype == (sizeof(C) == 8 ? kFloat64 : kFloat32)) return reinterpret_cast<const C*>(p);
  load_run(p, o.dtype, n, buffer);
  return buffer;
}

template <class Visit>
inline void for_each_run(const Operand& o, const std::vector<int64_t>& sizes, int64_t b, int64_t start, int64_t n,
                         const Visit& visit) {
  const int dims = (int)sizes.size();
  std::vector<int64_t> index(dims);
  int64_t rest = start, place = b * o.batch_stride;
  for (int d = dims - 1; d >= 0; d--) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    place += index[d] * o.strides[d];
  }
  for (int64_t done = 0; done < n;) {
    const int last = dims - 1;
    const int64_t run = std::min(n - done, sizes[last] - index[last]);
    visit(place, o.strides[last], done, run);
    done += run;
    index[last] += run;
    place += run * o.strides[last];
    for (int d = last; d > 0 && index[d] == sizes[d]; d--) {
      index[d] = 0;
      place += o.strides[d - 1] - sizes[d] * o.strides[d];
      index[d - 1]++;
    }
  }
}

template <class C>
void gather(const Operand& o, const std::vector<int64_t>& sizes, int64_t b, int64_t start, int64_t n, C* to) {
  const int64_t bytes = size_of(o.dtype);
  for_each_run(o, sizes, b, start, n, [&](int64_t place, int64_t stride, int64_t done, int64_t run) {
    if (stride == 1) return load_run(o.data + place * bytes, o.dtype, run, to + done);
    for (int64_t i = 0; i < run; i++) load_run(o.data + (place + i * stride) * bytes, o.dtype, 1, to + done + i);
  });
}

template <class C>
void scatter(const C* from, const Operand& o, const std::vector<int64_t>& sizes, int64_t b, int64_t start, int64_t n) {
  const int64_t bytes = size_of(o.dtype);
  for_each_run(o, sizes, b, start, n, [&](int64_t place, int64_t stride, int64_t done, int64_t run) {
    if (stride == 1) return store_run(from + done, run, o.data + place * bytes, o.dtype);
    for (int64_t i = 0; i < run; i++) store_run(from + done + i, 1, o.data + (place + i * stride) * bytes, o.dtype);
  });
}

// out = sum_t c_t p_t and, if SECOND, second = sum_t d_t p_t. `out` may be one of the p_t: each index is read before it
// is written, and no index reads another.
template <class C, int TERMS, bool SECOND>
void combine(const C* const* p, const C* c, const C* d, C* out, C* second, int64_t n) {
  // Copies, because the compiler must otherwise expect `out` to overwrite the tables.
  C c_[TERMS], d_[TERMS];
  const C* p_[TERMS];
  for (int t = 0; t < TERMS; t++) c_[t] = c[t], d_[t] = d[t], p_[t] = p[t];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    C v = p_[0][i];
    C sum = c_[0] * v, sum2 = SECOND ? d_[0] * v : C(0);
#pragma GCC unroll 10
    for (int t = 1; t < TERMS; t++) {
      v = p_[t][i];
      sum = fma1(c_[t], v, sum);
      if (SECOND) sum2 = fma1(d_[t], v, sum2);
    }
    out[i] = sum;
    if (SECOND) second[i] = sum2;
  }
}

template <class C>
using Combine = void (*)(const C* const*, const C*, const C*, C*, C*, int64_t);

template <class C, bool SECOND>
Combine<C> combine_for(int terms) {
  static constexpr Combine<C> table[kMaxTerms] = {
      combine<C, 1, SECOND>, combine<C, 2, SECOND>,  combine<C, 3, SECOND>, combine<C, 4, SECOND>,
      combine<C, 5, SECOND>, combine<C, 6, SECOND>,  combine<C, 7, SECOND>, combine<C, 8, SECOND>,
      combine<C, 9, SECOND>, combine<C, 10, SECOND>,
  };
  return table[terms - 1];
}

// Everything about one sample that is the same for all of its tiles.
template <class C>
struct Sample {
  int64_t b = -1;
  C c[kMaxTerms], d[kMaxTerms];
  C k_x, k_m, log_offset, log_slope, guidance, factor = 1, low, high, divisor = 1;
  bool draws = false;
  PhiloxKey key{};
  Combine<C> sums;
};

template <class C>
struct Buffers {
  alignas(64) C x[kMaxInputs][kTile], guided[kTile], x0[kTile], z[kTile], other[kTile], out[kTile], second[kTile];
};

template <class C>
class Step {
 public:
  explicit Step(const StepArgs& args)
      : a(args), span(needs_buffers(args) ? kTile : kPlainTile), tiles((args.inner + span - 1) / span) {}

  void run() {
    const bool deviations = a.uncond.data && a.rescale != 0;
    if (deviations) factors.assign(a.batch, C(1));
    if (a.limit == kThreshold) thresholds.assign(a.batch, C(1));
    // Statistics read a sample before its step does. Large samples are taken one by one, so that the second read finds
    // them in the cache; small ones all together, since every round costs a start of the threads.
    const bool one_by_one = (deviations || a.limit == kThreshold) && a.inner >= 2 * kGrain;
    const int64_t samples = one_by_one ? 1 : a.batch;
    const int threads = threads_for(samples * a.inner * (a.philox ? 2 : 1), kGrain);
    for (int64_t b = 0; b < a.batch; b += samples) {
      if (deviations) measure_deviations(b, samples, threads);
      if (a.limit == kThreshold) measure_thresholds(b, samples, threads);
      step(b, samples, threads);
    }
  }

 private:
  const StepArgs& a;
  const int64_t span, tiles;  // elements of a tile, and tiles of a sample
  std::vector<C> factors, thresholds;

  // Whether anything has to be converted or made on the way; a plain linear combination runs straight over memory.
  static bool needs_buffers(const StepArgs& args) {
    bool buffered = args.uncond.data || args.has_x0 || args.philox || args.log_variance.data;
    const auto direct = [](const Operand& o) {
      return !o.data || (o.strides.empty() && o.dtype == (sizeof(C) == 8 ? kFloat64 : kFloat32));
    };
    for (int i = 0; i < args.inputs; i++) buffered |= !direct(args.x[i]);
    return buffered || !direct(args.noise) || !direct(args.out) || !direct(args.second);
  }

  void step(int64_t from, int64_t samples, int threads) const {
    parallel_for(threads, samples * tiles, [&](int64_t first, int64_t last) {
      Buffers<C> buffers;
      Sample<C> sample;
      for (int64_t i = first; i < last; i++) {
        const int64_t b = from + i / tiles, start = i % tiles * span;
        if (b != sample.b) begin(sample, b);
        tile(sample, start, std::min(span, a.inner - start), buffers);
      }
    });
  }

  int64_t row_of(int64_t b) const {
    if (a.row >= 0) return a.row;
    if (a.step) return a.step[a.step_count == 1 ? 0 : b];
    return a.rows == 1 ? 0 : b;
  }

  void begin(Sample<C>& s, int64_t b) const {
    const int n = a.inputs;
    const int64_t row = row_of(b);
    std::vector<double> poison;
    const double* t = a.table + row * (2 * n + 8);
    if (row < 0 || row >= a.rows) {
      poison.assign(2 * n + 8, std::numeric_limits<double>::quiet_NaN());
      t = poison.data();
    }
    s.b = b;
    int terms = n;
    for (int i = 0; i < n; i++) s.c[i] = (C)t[i], s.d[i] = (C)t[n + 2 + i];
    s.k_x = (C)t[2 * n + 4], s.k_m = (C)t[2 * n + 5];
    s.log_offset = (C)t[2 * n + 6], s.log_slope = (C)t[2 * n + 7];
    if (a.has_x0) s.c[terms] = (C)t[n], s.d[terms] = (C)t[2 * n + 2], terms++;
    const C c_noise = (C)t[n + 1], d_noise = (C)t[2 * n + 3];
    // Finite draws with zero weight add nothing, so they need not be made; a given tensor may hold anything.
    s.draws = a.philox && (c_noise != 0 || d_noise != 0 || terms == 0);
    if (s.draws || a.noise.data) s.c[terms] = c_noise, s.d[terms] = d_noise, terms++;
    s.sums = a.second.data ? combine_for<C, true>(terms) : combine_for<C, false>(terms);

    s.guidance = (C)(a.guidances ? a.guidances[a.guidance_count == 1 ? 0 : b] : a.guidance);
    s.factor = factors.empty() ? C(1) : factors[b];
    s.low = (C)a.low, s.high = (C)a.high, s.divisor = C(1);
    if (!thresholds.empty()) s.high = s.divisor = thresholds[b], s.low = -s.high;
    if (a.philox) {
      s.key.seed = (uint64_t)(a.seeds ? a.seeds[a.seed_per_sample ? b : 0] : a.seed);
      s.key.sample = a.offset + (a.seed_per_sample ? 0u : (uint32_t)b);
      s.key.stream = a.stream + (a.row >= 0 ? (uint32_t)a.row : a.step ? (uint32_t)row : 0u);
    }
  }

  // Guidance without the rescaling factor: u + g (m - u).
  void guide(const Sample<C>& s, const C* m, const C* u, int64_t n, C* guided) const {
    for (int64_t i = 0; i < n; i++) guided[i] = fma1(s.guidance, m[i] - u[i], u[i]);
  }

  // The data estimate of a tile, before any limit. p[1] becomes the guided output.
  const C* estimate(const Sample<C>& s, int64_t start, int64_t n, const C** p, Buffers<C>& w) const {
    for (int i = 0; i < a.inputs; i++) p[i] = fetch(a.x[i], a, s.b, start, n, w.x[i]);
    if (a.uncond.data) {
      guide(s, p[1], fetch(a.uncond, a, s.b, start, n, w.other), n, w.guided);
      if (a.rescale != 0) {
        for (int64_t i = 0; i < n; i++) w.guided[i] *= s.factor;
      }
      p[1] = w.guided;
    }
    if (!a.has_x0) return nullptr;
    const C *x = p[0], *m = p[1];
    for (int64_t i = 0; i < n; i++) w.x0[i] = fma1(s.k_x, x[i], s.k_m * m[i]);
    return w.x0;
  }

  void tile(const Sample<C>& s, int64_t start, int64_t n, Buffers<C>& w) const {
    const C* p[kMaxTerms];
    int terms = a.inputs;
    const C* z = s.draws || a.noise.data ? noise(s, start, n, w) : nullptr;
    if (estimate(s, start, n, p, w)) {
      // Written as comparisons that are false for NaN, so that NaN goes through, as in torch.clamp.
      if (a.limit != kNoLimit) {
        for (int64_t i = 0; i < n; i++) {
          C v = w.x0[i] < s.low ? s.low : w.x0[i];
          w.x0[i] = v > s.high ? s.high : v;
        }
      }
      if (a.limit == kThreshold) {
        for (int64_t i = 0; i < n; i++) w.x0[i] = w.x0[i] / s.divisor;
      }
      p[terms++] = w.x0;
    }
    if (z) p[terms++] = z;
    C* out = destination(a.out, s.b, start, w.out);
    C* second = a.second.data ? destination(a.second, s.b, start, w.second) : nullptr;
    s.sums(p, s.c, s.d, out, second, n);
    if (out == w.out) put(w.out, a.out, s.b, start, n);
    if (second == w.second) put(w.second, a.second, s.b, start, n);
  }

  // Asks for the memory of `n` elements from `start` on, of everything that the tile will touch. Always inlined,
  // because gcc takes a function that only prefetches to be pure and drops calls to it.
  template <int WRITE>
  __attribute__((always_inline)) static void prefetch(const Operand& o, int64_t b, int64_t start, int64_t n) {
    if (!o.data || !o.strides.empty()) return;
    const int64_t size = size_of(o.dtype);
    const char *p = o.data + (b * o.batch_stride + start) * size, *end = p + n * size;
    for (; p < end; p += 64) __builtin_prefetch(p, WRITE);
  }
  __attribute__((always_inline)) void prefetch(int64_t b, int64_t start, int64_t n) const {
    for (int i = 0; i < a.inputs; i++) prefetch<0>(a.x[i], b, start, n);
    prefetch<0>(a.uncond, b, start, n);
    prefetch<1>(a.out, b, start, n);
    prefetch<1>(a.second, b, start, n);
  }

  const C* noise(const Sample<C>& s, int64_t start, int64_t n, Buffers<C>& w) const {
    const C* z = w.z;
    if (a.noise.data) {
      z = fetch(a.noise, a, s.b, start, n, w.z);
    } else {
      for (int64_t i = 0; i < n; i += kGroup) {
        // Drawing takes about as long as moving the rest of the step, so let the two overlap: ask for the lines of a
        // group, then compute it. (Asking for the whole tile at once fills the scheduler with waiting prefetches.)
        prefetch(s.b, start + i, std::min<int64_t>(kGroup, n - i));
        if constexpr (sizeof(C) == 4) {
          philox_normal(s.key, (start + i) / kGroup, 1, w.z + i);
        } else {
          alignas(64) float group[kGroup];
          philox_normal(s.key, (start + i) / kGroup, 1, group);
          for (int64_t k = 0; k < kGroup; k++) w.z[i + k] = group[k];
        }
      }
    }
    if (!a.log_variance.data) return z;
    const C* v = fetch(a.log_variance, a, s.b, start, n, w.other);
    for (int64_t i = 0; i < n; i++) w.z[i] = z[i] * exponential(fma1(s.log_slope, v[i], s.log_offset));
    return w.z;
  }

  static C* destination(const Operand& o, int64_t b, int64_t start, C* buffer) {
    if (!o.strides.empty() || o.dtype != (sizeof(C) == 8 ? kFloat64 : kFloat32)) return buffer;
    return reinterpret_cast<C*>(o.data) + b * o.batch_stride + start;
  }

  void put(const C* from, const Operand& o, int64_t b, int64_t start, int64_t n) const {
    if (!o.strides.empty()) return scatter(from, o, a.sizes, b, start, n);
    store_run(from, n, o.data + (b * o.batch_stride + start) * size_of(o.dtype), o.dtype);
  }

  // f = rescale * std(cond) / std(guided) + 1 - rescale. Sums of shifted values and their squares, in the arithmetic's
  // type within a tile and in double across tiles and chunks, in a fixed order.
  void measure_deviations(int64_t from, int64_t samples, int threads) {
    const int64_t chunks = (a.inner + kMomentChunk - 1) / kMomentChunk;
    struct Sums {
      double v[4];
    };
    std::vector<Sums> partial(samples * chunks);
    parallel_for(threads, samples * chunks, [&](int64_t first, int64_t last) {
      Buffers<C> w;
      Sample<C> s;
      for (int64_t i = first; i < last; i++) {
        const int64_t b = from + i / chunks, begins = i % chunks * kMomentChunk;
        if (b != s.b) begin(s, b);
        C shift_m = *fetch(a.x[1], a, b, 0, 1, w.x[0]), shift_g;
        const C first_u = *fetch(a.uncond, a, b, 0, 1, w.other);
        guide(s, &shift_m, &first_u, 1, &shift_g);
        Sums total{};
        for (int64_t start = begins; start < std::min(begins + kMomentChunk, a.inner); start += kTile) {
          const int64_t n = std::min(kTile, a.inner - start);
          const C *m = fetch(a.x[1], a, b, start, n, w.x[1]), *u = fetch(a.uncond, a, b, start, n, w.other);
          C sums[4][16] = {};
          int64_t k = 0;
          for (; k + 16 <= n; k += 16) {
            for (int j = 0; j < 16; j++) {
              const C vm = m[k + j] - shift_m, vg = fma1(s.guidance, m[k + j] - u[k + j], u[k + j]) - shift_g;
              sums[0][j] += vm, sums[1][j] = fma1(vm, vm, sums[1][j]);
              sums[2][j] += vg, sums[3][j] = fma1(vg, vg, sums[3][j]);
            }
          }
          for (; k < n; k++) {
            const C vm = m[k] - shift_m, vg = fma1(s.guidance, m[k] - u[k], u[k]) - shift_g;
            sums[0][0] += vm, sums[1][0] = fma1(vm, vm, sums[1][0]);
            sums[2][0] += vg, sums[3][0] = fma1(vg, vg, sums[3][0]);
          }
          for (int q = 0; q < 4; q++) {
            for (int j = 0; j < 16; j++) total.v[q] += (double)sums[q][j];
          }
        }
        partial[i] = total;
      }
    });
    for (int64_t b = from; b < from + samples; b++) {
      double v[4] = {};
      for (int64_t k = 0; k < chunks; k++) {
        for (int q = 0; q < 4; q++) v[q] += partial[(b - from) * chunks + k].v[q];
      }
      const double count = (double)a.inner;
      const double var_m = (v[1] - v[0] * v[0] / count) / count, var_g = (v[3] - v[2] * v[2] / count) / count;
      // NaN must stay NaN: only a variance that is truly not positive means a constant output.
      const double ratio = var_g <= 0 ? 1.0 : std::sqrt(var_m < 0 ? 0.0 : var_m) / std::sqrt(var_g);
      factors[b] = (C)(a.rescale * ratio + (1.0 - a.rescale));
    }
  }

  using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  static constexpr int kDigits = 11;
  static constexpr int kMagnitudeBits = sizeof(C) * 8 - 1;

  // The magnitudes of x0 over tiles [first, last) of a sample, as unsigned integers in the same order.
  template <class Visit>
  void for_each_magnitude(const Sample<C>& s, int64_t first, int64_t last, Buffers<C>& w, const Visit& visit) const {
    const C* p[kMaxTerms];
    for (int64_t t = first; t < last; t++) {
      const int64_t start = t * kTile, n = std::min(kTile, a.inner - start);
      estimate(s, start, n, p, w);
      for (int64_t i = 0; i < n; i++) {
        Bits u;
        std::memcpy(&u, &w.x0[i], sizeof(C));
        visit(u & ~(Bits(1) << kMagnitudeBits));
      }
    }
  }

  // Radix selection from the top digit down: a histogram of the next digit among the values that share the digits
  // found so far, exact for any distribution. Integer counts, so any split over threads gives the same answer.
  C quantile(int64_t b, int threads) const {
    constexpr Bits kInfinity = sizeof(C) == 8 ? Bits(0x7FF0000000000000ull) : Bits(0x7F800000u);
    Bits prefix = 0;
    int64_t rank = a.below, same = 0;
    for (int shift = kMagnitudeBits; shift > 0;) {
      const int digits = std::min(kDigits, shift);
      const int above = shift;
      shift -= digits;
      const int64_t bins = int64_t(1) << digits;
      std::vector<int64_t> total(bins);
      std::vector<std::vector<int64_t>> counts(threads);
      parallel_for(threads, threads, [&](int64_t first, int64_t last) {
        Buffers<C> w;
        Sample<C> s;
        begin(s, b);
        for (int64_t part = first; part < last; part++) {
          std::vector<int64_t>& mine = counts[part];
          mine.assign(bins, 0);
          const int64_t from = tiles * part / threads, to = tiles * (part + 1) / threads;
          for_each_magnitude(s, from, to, w, [&](Bits u) {
            if ((u >> above) == (prefix >> above)) mine[(u >> shift) & (bins - 1)]++;
          });
        }
      });
      for (const auto& mine : counts) {
        for (int64_t k = 0; k < bins; k++) total[k] += mine[k];
      }
      if (above == kMagnitudeBits) {
        // NaN sort above infinity; one is enough to make the whole sample NaN.
        if (has_nan(b, total, shift, kInfinity, threads)) return std::numeric_limits<C>::quiet_NaN();
      }
      int64_t digit = 0;
      while (rank >= total[digit]) rank -= total[digit++];
      same = total[digit];
      prefix |= Bits(digit) << shift;
    }
    const C low = value_of(prefix);
    const C high = rank + 1 < same || a.below + 1 >= a.inner ? low : value_of(next_above(b, prefix, threads));
    const C weight = (C)a.weight;
    // torch.lerp's two forms, exact at both ends.
    const C q = weight < C(0.5) ? fma1(weight, high - low, low) : high - (high - low) * (C(1) - weight);
    return q < C(1) ? C(1) : (q > (C)a.most ? (C)a.most : q);
  }

  bool has_nan(int64_t b, const std::vector<int64_t>& top, int shift, Bits infinity, int threads) const {
    int64_t candidates = 0;
    for (size_t k = (size_t)(infinity >> shift); k < top.size(); k++) candidates += top[k];
    if (candidates == 0) return false;
    Bits largest = reduce(b, threads, Bits(0), [](Bits m, Bits u) { return u > m ? u : m; });
    return largest > infinity;
  }

  Bits next_above(int64_t b, Bits value, int threads) const {
    return reduce(b, threads, ~Bits(0), [value](Bits m, Bits u) { return u > value && u < m ? u : m; });
  }

  template <class Fold>
  Bits reduce(int64_t b, int threads, Bits start, const Fold& fold) const {
    std::vector<Bits> best(threads, start);
    parallel_for(threads, threads, [&](int64_t first, int64_t last) {
      Buffers<C> w;
      Sample<C> s;
      begin(s, b);
      for (int64_t part = first; part < last; part++) {
        Bits m = start;
        for_each_magnitude(s, tiles * part / threads, tiles * (part + 1) / threads, w, [&](Bits u) { m = fold(m, u); });
        best[part] = m;
      }
    });
    Bits m = start;
    for (Bits other : best) m = fold(m, other);
    return m;
  }

  static C value_of(Bits u) {
    C v;
    std::memcpy(&v, &u, sizeof(C));
    return v;
  }

  void measure_thresholds(int64_t from, int64_t samples, int threads) {
    if (samples < threads) {
      for (int64_t b = from; b < from + samples; b++) thresholds[b] = quantile(b, threads);
      return;
    }
    parallel_for(threads, samples, [&](int64_t first, int64_t last) {
      for (int64_t b = from + first; b < from + last; b++) thresholds[b] = quantile(b, 1);
    });
  }
};

}  // namespace

void sampler_step(const StepArgs& args) {
  if (args.batch * args.inner == 0) return;
  if (args.float64) {
    Step<double>(args).run();
  } else {
    Step<float>(args).run();
  }
}

}  // namespace genfast
