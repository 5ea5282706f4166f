// Lookup-free and binary spherical quantisation (Yu et al. 2023, Zhao et al. 2024), with the losses of their softmax
// over all 2^block codes. genfast/reference/scalar_quantize.py is the specification.
//
// p(code) is a product over bits, so it is A[high bits] B[low bits] with two factors of about 2^(block / 2) numbers,
// which are made by doubling. Sums over codes run over the high halves, and inside over vectors of low halves. Most
// bits of a trained quantiser are certain: then nearly all A are 0 and are passed over, and a row costs about
// 2^(block / 2), not 2^block. In the backward pass, with g = dL/dp, the two marginals of p g
//     V[high] = sum_low B g,   U[low] = sum_high A g
// give for each bit the sums over the codes that have it (one) and that have not (zero), and the gradient of its logit
// is q0 one - q1 zero.
//
// Rows are shared out into a number of chunks that depends on the shape only; each has sums of its own, in float64,
// which are added in order. So the result depends on no thread.
#include <cmath>
#include <vector>

#include "cpu/exponential.h"
#include "cpu/scalar_quantize.h"
#include "cpu/scalar_tiles.h"

namespace genfast {
namespace {

constexpr float kShortest = 1e-12f;
// Probabilities below are 0. NaN is not below.
constexpr float kNothing = 8.7e-27f;
// Chunks at the most, and numbers of all their sums together (16 MB).
constexpr int64_t kChunks = 64, kCells = 1 << 21;

float sum_of(vf v) {
  float s = 0;
  for (int k = 0; k < kLanes; k++) s += v[k];
  return s;
}
vf magnitude_of(vf x) { return as_float(as_int(x) & 0x7FFFFFFF); }
vf only(vi where, vf x) { return as_float(as_int(x) & where); }

// How the bits of a block are halved. Low halves are padded to whole vectors, which only a block of few bits needs.
struct Halves {
  explicit Halves(int64_t bits) {
    low = std::min(bits, std::max<int64_t>(4, (bits + 1) / 2));
    high = bits - low;
    lows = int64_t(1) << low, highs = int64_t(1) << high;
    width = std::max<int64_t>(lows, kLanes);
  }
  int64_t low, high, lows, highs, width;
};

// The products over bits of numbers [bits] with a stride, the first bit being the highest; `sum` for logarithms.
template <bool SUM>
void double_up(const float* zero, const float* one, int64_t stride, int64_t bits, float* out) {
  out[0] = SUM ? 0.0f : 1.0f;
  int64_t n = 1;
  for (int64_t d = bits - 1; d >= 0; d--, n *= 2) {
    const float z = zero[d * stride], o = one[d * stride];
    for (int64_t i = 0; i < n; i++) {
      out[n + i] = SUM ? out[i] + o : out[i] * o;
      out[i] = SUM ? out[i] + z : out[i] * z;
    }
  }
}

// A tile of rows: numbers, and what their bits' probabilities are; all [D][kTile].
struct Rows {
  explicit Rows(const BinaryArgs& a, const Halves& h)
      : u(a.shape.size * kTile),
        logit(u.size()),
        q0(u.size()),
        q1(u.size()),
        log_q0(u.size()),
        log_q1(u.size()),
        high(h.highs),
        low(h.width),
        log_high(h.highs),
        log_low(h.width),
        along_low(h.width),
        along_high(h.highs) {}

  std::vector<float> u, logit, q0, q1, log_q0, log_q1;
  std::vector<float> high, low, log_high, log_low, along_low, along_high;  // of one row and block
  alignas(64) float length[kTile];                                         // before rows were normalised
  alignas(64) int32_t counts[kTile];  // -1 where a row counts in the losses, otherwise 0

  void load_rows(const BinaryArgs& a, const Tile& t) {
    const int64_t size = a.shape.size;
    for (int64_t d = 0; d < size; d++) load_numbers(a.z, t, d, &u[d * kTile]);
    if (a.normalise)
      for (int64_t i = 0; i < kTile; i += kLanes) {
        vf squares{};
        for (int64_t d = 0; d < size; d++) {
          const vf x = load<vf>(&u[d * kTile + i]);
          squares += x * x;
        }
        const vf norm = square_root(squares), below = norm < splat(kShortest) ? splat(kShortest) : norm;
        store(length + i, norm);
        for (int64_t d = 0; d < size; d++)
          store(&u[d * kTile + i], load<vf>(&u[d * kTile + i]) / below * splat(a.radius));
      }
    for (int64_t i = 0; i < kTile; i++) {
      const int64_t at = t.batch * a.mask_stride[0] + (t.first + i) * a.mask_stride[1];
      counts[i] = i < t.count && (!a.mask || a.mask[at]) ? -1 : 0;
    }
  }

