// The vectors of each code, in their own order.
#pragma once
#include <cstring>

#include "cpu/code_vectors.h"
#include "cpu/parallel.h"

namespace genfast {
namespace {

// A counting sort of the vectors of each group by code; those without a code are left out.
class Segments {
 public:
  Segments(const int64_t* indices, const CodeSizes& n)
      : n_(n), ends_(n.groups * (n.codes + 1)), order_(n.groups * n.count()) {
    for (int64_t g = 0; g < n.groups; g++) {
      int64_t* end = ends_.data() + g * (n.codes + 1) + 1;
      for (int64_t r = 0; r < n.count(); r++) {
        const uint64_t k = (uint64_t)indices[r * n.groups + g];
        if (k < (uint64_t)n.codes) end[k]++;
      }
      // From counts to beginnings, which the placing moves to the ends.
      int64_t sum = 0;
      for (int64_t k = 0; k < n.codes; k++) {
        const int64_t count = end[k];
        end[k] = sum;
        sum += count;
      }
      int64_t* order = order_.data() + g * n.count();
      for (int64_t r = 0; r < n.count(); r++) {
        const uint64_t k = (uint64_t)indices[r * n.groups + g];
        if (k < (uint64_t)n.codes) order[end[k]++] = r;
      }
    }
  }

  int64_t count(int64_t g, int64_t k) const { return end(g, k + 1) - end(g, k); }
  const int64_t* begin(int64_t g, int64_t k) const { return order_.data() + g * n_.count() + end(g, k); }

 private:
  int64_t end(int64_t g, int64_t k) const { return ends_[g * (n_.codes + 1) + k]; }

  const CodeSizes n_;
  std::vector<int64_t> ends_, order_;
};

// Adds up vectors of D neighbours in float64.
class Adder {
 public:
  explicit Adder(int64_t size) : total_(size), row_(padded(size)) {}

  void clear() { std::fill(total_.begin(), total_.end(), 0.0); }
  void add(const float* __restrict row, float divisor = 1) {
    double* __restrict total = total_.data();
    const int64_t size = (int64_t)total_.size();
    if (divisor == 1)
      for (int64_t d = 0; d < size; d++) total[d] += (double)row[d];
    else
      for (int64_t d = 0; d < size; d++) total[d] += (double)(row[d] / divisor);
  }
  const double* total() const { return total_.data(); }

  // Row r of group g, as floats.
  const float* read(const Vectors& v, const CodeSizes& n, int64_t r, int64_t g) {
    const char* p = element(v, {r / n.length, r % n.length, g, 1});
    if (v.dtype == kFloat32) return reinterpret_cast<const float*>(p);
    load_run(p, v.dtype, n.size, row_.data());
    return row_.data();
  }

 private:
  std::vector<double> total_;
  std::vector<float> row_;
};

}  // namespace
}  // namespace genfast
