// Distances of one row to single codes, as intervals in float32 arithmetic and exactly as the specification says, and
// the few codes that are still candidates for the k nearest.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dtype.h"
#include "cpu/simd.h"
#include "cpu/small_gemm.h"
#include "cpu/vector_quantize.h"
#include "cpu/workspace.h"

namespace genfast {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr double kUnit = 0x1p-24;       // a rounding in float32, relative
constexpr double kSmallest = 0x1p-125;  // and absolute, also where subnormal numbers are taken for 0
constexpr double kShortest = 1e-12;     // what a code's length is at least, where it divides

// One codebook: [count, size].
struct Codes {
  const char* data;
  int dtype;
  int64_t stride, count, size;

  const char* at(int64_t j) const { return data + j * stride * size_of(dtype); }
  // As numbers are, +0 and -0.
  bool equal(int64_t i, int64_t j) const {
    if (std::memcmp(at(i), at(j), size * size_of(dtype)) == 0) return true;
    if (dtype == kFloat32) return same<uint32_t>(at(i), at(j));
    return same<uint16_t>(at(i), at(j));
  }

 private:
  template <class Word>
  bool same(const char* a, const char* b) const {
    for (int64_t d = 0; d < size; d++) {
      Word x, y;
      std::memcpy(&x, a + d * sizeof(Word), sizeof(Word));
      std::memcpy(&y, b + d * sizeof(Word), sizeof(Word));
      if (x != y && (Word)((x | y) << 1)) return false;
    }
    return true;
  }
};

// n <= kLanes numbers at p, and zeros after them. What the instruction set does not convert comes as floats.
#if defined(__AVX512F__)
constexpr bool kLoadsHalf = true;
inline vf load_part(const char* p, int dtype, int64_t n) {
  const __mmask16 present = (__mmask16)((1u << n) - 1);
  if (dtype == kFloat32) return (vf)_mm512_maskz_loadu_ps(present, p);
  const __m256i half = _mm256_maskz_loadu_epi16(present, p);
  if (dtype == kFloat16) return (vf)_mm512_cvtph_ps(half);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
#else
constexpr bool kLoadsHalf = false;
inline vf load_part(const char* p, int, int64_t n) {
  if (n == kLanes) return load<vf>(p);
  alignas(sizeof(vf)) float some[kLanes] = {};
  std::memcpy(some, p, n * 4);
  return load<vf>(some);
}
#endif

inline float sum_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
#endif
}

// of(d) over all d < n in float64, lane by lane; n is a multiple of kLanes.
template <class F>
inline double sum_in_lanes(int64_t n, const F& of) {
  double sums[kLanes] = {}, sum = 0;
  for (int64_t d = 0; d < n; d += kLanes)
    for (int64_t i = 0; i < kLanes; i++) sums[i] += of(d + i);
  for (double part : sums) sum += part;
  return sum;
}

// A row and what is needed of it for intervals. `numbers` are padded with zeros to whole vectors.
struct Row {
  const float* numbers;
  double length;  // at least |z|
};

// low <= score of the specification <= high
struct Candidate {
  double low, high;
  int64_t index;
};

// Products and squares are summed lane by lane, size / kLanes + log2(kLanes) roundings deep; rounded once more before.
inline double relative_error(int64_t size) { return (double)(size + 16) * kUnit; }

class Distance {
 public:
  Distance(const Codes& codes, Metric metric)
      : codes_(codes), metric_(metric), error_(relative_error(codes.size)), buffer_(padded(codes.size)) {
    std::fill(buffer_.data(), buffer_.data() + padded(codes.size), 0.0f);
  }

  // False if the code is not finite.
  bool interval(const Row& row, int64_t j, Candidate& found) {
    found.index = j;
    if (codes_.dtype == kFloat32) return interval_of<kFloat32>(row, codes_.at(j), found);
    if constexpr (kLoadsHalf) {
      if (codes_.dtype == kBFloat16) return interval_of<kBFloat16>(row, codes_.at(j), found);
      return interval_of<kFloat16>(row, codes_.at(j), found);
    }
    load_run(codes_.at(j), codes_.dtype, codes_.size, buffer_.data());
    return interval_of<kFloat32>(row, reinterpret_cast<const char*>(buffer_.data()), found);
  }