  void load_bits(const BinaryArgs& a) {
    const vf by = splat(a.chain), one = splat(1.0f);
    for (size_t i = 0; i < u.size(); i += kLanes) {
      const vf l = load<vf>(&u[i]) * by, size = magnitude_of(l), e = exponential(-size);
      const vf likely = one / (one + e), unlikely = e / (one + e), log = log_one_plus(e);
      const vi up = l > vf{};
      store(&logit[i], l);
      store(&q1[i], up ? likely : unlikely);
      store(&q0[i], up ? unlikely : likely);
      store(&log_q1[i], up ? -log : -log - size);
      store(&log_q0[i], up ? -log - size : -log);
    }
  }

  // The factors of row i's probabilities of block j.
  void load_block(const BinaryArgs& a, const Halves& h, int64_t i, int64_t j) {
    const int64_t at = j * a.block * kTile + i, low_at = at + h.high * kTile;
    double_up<false>(&q0[at], &q1[at], kTile, h.high, high.data());
    double_up<false>(&q0[low_at], &q1[low_at], kTile, h.low, low.data());
    std::fill(low.begin() + h.lows, low.end(), 0.0f);
    if (a.least == 0) return;
    double_up<true>(&log_q0[at], &log_q1[at], kTile, h.high, log_high.data());
    double_up<true>(&log_q0[low_at], &log_q1[low_at], kTile, h.low, log_low.data());
    std::fill(log_low.begin() + h.lows, log_low.end(), 0.0f);
  }
};

int64_t counted_rows(const BinaryArgs& a) {
  if (!a.mask) return a.shape.batch * a.shape.rows;
  int64_t n = 0;
  for (int64_t b = 0; b < a.shape.batch; b++)
    for (int64_t s = 0; s < a.shape.rows; s++) n += a.mask[b * a.mask_stride[0] + s * a.mask_stride[1]] != 0;
  return n;
}

void store_codes(const BinaryArgs& a, const Tile& t, const Rows& rows) {
  alignas(64) float code[kTile];
  int64_t index[kTile] = {};
  bool bad[kTile] = {};
  for (int64_t d = 0; d < a.shape.size; d++) {
    const float* u = &rows.u[d * kTile];
    for (int64_t i = 0; i < kTile; i++) {
      index[i] = index[i] * 2 + (u[i] > 0);
      bad[i] |= u[i] != u[i];
      code[i] = u[i] != u[i] ? u[i] : u[i] > 0 ? a.magnitude : -a.magnitude;
    }
    store_numbers(code, a.codes, t, d);
  }
  int64_t* to = index_of(a.indices, a.shape, t);
  for (int64_t i = 0; i < t.count; i++) to[i * a.shape.groups] = bad[i] ? -1 : index[i];
}

struct Sums {
  double entropies = 0, squares = 0;
};

// Adds a tile's entropies of bits and squared distances.
void add_numbers(const BinaryArgs& a, const Rows& rows, Sums& sums) {
  vf entropies{}, squares{};
  for (int64_t d = 0; d < a.shape.size; d++)
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const int64_t at = d * kTile + i;
      const vi counts = load<vi>(rows.counts + i);
      const vf u = load<vf>(&rows.u[at]), off = u > vf{} ? u - splat(a.magnitude) : u + splat(a.magnitude);
      squares += only(counts, off * off);
      if (a.least) continue;
      // - q0 log q0 - q1 log q1: the two logarithms differ by the logit, whose sign is that of the likelier bit.
      const vf l = load<vf>(&rows.logit[at]), size = magnitude_of(l);
      const vf q0 = load<vf>(&rows.q0[at]), q1 = load<vf>(&rows.q1[at]), unlikely = q0 < q1 ? q0 : q1;
      const vf log = load<vf>(&rows.log_q1[at]) > load<vf>(&rows.log_q0[at]) ? load<vf>(&rows.log_q1[at])
                                                                             : load<vf>(&rows.log_q0[at]);
      const vf rest = unlikely * size;
      // 0 times infinity is 0 here; NaN stays.
      entropies += only(counts, only(~(unlikely == vf{}), rest) - log);
    }
  sums.entropies += total(entropies);
  sums.squares += total(squares);
}

// Adds a row's probabilities of a block to `cells`; returns sum p log max(p, least) if there is a least.
double add_codes(const BinaryArgs& a, const Halves& h, const Rows& rows, double* cells) {
  const vf low = splat(a.least ? std::log(a.least) : 0.0f);
  double all = 0;
  for (int64_t k = 0; k < h.highs; k++) {
    const float p = rows.high[k];
    if (p < kNothing) continue;
    double* to = cells + k * h.width;
    for (int64_t i = 0; i < h.width; i++) to[i] += (double)(p * rows.low[i]);
    if (a.least == 0) continue;
    const vf log_p = splat(rows.log_high[k]);
    vf weighted{};
    for (int64_t i = 0; i < h.width; i += kLanes)
      weighted += splat(p) * load<vf>(&rows.low[i]) * larger(low, log_p + load<vf>(&rows.log_low[i]));
    all += (double)sum_of(weighted);
  }
  return all;
}

// The marginals of p g over the halves. Each is g summed over the other half, weighted with that half's factor.
void marginals(const BinaryArgs& a, const Halves& h, Rows& rows, const float* grad_mean, float by_mean,
               float by_entropy) {
  const vf low = splat(a.least ? std::log(a.least) : 0.0f), by = splat(by_mean), less = splat(-by_entropy);
  std::fill(rows.along_low.begin(), rows.along_low.end(), 0.0f);
  for (int64_t k = 0; k < h.highs; k++) {
    rows.along_high[k] = 0;
    const float p = rows.high[k];
    if (p < kNothing) continue;
    const vf factor = splat(p), log_p = splat(rows.log_high[k]);
    vf sum{};
    for (int64_t i = 0; i < h.width; i += kLanes) {
      vf g = grad_mean ? load<vf>(grad_mean + k * h.width + i) * by : vf{};
      if (a.least) {
        const vf log = log_p + load<vf>(&rows.log_low[i]);
        g += less * (larger(low, log) + only(log >= low, splat(1.0f)));
      }
      sum += load<vf>(&rows.low[i]) * g;
      store(&rows.along_low[i], load<vf>(&rows.along_low[i]) + factor * g);
    }
    rows.along_high[k] = p * sum_of(sum);
  }
  for (int64_t i = 0; i < h.width; i += kLanes)
    store(&rows.along_low[i], load<vf>(&rows.along_low[i]) * load<vf>(&rows.low[i]));
}

// Adds the gradients of the logits of bits [first, first + bits) of row i, from a marginal, which is used up.
void add_bits(const Rows& rows, float* marginal, int64_t first, int64_t bits, int64_t i, float by, float* grad) {
  for (int64_t d = first, n = int64_t(1) << bits; n > 1; d++) {
    n /= 2;
    double zero = 0, one = 0;
    for (int64_t k = 0; k < n; k++) {
      zero += (double)marginal[k], one += (double)marginal[n + k];
      marginal[k] += marginal[n + k];
    }
    const int64_t at = d * kTile + i;
    grad[at] += by * (float)((double)rows.q0[at] * one - (double)rows.q1[at] * zero);
  }
}

// Work of the losses of a row, in numbers.
int64_t row_cost(const BinaryArgs& a, const Halves& h) {
  return a.shape.groups * (a.shape.size * 4 + (a.block ? a.shape.size / a.block * (h.highs + 4 * h.width) : 0));
}

}  // namespace

