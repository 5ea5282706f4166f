// Vectors of the family `vector_quantize`, read and written as rows of floats whichever way they lie in memory.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/code_update.h"
#include "cpu/dtype.h"
#include "cpu/transpose.h"

namespace genfast {
namespace {

constexpr int64_t kVectorGrain = 1 << 15;  // numbers that are worth a thread
constexpr float kShortest = 1e-6f;         // what a length is at least, where it divides

// Up to kTile neighbouring positions of one batch entry and group: with channels first, what one vector reads along S.
constexpr int64_t kTile = 16;

struct Tile {
  int64_t batch, first, group, count;
};

struct Tiles {
  explicit Tiles(const CodeSizes& n) : n_(n), per_batch_((n.length + kTile - 1) / kTile) {}
  int64_t count() const { return n_.batch * per_batch_ * n_.groups; }
  Tile at(int64_t t) const {
    const int64_t group = t % n_.groups, block = t / n_.groups;
    const int64_t first = block % per_batch_ * kTile;
    return {block / per_batch_, first, group, std::min(kTile, n_.length - first)};
  }

 private:
  const CodeSizes& n_;
  int64_t per_batch_;
};

inline char* element(const Vectors& v, const Tile& t) {
  return v.data +
         (t.batch * v.batch_stride + t.first * v.position_stride + t.group * v.group_stride) * size_of(v.dtype);
}

// The rows of a tile as floats: where they are, if they are that already, otherwise in `space`.
struct Rows {
  const float* data;
  int64_t stride;
  const float* operator[](int64_t r) const { return data + r * stride; }
};

// Rounded up to whole vectors, for the transposition.
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

inline Rows read_rows(const Vectors& v, const Tile& t, int64_t size, std::vector<float>& space) {
  const char* p = element(v, t);
  const int64_t bytes = size_of(v.dtype);
  if (v.entry_stride == 1) {
    if (v.dtype == kFloat32) return {reinterpret_cast<const float*>(p), v.position_stride};
    for (int64_t r = 0; r < t.count; r++)
      load_run(p + r * v.position_stride * bytes, v.dtype, size, space.data() + r * padded(size));
    return {space.data(), padded(size)};
  }
  for (int64_t d = 0; d < size; d += kLanes)
    for (int64_t r = 0; r < t.count; r += kLanes) {
      vf square[kLanes] = {};
      const int64_t lines = std::min<int64_t>(kLanes, size - d), rows = std::min<int64_t>(kLanes, t.count - r);
      for (int64_t k = 0; k < lines; k++)
        load_run(p + ((d + k) * v.entry_stride + r) * bytes, v.dtype, rows, reinterpret_cast<float*>(square + k));
      transpose(square);
      for (int64_t k = 0; k < rows; k++) store(space.data() + (r + k) * padded(size) + d, square[k]);
    }
  return {space.data(), padded(size)};
}

// Rows of padded(size) floats each.
inline void write_rows(const float* rows, const Vectors& v, const Tile& t, int64_t size) {
  char* p = element(v, t);
  const int64_t bytes = size_of(v.dtype), stride = padded(size);
  if (v.entry_stride == 1) {
    for (int64_t r = 0; r < t.count; r++)
      store_run(rows + r * stride, size, p + r * v.position_stride * bytes, v.dtype);
    return;
  }
  for (int64_t d = 0; d < size; d += kLanes)
    for (int64_t r = 0; r < t.count; r += kLanes) {
      vf square[kLanes] = {};
      const int64_t lines = std::min<int64_t>(kLanes, size - d), count = std::min<int64_t>(kLanes, t.count - r);
      for (int64_t k = 0; k < count; k++) square[k] = load<vf>(rows + (r + k) * stride + d);
      transpose(square);
      for (int64_t k = 0; k < lines; k++)
        store_run(reinterpret_cast<const float*>(square + k), count, p + ((d + k) * v.entry_stride + r) * bytes,
                  v.dtype);
    }
}

// Room for a tile of rows.
inline std::vector<float> tile_space(int64_t size) { return std::vector<float>(kTile * padded(size)); }

// Sums in float64 over eight lanes, the same for every instruction set.
struct Sum {
  double lane[8] = {};
  double total() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

template <class Term>
inline double summed(int64_t n, const Term& term) {
  Sum s;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; k++) s.lane[k] += term(i + k);
  for (; i < n; i++) s.lane[i % 8] += term(i);
  return s.total();
}

inline double dot(const float* a, const float* b, int64_t n) {
  return summed(n, [=](int64_t i) { return (double)a[i] * (double)b[i]; });
}

inline float length_of(const float* a, int64_t n) { return std::max((float)std::sqrt(dot(a, a, n)), kShortest); }

}  // namespace
}  // namespace genfast
