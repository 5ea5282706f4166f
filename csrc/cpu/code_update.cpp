// `quantize` and its gradients. With e the code of a vector z, rounded to z's dtype, and M the numbers in vectors that
// have one (genfast/reference/code_update.py is the specification):
//
//     losses:    sum (z - e)^2 / M
//     gradient:  to z  g, or |e| / |z| (g - 2 (g w) w + 2 (g q) u), or nothing,  + a 2 (z - e) / M
//                to e  b 2 (e - z) / M, and g where z has nothing
//
// Forward and backward are a pass each over tiles of 16 vectors. A tile adds up its own share of the loss in float64,
// and the shares are added in their order: no result depends on the number of threads. The gradient of the codebook
// keeps what each vector sends to its code and adds by code afterwards, in the order of the vectors.
#include "cpu/code_update.h"

#include <cmath>

#include "cpu/code_segments.h"

namespace genfast {
namespace {

// Rounded to a dtype and back.
void round_to(int dtype, float* row, int64_t size, std::vector<uint16_t>& space) {
  store_run(row, size, space.data(), dtype);
  load_run(space.data(), dtype, size, row);
}

class Gatherer {
 public:
  explicit Gatherer(const QuantizeArgs& args)
      : a_(args), in_(tile_space(args.n.size)), out_(in_.size()), code_(padded(args.n.size)), half_(args.n.size) {}

  // The sum of (z - e)^2 of a tile, and how many of its vectors have a code.
  double run(const Tile& t, int64_t& valid) {
    const int64_t size = a_.n.size, stride = padded(size);
    const Rows z = read_rows(a_.z, t, size, in_);
    const bool in_place = a_.z_q.entry_stride == 1 && a_.z_q.dtype == kFloat32;
    float* target = in_place ? reinterpret_cast<float*>(element(a_.z_q, t)) : out_.data();
    const int64_t target_stride = in_place ? a_.z_q.position_stride : stride;
    double error = 0;
    for (int64_t r = 0; r < t.count; r++) {
      const int64_t position = t.batch * a_.n.length + t.first + r;
      const uint64_t k = (uint64_t)a_.indices[position * a_.n.groups + t.group];
      float* to = target + r * target_stride;
      const float* x = z[r];
      if (k >= (uint64_t)a_.n.codes) {
        if (a_.zeros)
          std::fill(to, to + size, 0.0f);
        else
          std::copy(x, x + size, to);
        continue;
      }
      const int64_t code = t.group * a_.n.codes + (int64_t)k;
      const float* e = find(code);
      error += summed(size, [=](int64_t i) {
        const double difference = (double)(x[i] - e[i]);
        return difference * difference;
      });
      std::copy(e, e + size, to);
      valid++;
      if (a_.counts) __atomic_fetch_add(a_.counts + code, 1, __ATOMIC_RELAXED);
    }
    if (!in_place) write_rows(out_.data(), a_.z_q, t, size);
    return error;
  }

 private:
  const float* find(int64_t code) {
    const char* p = a_.codebook + code * a_.n.size * size_of(a_.codebook_dtype);
    const bool rounds = a_.z.dtype != kFloat32 && a_.z.dtype != a_.codebook_dtype;
    if (a_.codebook_dtype == kFloat32 && !rounds) return reinterpret_cast<const float*>(p);
    load_run(p, a_.codebook_dtype, a_.n.size, code_.data());
    if (rounds) round_to(a_.z.dtype, code_.data(), a_.n.size, half_);
    return code_.data();
  }

  const QuantizeArgs& a_;
  std::vector<float> in_, out_, code_;
  std::vector<uint16_t> half_;
};

double perplexity(const int64_t* counts, int64_t codes) {
  double total = 0, sum = 0;
  for (int64_t k = 0; k < codes; k++) total += (double)counts[k];
  for (int64_t k = 0; k < codes; k++)
    if (counts[k]) sum -= (double)counts[k] / total * std::log((double)counts[k] / total);
  return std::exp(sum);
}

class Backward {
 public:
  Backward(const QuantizeBackwardArgs& args, float* to_codes)
      : a_(args),
        to_codes_(to_codes),
        g_(tile_space(args.n.size)),
        x_(g_.size()),
        e_(g_.size()),
        out_(g_.size()),
        none_(padded(args.n.size)) {
    const double numbers = (double)std::max<int64_t>(*args.valid * args.n.size, 1);
    if (args.grad_losses) {
      to_z_ = (float)(2 * (double)args.grad_losses[0] / numbers);
      to_e_ = (float)(-2 * (double)args.grad_losses[1] / numbers);
    }
  }

  void run(const Tile& t) {
    const int64_t size = a_.n.size, stride = padded(size);
    Rows g{none_.data(), 0};
    if (a_.grad_z_q.data) g = read_rows(a_.grad_z_q, t, size, g_);
    const Rows x = read_rows(a_.z, t, size, x_), e = read_rows(a_.z_q, t, size, e_);
    for (int64_t r = 0; r < t.count; r++) {
      const int64_t at = (t.batch * a_.n.length + t.first + r) * a_.n.groups + t.group;
      const bool there = (uint64_t)a_.indices[at] < (uint64_t)a_.n.codes;
      if (to_codes_ && there) send(g[r], x[r], e[r], to_codes_ + at * size);
      if (!a_.grad_z.data) continue;
      float* to = out_.data() + r * stride;
      if (there)
        pass(g[r], x[r], e[r], to);
      else if (a_.zeros)
        std::fill(to, to + size, 0.0f);
      else
        std::copy(g[r], g[r] + size, to);
    }
    if (a_.grad_z.data) write_rows(out_.data(), a_.grad_z, t, size);
  }