void binary_quantize(const BinaryArgs& a) {
  const Tiles tiles(a.shape);
  if (!a.mean) {
    parallel_for(threads_of(a.shape), tiles.count, [&](int64_t begin, int64_t end) {
      Rows rows(a, Halves(0));
      for (int64_t at = begin; at < end; at++) {
        rows.load_rows(a, tiles[at]);
        store_codes(a, tiles[at], rows);
      }
    });
    return;
  }
  const Halves h(a.block);
  const int64_t blocks = a.shape.size / a.block, cells = h.highs * h.width, all = a.shape.groups * blocks * cells;
  const int64_t chunks = std::max<int64_t>(1, std::min({kChunks, kCells / all, tiles.count}));
  std::vector<double> sums(chunks * all);
  std::vector<Sums> numbers(chunks);
  const int64_t rows_in_all = a.shape.batch * a.shape.rows;
  parallel_for(threads_for(rows_in_all * row_cost(a, h), kGrain), chunks, [&](int64_t begin, int64_t end) {
    Rows rows(a, h);
    for (int64_t chunk = begin; chunk < end; chunk++)
      for (int64_t at = tiles.count * chunk / chunks; at < tiles.count * (chunk + 1) / chunks; at++) {
        const Tile t = tiles[at];
        rows.load_rows(a, t);
        store_codes(a, t, rows);
        rows.load_bits(a);
        add_numbers(a, rows, numbers[chunk]);
        for (int64_t i = 0; i < t.count; i++) {
          if (!rows.counts[i]) continue;
          for (int64_t j = 0; j < blocks; j++) {
            rows.load_block(a, h, i, j);
            double* to = &sums[chunk * all + (t.group * blocks + j) * cells];
            numbers[chunk].entropies -= add_codes(a, h, rows, to);
          }
        }
      }
  });
  const double count = (double)counted_rows(a), groups = (double)a.shape.groups;
  double entropies = 0, squares = 0;
  for (const Sums& s : numbers) entropies += s.entropies, squares += s.squares;
  *a.entropies = (float)(entropies / (count * groups));
  *a.commitment = (float)(squares / (count * groups * (double)a.shape.size));
  parallel_for(threads_for(chunks * all, kGrain), all, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; cell++) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) sum += sums[chunk * all + cell];
      const int64_t column = cell % h.width;
      if (column < h.lows) a.mean[cell / h.width * h.lows + column] = (float)(sum / count);
    }
  });
}

