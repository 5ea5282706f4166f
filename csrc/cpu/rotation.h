// Rotary embedding of one row (Su et al. 2021, arXiv:2104.09864): genfast/reference/attention_cached.py.
#pragma once
#include <algorithm>

#include "cpu/attention_cached.h"
#include "cpu/dtype.h"

namespace genfast {
namespace {

// Row `from` of `dim` numbers, at most 256, to `to`, rounded to its dtype.
inline void rotate(const Rotation& r, int64_t position, int dtype, int64_t dim, const char* from, char* to) {
  const int64_t half = dim / 2, at = std::min(std::max<int64_t>(position, 0), r.positions - 1) * half;
  const float *cos = r.cos + at, *sin = r.sin + at;
  // Number d of the first halves is x[d * step], its partner lies `apart` from it.
  const int64_t step = r.interleaved ? 2 : 1, apart = r.interleaved ? 1 : half;
  float x[256], y[256];
  load_run(from, dtype, dim, x);
  for (int64_t d = 0; d < half; d++) {
    const float u = x[d * step], v = x[d * step + apart];
    y[d * step] = u * cos[d] - v * sin[d];
    y[d * step + apart] = v * cos[d] + u * sin[d];
  }
  store_run(y, dim, to, dtype);
}

}  // namespace
}  // namespace genfast