 private:
  void send(const float* g, const float* x, const float* e, float* __restrict to) const {
    const bool whole = a_.gradient == kNoGradient;
    for (int64_t d = 0; d < a_.n.size; d++) to[d] = to_e_ * (x[d] - e[d]) + (whole ? g[d] : 0.0f);
  }

  void pass(const float* g, const float* x, const float* e, float* __restrict to) const {
    const int64_t size = a_.n.size;
    if (a_.gradient == kStraightThrough) {
      for (int64_t d = 0; d < size; d++) to[d] = g[d] + to_z_ * (x[d] - e[d]);
      return;
    }
    if (a_.gradient == kNoGradient || !a_.grad_z_q.data) {
      for (int64_t d = 0; d < size; d++) to[d] = to_z_ * (x[d] - e[d]);
      return;
    }
    const double reach = std::sqrt(dot(e, e, size)), shortest = (double)kShortest;
    const double length = std::max(std::sqrt(dot(x, x, size)), shortest);
    const float to_u = (float)(1 / length), to_q = (float)(1 / std::max(reach, shortest));
    const auto between = [=](int64_t d) { return x[d] * to_u + e[d] * to_q; };  // u + q
    const double norm = std::max(std::sqrt(summed(size,
                                                  [=](int64_t d) {
                                                    const double w = (double)between(d);
                                                    return w * w;
                                                  })),
                                 shortest);
    const double along_w = summed(size, [=](int64_t d) { return (double)g[d] * (double)between(d); });
    const double along_q = dot(g, e, size);
    const double stretch = reach / length;
    const float s = (float)stretch, w = (float)(-2 * stretch * along_w / (norm * norm));
    const float u = (float)(2 * stretch * along_q * (double)to_q) * to_u;
    for (int64_t d = 0; d < size; d++) to[d] = s * g[d] + w * between(d) + u * x[d] + to_z_ * (x[d] - e[d]);
  }

  const QuantizeBackwardArgs& a_;
  float* to_codes_;  // [B, S, G, D], or null
  std::vector<float> g_, x_, e_, out_, none_;
  float to_z_ = 0, to_e_ = 0;
};

void add_by_code(const QuantizeBackwardArgs& a, const float* rows) {
  const CodeSizes& n = a.n;
  const Segments segments(a.indices, n);
  const Vectors v{reinterpret_cast<char*>(const_cast<float*>(rows)),
                  kFloat32,
                  n.length * n.groups * n.size,
                  n.groups * n.size,
                  n.size,
                  1};
  const int64_t bytes = n.size * size_of(a.codebook_dtype);
  const int64_t work = (n.count() + n.codes) * n.groups * n.size;
  parallel_for(threads_for(work, kVectorGrain), n.groups * n.codes, [&](int64_t first, int64_t last) {
    Adder sum(n.size);
    for (int64_t c = first; c < last; c++) {
      const int64_t g = c / n.codes, k = c % n.codes, count = segments.count(g, k);
      if (!count) {
        std::memset(a.grad_codebook + c * bytes, 0, bytes);
        continue;
      }
      sum.clear();
      for (int64_t i = 0; i < count; i++) sum.add(sum.read(v, n, segments.begin(g, k)[i], g));
      store_run(sum.total(), n.size, a.grad_codebook + c * bytes, a.codebook_dtype);
    }
  });
}

}  // namespace

void quantize(const QuantizeArgs& args) {
  const Tiles tiles(args.n);
  if (args.counts) std::fill(args.counts, args.counts + args.n.groups * args.n.codes, int64_t{0});
  std::vector<double> errors(tiles.count());
  int64_t valid = 0;
  const int threads = threads_for(args.n.count() * args.n.groups * args.n.size, kVectorGrain);
  parallel_for(threads, tiles.count(), [&](int64_t first, int64_t last) {
    Gatherer gatherer(args);
    int64_t found = 0;
    for (int64_t t = first; t < last; t++) errors[t] = gatherer.run(tiles.at(t), found);
    __atomic_fetch_add(&valid, found, __ATOMIC_RELAXED);
  });
  double error = 0;
  for (const double e : errors) error += e;
  *args.valid = valid;
  args.losses[0] = args.losses[1] = (float)(error / (double)std::max<int64_t>(valid * args.n.size, 1));
  if (args.counts)
    for (int64_t g = 0; g < args.n.groups; g++)
      args.perplexity[g] = (float)perplexity(args.counts + g * args.n.codes, args.n.codes);
}

void quantize_backward(const QuantizeBackwardArgs& args) {
  const Tiles tiles(args.n);
  const int64_t numbers = args.n.count() * args.n.groups * args.n.size;
  std::vector<float> to_codes(args.grad_codebook ? numbers : 0);
  parallel_for(threads_for(numbers, kVectorGrain), tiles.count(), [&](int64_t first, int64_t last) {
    Backward backward(args, args.grad_codebook ? to_codes.data() : nullptr);
    for (int64_t t = first; t < last; t++) backward.run(tiles.at(t));
  });
  if (args.grad_codebook) add_by_code(args, to_codes.data());
}

}  // namespace genfast