  // The same of a finite code in float64, summed lane by lane.
  void refine(const Row& row, Candidate& found) {
    const int64_t size = codes_.size, width = padded(size);
    load_run(codes_.at(found.index), codes_.dtype, size, buffer_.data());
    const float *z = row.numbers, *e = buffer_.data();
    const double error = (double)(2 * size + 32) * 0x1p-53;
    if (metric_ == kL2) {
      const double t = sum_in_lanes(width, [&](int64_t d) {
        const double apart = (double)z[d] - (double)e[d];
        return apart * apart;
      });
      found.low = t * (1 - error), found.high = t * (1 + error);
      return;
    }
    const double product = -sum_in_lanes(width, [&](int64_t d) { return (double)z[d] * (double)e[d]; });
    const double length = std::sqrt(sum_in_lanes(width, [&](int64_t d) { return (double)e[d] * (double)e[d]; }));
    const double divisor = metric_ == kCosine ? std::max(length, kShortest) : 1.0;
    const double apart = 2 * error * row.length * length / divisor;
    found.low = product / divisor - apart, found.high = product / divisor + apart;
  }

  // As the specification has it: float64, from the first number to the last, products rounded.
  double exact(const float* z, int64_t j) {
    load_run(codes_.at(j), codes_.dtype, codes_.size, buffer_.data());
    const float* e = buffer_.data();
    double total = 0, squares = 0;
    if (metric_ == kL2) {
      for (int64_t d = 0; d < codes_.size; d++) {
        const double apart = (double)z[d] - (double)e[d];
        total += apart * apart;
      }
      return total;
    }
    for (int64_t d = 0; d < codes_.size; d++) {
      total -= (double)z[d] * (double)e[d];
      squares += (double)e[d] * (double)e[d];
    }
    return metric_ == kCosine ? total / std::max(std::sqrt(squares), kShortest) : total;
  }

  const Codes& codes() const { return codes_; }

  bool finite(int64_t j) {
    load_run(codes_.at(j), codes_.dtype, codes_.size, buffer_.data());
    return all_finite(buffer_.data(), codes_.size);
  }

  static bool all_finite(const float* p, int64_t n) {
    int bad = 0;
    for (int64_t d = 0; d < n; d++) bad |= !(std::abs(p[d]) <= std::numeric_limits<float>::max());
    return !bad;
  }

 private:
  template <int DTYPE>
  bool interval_of(const Row& row, const char* code, Candidate& found) {
    const int64_t size = codes_.size;
    const float* z = row.numbers;
    const auto full = [&](int64_t d) { return load_part(code + d * size_of(DTYPE), DTYPE, kLanes); };
    const auto part = [&](int64_t d) {
      return d + kLanes <= size ? full(d) : load_part(code + d * size_of(DTYPE), DTYPE, size - d);
    };
    const double slack = (double)size * kSmallest;
    vf sum{}, more{};
    int64_t d = 0;
    if (metric_ == kL2) {
      for (; d + 2 * kLanes <= size; d += 2 * kLanes) {
        const vf a = load<vf>(z + d) - full(d), b = load<vf>(z + d + kLanes) - full(d + kLanes);
        sum = multiply_add(a, a, sum), more = multiply_add(b, b, more);
      }
      for (; d < size; d += kLanes) {
        const vf a = load<vf>(z + d) - part(d);
        sum = multiply_add(a, a, sum);
      }
      const double t = sum_of(sum + more);
      if (!(t < 1e37)) return unbounded(found);
      found.low = t * (1 - error_) - slack, found.high = t * (1 + error_) + slack;
      return true;
    }
    for (; d < size; d += kLanes) {
      const vf b = part(d);
      sum = multiply_add(load<vf>(z + d), b, sum), more = multiply_add(b, b, more);
    }
    const double product = -(double)sum_of(sum), length = std::sqrt((double)sum_of(more));
    if (!(length < 1e18) || !(row.length * length < 1e37)) return unbounded(found);
    if (metric_ == kCosine) {
      if (length < 1e-10) return unbounded(found);  // a short code has lost its squares to underflow
      const double t = product / length, apart = 2 * error_ * row.length + slack / length;
      found.low = t - apart, found.high = t + apart;
    } else {
      const double apart = error_ * row.length * (length + (double)size * 1e-18) + slack;
      found.low = product - apart, found.high = product + apart;
    }
    return true;
  }

