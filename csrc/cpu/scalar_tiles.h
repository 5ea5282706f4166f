// Rows of a few numbers, some at a time, with each of their dimensions a run of floats: whatever the strides are,
// channel-last or channel-first, the arithmetic then has whole vectors.
#pragma once
#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/parallel.h"
#include "cpu/scalar_quantize.h"

namespace genfast {
namespace {

// 64 rows of 62 numbers are 16 KB.
constexpr int64_t kTile = 64;
static_assert(kTile % kLanes == 0, "tiles are whole vectors");

struct Tile {
  int64_t batch, first, count, group;
};

// The tiles of a shape in order: all groups of some rows, then the next rows.
struct Tiles {
  explicit Tiles(const RowsOf& shape) : groups(shape.groups), rows(shape.rows), runs((rows + kTile - 1) / kTile) {
    count = shape.batch * runs * groups;
  }
  Tile operator[](int64_t i) const {
    const int64_t run = i / groups, first = run % runs * kTile;
    return {run / runs, first, std::min(kTile, rows - first), i % groups};
  }
  int64_t groups, rows, runs, count;
};

inline char* element(const Vectors& v, const Tile& t, int64_t d) {
  const int64_t at = t.batch * v.stride[0] + t.first * v.stride[1] + t.group * v.stride[2] + d * v.stride[3];
  return v.data + at * size_of(v.dtype);
}

// Dimension d of a tile's rows; zeros fill the last vector.
inline void load_numbers(const Vectors& v, const Tile& t, int64_t d, float* to) {
  const char* p = element(v, t, d);
  const int64_t n = t.count, stride = v.stride[1];
  std::fill(to + n, to + kTile, 0.0f);
  if (stride == 1) return load_run(p, v.dtype, n, to);
  const float* f = reinterpret_cast<const float*>(p);
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  if (v.dtype == kFloat32)
    for (int64_t i = 0; i < n; i++) to[i] = f[i * stride];
  else if (v.dtype == kBFloat16)
    for (int64_t i = 0; i < n; i++) to[i] = bf16_to_float(h[i * stride]);
  else
    for (int64_t i = 0; i < n; i++) to[i] = half_to_float(h[i * stride]);
}

inline void store_numbers(const float* from, const Vectors& v, const Tile& t, int64_t d) {
  char* p = element(v, t, d);
  const int64_t n = t.count, stride = v.stride[1];
  if (stride == 1) return store_run(from, n, p, v.dtype);
  float* f = reinterpret_cast<float*>(p);
  uint16_t* h = reinterpret_cast<uint16_t*>(p);
  if (v.dtype == kFloat32)
    for (int64_t i = 0; i < n; i++) f[i * stride] = from[i];
  else if (v.dtype == kBFloat16)
    for (int64_t i = 0; i < n; i++) h[i * stride] = float_to_bf16(from[i]);
  else
    for (int64_t i = 0; i < n; i++) h[i * stride] = float_to_half(from[i]);
}

inline int64_t* index_of(int64_t* indices, const RowsOf& shape, const Tile& t) {
  return indices + (t.batch * shape.rows + t.first) * shape.groups + t.group;
}

// Numbers that a thread should have at the least.
constexpr int64_t kGrain = 1 << 15;

inline int threads_of(const RowsOf& shape) {
  return threads_for(shape.batch * shape.rows * shape.groups * shape.size, kGrain);
}

}  // namespace
}  // namespace genfast