void binary_backward(const BinaryArgs& a) {
  const Tiles tiles(a.shape);
  const Halves h(a.block);
  const int64_t size = a.shape.size, blocks = a.block ? size / a.block : 0, cells = h.highs * h.width;
  std::vector<float> padded;  // grad_mean with rows of whole vectors
  const float* grad_mean = a.grad_mean;
  if (grad_mean && h.width > h.lows) {
    padded.resize(a.shape.groups * blocks * cells);
    for (size_t k = 0; k < padded.size() / h.width; k++)
      std::copy(a.grad_mean + k * h.lows, a.grad_mean + (k + 1) * h.lows, padded.begin() + k * h.width);
    grad_mean = padded.data();
  }
  const bool losses = a.grad_entropies != nullptr;
  const double count = losses ? (double)counted_rows(a) : 1, groups = (double)a.shape.groups;
  const float by_mean = (float)(1 / count), by_entropy = losses ? (float)(*a.grad_entropies / (count * groups)) : 0;
  const float by_square = losses ? (float)(2 * *a.grad_commitment / (count * groups * (double)size)) : 0;
  const int64_t rows_in_all = a.shape.batch * a.shape.rows;
  parallel_for(threads_for(rows_in_all * row_cost(a, h), kGrain), tiles.count, [&](int64_t begin, int64_t end) {
    Rows rows(a, h);
    std::vector<float> grad(size * kTile);
    for (int64_t tile = begin; tile < end; tile++) {
      const Tile t = tiles[tile];
      rows.load_rows(a, t);
      for (int64_t d = 0; d < size; d++) {
        if (a.grad.data)
          load_numbers(a.grad, t, d, &grad[d * kTile]);
        else
          std::fill(&grad[d * kTile], &grad[d * kTile] + kTile, 0.0f);
      }
      if (losses) {
        rows.load_bits(a);
        for (int64_t d = 0; d < size; d++)
          for (int64_t i = 0; i < kTile; i += kLanes) {
            const int64_t at = d * kTile + i;
            const vf u = load<vf>(&rows.u[at]), off = u > vf{} ? u - splat(a.magnitude) : u + splat(a.magnitude);
            vf found = off * splat(by_square);
            if (a.least == 0) {
              const vf both = load<vf>(&rows.q0[at]) * load<vf>(&rows.q1[at]);
              found -= only(~(both == vf{}), load<vf>(&rows.logit[at]) * both * splat(by_entropy * a.chain));
            }
            store(&grad[at], load<vf>(&grad[at]) + only(load<vi>(rows.counts + i), found));
          }
        for (int64_t i = 0; i < t.count; i++) {
          if (!rows.counts[i]) continue;
          for (int64_t j = 0; j < blocks; j++) {
            rows.load_block(a, h, i, j);
            const float* cell = grad_mean ? grad_mean + (t.group * blocks + j) * cells : nullptr;
            marginals(a, h, rows, cell, by_mean, by_entropy);
            add_bits(rows, rows.along_high.data(), j * a.block, h.high, i, a.chain, grad.data());
            add_bits(rows, rows.along_low.data(), j * a.block + h.high, h.low, i, a.chain, grad.data());
          }
        }
      }
      if (a.normalise)  // (grad - n (n . grad)) radius / length, with n = u / radius
        for (int64_t i = 0; i < kTile; i += kLanes) {
          vf along{};
          for (int64_t d = 0; d < size; d++) along += load<vf>(&rows.u[d * kTile + i]) * load<vf>(&grad[d * kTile + i]);
          const vf norm = load<vf>(rows.length + i), scaled = along / splat(a.radius * a.radius);
          const vf inside = only(~(norm < splat(kShortest)), scaled);
          const vf by = splat(a.radius) / (norm < splat(kShortest) ? splat(kShortest) : norm);
          for (int64_t d = 0; d < size; d++) {
            const int64_t at = d * kTile + i;
            store(&grad[at], (load<vf>(&grad[at]) - load<vf>(&rows.u[at]) * inside) * by);
          }
        }
      for (int64_t d = 0; d < size; d++) store_numbers(&grad[d * kTile], a.grad_z, t, d);
    }
  });
}

}  // namespace genfast