  // Too large for float32: any score is possible.
  bool unbounded(Candidate& found) {
    found.low = -kInfinite, found.high = kInfinite;
    return finite(found.index);
  }

  Codes codes_;
  Metric metric_;
  double error_;
  Floats buffer_;
};

// Candidates for the k nearest codes of a row.
class Candidates {
 public:
  Candidates(Distance& distance, int64_t k, bool exact) : distance_(distance), k_(k), exact_(exact) {}

  void begin(const Row& row) {
    row_ = row;
    count_ = 0;
    cut_ = kInfinite;
  }

  // Codes of a greater score are none of the k nearest.
  double cut() const { return cut_; }

  void offer(int64_t j) {
    Candidate c;
    if (!distance_.interval(row_, j, c) || c.low > cut_ || (k_ == 1 && is_twin(c))) return;
    if (k_ == 1) cut_ = std::min(cut_, c.high);
    list_[count_++] = c;
    if (k_ > 1 && count_ == k_) tighten();
    if (count_ == kMost) shrink();
  }

  // Makes the cut as low as float64 can.
  void sharpen() {
    prune();
    for (int i = 0; i < count_; i++) distance_.refine(row_, list_[i]);
    tighten();
  }

  // The indices of the k nearest in order, and -1 where there are fewer.
  void finish(int64_t* to) {
    prune();
    if (k_ > 1 || count_ > 1) resolve();
    for (int64_t i = 0; i < k_; i++) to[i] = i < count_ ? list_[i].index : -1;
  }

 private:
  static constexpr int kMost = 128;

  // The k-th smallest of what the scores are at most.
  void tighten() {
    if (count_ < k_) return;
    double high[kMost];
    for (int i = 0; i < count_; i++) high[i] = list_[i].high;
    std::nth_element(high, high + k_ - 1, high + count_);
    cut_ = std::min(cut_, high[k_ - 1]);
  }

  void prune() {
    tighten();
    count_ = (int)(std::remove_if(list_, list_ + count_, [&](const Candidate& c) { return c.low > cut_; }) - list_);
  }

  // Of codes that are equal only the first counts, where one is asked for: there may be thousands.
  bool is_twin(const Candidate& c) {
    for (int i = 0; i < std::min(count_, 2); i++) {  // the nearest so far is one of the first
      Candidate& other = list_[i];
      if (!distance_.codes().equal(other.index, c.index)) continue;
      other.index = std::min(other.index, c.index);
      return true;
    }
    return false;
  }

  // Leaves the k nearest of them all, in order.
  void resolve() {
    const auto before = [](const Candidate& a, const Candidate& b) {
      return a.low != b.low ? a.low < b.low : a.index < b.index;
    };
    sharpen();
    prune();
    if (exact_) {
      std::sort(list_, list_ + count_, before);
      for (int i = 0, end; i < count_; i = end) {
        double high = list_[i].high;
        for (end = i + 1; end < count_ && list_[end].low <= high; end++) high = std::max(high, list_[end].high);
        for (int j = i; j < end && end - i > 1; j++)
          list_[j].low = list_[j].high = distance_.exact(row_.numbers, list_[j].index);
      }
    }
    std::sort(list_, list_ + count_, before);
    count_ = (int)std::min<int64_t>(count_, k_);
    tighten();
  }

  void shrink() {
    prune();
    if (count_ > kMost / 2) resolve();
  }

  Distance& distance_;
  int64_t k_;
  bool exact_;
  Row row_{};
  int count_ = 0;
  double cut_ = kInfinite;
  Candidate list_[kMost];
};

}  // namespace
}  // namespace genfast
