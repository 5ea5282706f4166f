// Finite scalar quantisation (Mentzer et al. 2023). genfast/reference/scalar_quantize.py is the specification.
//
// The level of z is the number of steps at or below it, so the forward pass compares and has no tanh: for the usual 3
// to 16 levels that is faster, and every instruction set finds the level of the exact formula. The gradient needs 1 -
// tanh(u)^2 = 4 e / (1 + e)^2 with e = exp(-2 |u|), which loses nothing where tanh is near 1.
#include "cpu/scalar_quantize.h"

#include "cpu/exponential.h"
#include "cpu/scalar_tiles.h"

namespace genfast {
namespace {

// Up to here counting all steps is faster than a search.
constexpr int64_t kCounted = 33;

// Levels of a tile's numbers; 0 for NaN.
void levels_of(const float* z, const Levels& levels, int32_t* k) {
  const float* steps = levels.steps;
  const int64_t n = levels.count - 1;
  if (n < kCounted) {
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const vf x = load<vf>(z + i);
      vi found{};
      for (int64_t j = 0; j < n; j++) found -= x >= splat(steps[j]);
      store(k + i, found);
    }
    return;
  }
  for (int64_t i = 0; i < kTile; i++)
    k[i] = z[i] != z[i] ? 0 : (int32_t)(std::upper_bound(steps, steps + n, z[i]) - steps);
}

vf code_of(vi k, int64_t count, bool symmetric) {
  if (symmetric) return to_float(k) * splat((float)(2.0 / (double)(count - 1))) - splat(1.0f);
  const int32_t half = (int32_t)(count / 2);
  return to_float(k - half) / splat((float)half);
}

vf select(vi where, vf a, vf b) { return as_float((as_int(a) & where) | (as_int(b) & ~where)); }

}  // namespace

void fsq_quantize(const FsqArgs& a) {
  const Tiles tiles(a.shape);
  parallel_for(threads_of(a.shape), tiles.count, [&](int64_t begin, int64_t end) {
    alignas(64) float z[kTile], noise[kTile];
    alignas(64) int32_t k[kTile];
    int64_t index[kTile];
    int32_t bad[kTile];
    for (int64_t at = begin; at < end; at++) {
      const Tile t = tiles[at];
      std::fill(index, index + kTile, 0);
      std::fill(bad, bad + kTile, 0);
      int64_t basis = 1;
      for (int64_t d = 0; d < a.shape.size; d++) {
        const Levels& levels = a.levels[d];
        load_numbers(a.z, t, d, z);
        levels_of(z, levels, k);
        if (a.noise.data) load_numbers(a.noise, t, d, noise);
        for (int64_t i = 0; i < kTile; i += kLanes) {
          const vf x = load<vf>(z + i);
          const vi odd = x != x;
          store(bad + i, load<vi>(bad + i) | odd);
          vf code = code_of(load<vi>(k + i), levels.count, a.symmetric);
          if (a.noise.data) {
            code += load<vf>(noise + i);
            code = code < splat(-1.0f) ? splat(-1.0f) : code;
            code = code > splat(1.0f) ? splat(1.0f) : code;
          }
          store(z + i, select(odd, x, code));
        }
        for (int64_t i = 0; i < kTile; i++) index[i] += k[i] * basis;
        basis *= levels.count;
        store_numbers(z, a.codes, t, d);
      }
      int64_t* to = index_of(a.indices, a.shape, t);
      for (int64_t i = 0; i < t.count; i++) to[i * a.shape.groups] = bad[i] ? -1 : index[i];
    }
  });
}

void fsq_backward(const FsqArgs& a) {
  const Tiles tiles(a.shape);
  parallel_for(threads_of(a.shape), tiles.count, [&](int64_t begin, int64_t end) {
    alignas(64) float z[kTile], grad[kTile], noise[kTile];
    alignas(64) int32_t k[kTile];
    for (int64_t at = begin; at < end; at++) {
      const Tile t = tiles[at];
      for (int64_t d = 0; d < a.shape.size; d++) {
        const Levels& levels = a.levels[d];
        load_numbers(a.z, t, d, z);
        load_numbers(a.grad, t, d, grad);
        if (a.noise.data) {
          load_numbers(a.noise, t, d, noise);
          levels_of(z, levels, k);
        }
        for (int64_t i = 0; i < kTile; i += kLanes) {
          const vf x = load<vf>(z + i), u = x + splat(levels.shift);
          const vf size = as_float(as_int(u) & 0x7FFFFFFF);
          vf slope;
          if (a.clamp) {
            slope = as_float(as_int(splat(1.0f)) & (size <= splat(1.0f)));
          } else {
            const vf e = exponential(splat(-2.0f) * size), below = splat(1.0f) + e;
            slope = splat(4.0f) * e / (below * below);
          }
          vf found = load<vf>(grad + i) * slope * splat(levels.slope);
          if (a.noise.data) {
            const vf code = code_of(load<vi>(k + i), levels.count, a.symmetric) + load<vf>(noise + i);
            found = as_float(as_int(found) & (as_float(as_int(code) & 0x7FFFFFFF) <= splat(1.0f)));
          }
          store(z + i, select(x != x, x, found));
        }
        store_numbers(z, a.grad_z, t, d);
      }
    }
  });
}

}  // namespace genfast
