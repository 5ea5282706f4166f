// Rows of logits in tiles, the largest entry, the whole-number weights and their sums, and the draw: what the kernels
// of `token_sampling` share. genfast/reference/token_sampling.py is the specification, to the bit.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/philox.h"
#include "cpu/token_math.h"

namespace genfast {
namespace {

constexpr int64_t kTile = 4096;
constexpr int64_t kChunk = 256;  // entries whose weights are added before the draw looks closer
constexpr int64_t kGrain = 1 << 15;
constexpr double kLn2 = 0.693147180559945309417;

typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <int DT>
inline vf load_logits(const char* p, int64_t i) {
  if constexpr (DT == kFloat32) {
    return load<vf>(reinterpret_cast<const float*>(p) + i);
  } else if constexpr (DT == kBFloat16) {
    return (vf)(__builtin_convertvector(load<vh>(reinterpret_cast<const uint16_t*>(p) + i), vu) << 16);
  } else {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p) + i;
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h)));
#else
    vf x;
    for (int k = 0; k < kLanes; k++) x[k] = half_to_float(h[k]);
    return x;
#endif
  }
}

// What is left of a row by top-p and top-k: entries above `cut`, and those equal to it before index `ties_end`.
struct Filter {
  float cut = -kInfinity;
  int64_t ties_end = 0;
};

// Where the entries of a row come from.
struct Row {
  const char* data;
  const char* uncond;
  int dtype, uncond_dtype;
  float guidance;
  int64_t size;
  const int64_t *first_suppressed, *last_suppressed, *first_quiet, *last_quiet;
  const Filter* filter;
  const char* next = nullptr;  // the row that this thread reads after this one

  // Whether entries [first, first + n) are those in memory.
  bool plain(int64_t first, int64_t n) const {
    return !uncond && !filter && !holds(first_suppressed, last_suppressed, first, n) &&
           !holds(first_quiet, last_quiet, first, n);
  }

  static bool holds(const int64_t* from, const int64_t* to, int64_t first, int64_t n) {
    if (from == to) return false;
    const int64_t* id = std::lower_bound(from, to, first);
    return id != to && *id < first + n;
  }

  void fill(int64_t first, int64_t n, float* to) const {
    load_run(data + first * size_of(dtype), dtype, n, to);
    if (uncond) {
      float other[kTile];
      load_run(uncond + first * size_of(uncond_dtype), uncond_dtype, n, other);
      for (int64_t i = 0; i < n; i++) to[i] = other[i] + guidance * (to[i] - other[i]);
    }
    drop(first_suppressed, last_suppressed, first, n, to);
    drop(first_quiet, last_quiet, first, n, to);
    if (filter) {
      const float cut = filter->cut;
      const int64_t ties = std::min(std::max<int64_t>(filter->ties_end - first, 0), n);
      for (int64_t i = 0; i < ties; i++) to[i] = to[i] >= cut ? to[i] : -kInfinity;
      for (int64_t i = ties; i < n; i++) to[i] = to[i] > cut ? to[i] : -kInfinity;
    }
  }

  static void drop(const int64_t* from, const int64_t* to, int64_t first, int64_t n, float* buffer) {
    for (const int64_t* id = std::lower_bound(from, to, first); id != to && *id < first + n; id++)
      buffer[*id - first] = -kInfinity;
  }

  // body(DType constant, address, first entry, entries): the address holds a multiple of kLanes entries, those beyond
  // the row being -inf. body returns whether to go on.
  template <class Body>
  void tiles(const Body& body, int64_t from = 0) const {
    alignas(64) float buffer[kTile];
    for (int64_t first = from; first < size; first += kTile) {
      const int64_t n = std::min(kTile, size - first);
      bool more;
      if (n % kLanes == 0 && plain(first, n)) {
        const char* p = data + first * size_of(dtype);
        more = dtype == kFloat32    ? body(std::integral_constant<int, kFloat32>{}, p, first, n)
               : dtype == kBFloat16 ? body(std::integral_constant<int, kBFloat16>{}, p, first, n)
                                    : body(std::integral_constant<int, kFloat16>{}, p, first, n);
      } else {
        fill(first, n, buffer);
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = n; i < padded; i++) buffer[i] = -kInfinity;
        more = body(std::integral_constant<int, kFloat32>{}, reinterpret_cast<const char*>(buffer), first, padded);
      }
      if (!more) return;
    }
  }
};

struct Largest {
  float value = -kInfinity;
  int64_t index = 0;
  bool nan = false;
};

inline Largest find_largest(const Row& row) {
  Largest found;
  int64_t tile = -1;
  NaNs nans;
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t n) {
    vf m0 = splat(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      const vf a = load_logits<dt>(p, i), b = load_logits<dt>(p, i + kLanes);
      const vf c = load_logits<dt>(p, i + 2 * kLanes), d = load_logits<dt>(p, i + 3 * kLanes);
      nans.look(a, b), nans.look(c, d);
      m0 = larger(a, m0), m1 = larger(b, m1), m2 = larger(c, m2), m3 = larger(d, m3);
    }
    for (; i < n; i += kLanes) {
      const vf a = load_logits<dt>(p, i);
      nans.look(a, a);
      m0 = larger(a, m0);
    }
    const float m = largest(larger(larger(m0, m1), larger(m2, m3)));
    if (m > found.value) found.value = m, tile = first;
    return !nans.any();
  });
  found.nan = nans.any();
  if (tile < 0 && !found.nan) return found;
  row.tiles(
      [&](auto dt, const char* p, int64_t first, int64_t n) {
        for (int64_t i = 0; i < n; i += kLanes) {
          const vf x = load_logits<dt>(p, i);
          for (int k = 0; k < kLanes; k++)
            if (found.nan ? x[k] != x[k] : x[k] == found.value) {
              found.index = first + i + k;
              return false;
            }
        }
        return true;
      },
      found.nan ? 0 : tile);
  return found;
}

// Asks for a tile of the next row while this one is computed with: sums wait for the arithmetic, the search of the
// largest waits for memory.
inline void prefetch(const Row& row, int64_t first, int64_t n) {
  if (!row.next) return;
  const int64_t entry = size_of(row.dtype);
  for (int64_t at = 0; at < n * entry; at += 64) __builtin_prefetch(row.next + first * entry + at, 0, 2);
}

// Running sums of v at the end of each tile.
inline uint64_t add_weights(const Row& row, float m, float c, int bits, std::vector<uint64_t>* ends) {
  uint64_t sum = 0;
  const vi exponent = (vi{} + bits);
  if (ends) ends->clear();
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t n) {
    prefetch(row, first, n);
    WholeSum whole;
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      whole.add(weight(load_logits<dt>(p, i) - splat(m), splat(c), exponent));
      whole.add(weight(load_logits<dt>(p, i + kLanes) - splat(m), splat(c), exponent));
    }
    for (; i < n; i += kLanes) whole.add(weight(load_logits<dt>(p, i) - splat(m), splat(c), exponent));
    sum += whole.total();
    if (ends) ends->push_back(sum);
    return true;
  });
  return sum;
}

// sum e and, if asked for, sum e t, where e = 2^t and t = (l - m) c.
struct Sums {
  double e = 0, et = 0;
};

template <bool ENTROPY>
Sums add_exponentials(const Row& row, float m, float c) {
  Sums sums;
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t n) {
    prefetch(row, first, n);
    vf e[2] = {vf{}, vf{}}, et[2] = {vf{}, vf{}};
    const auto one = [&](int64_t i, int k) {
      vf t;
      vi power;
      const vf x = exp2_parts(load_logits<dt>(p, i) - splat(m), splat(c), t, power);
      const vf value = times_power(x, power);
      e[k] += value;
      if (ENTROPY) et[k] += value * t;
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) one(i, 0), one(i + kLanes, 1);
    for (; i < n; i += kLanes) one(i, 0);
    sums.e += total(e[0] + e[1]);
    if (ENTROPY) sums.et += total(et[0] + et[1]);
    return true;
  });
  return sums;
}

// What is taken off every weight: an entry has v - value where v > value, else nothing.
struct Floor {
  uint64_t value = 0;
  float least = 1.0f;  // the least v that leaves something

  Floor() = default;
  explicit Floor(uint64_t off) : value(off), least((float)(off + 1)) {
    if ((uint64_t)least < off + 1) least = std::nextafter(least, kInfinity);
  }
  uint64_t left(float v) const { return v >= least ? (uint64_t)v - value : 0; }
};

// The sum of what is left.
struct FlooredSum {
  WholeSum whole;
  vi taken{};
  void add(vf v, const Floor& floor) {
    const vi more = v >= splat(floor.least);
    whole.add((vf)((vi)v & more));
    taken -= more;
  }
  uint64_t total(const Floor& floor) const {
    uint64_t count = 0;
    for (int k = 0; k < kLanes; k++) count += (uint64_t)taken[k];
    return whole.total() - count * floor.value;
  }
};

// The entry whose running sum is the first to exceed `target`, `ends` being the sums at the end of each tile.
inline int64_t draw(const Row& row, float m, float c, int bits, const std::vector<uint64_t>& ends, uint64_t target,
                    const Floor& floor = Floor()) {
  const int64_t tile = std::upper_bound(ends.begin(), ends.end(), target) - ends.begin();
  uint64_t left = target - (tile ? ends[tile - 1] : 0);
  int64_t found = -1;
  const vi exponent = (vi{} + bits);
  row.tiles(
      [&](auto dt, const char* p, int64_t first, int64_t n) {
        for (int64_t from = 0; from < n; from += kChunk) {
          const int64_t to = std::min(n, from + kChunk);
          alignas(64) float v[kChunk];
          FlooredSum chunk;
          for (int64_t i = from; i < to; i += kLanes) {
            const vf x = weight(load_logits<dt>(p, i) - splat(m), splat(c), exponent);
            chunk.add(x, floor);
            store(v + i - from, x);
          }
          const uint64_t sum = chunk.total(floor);
          if (left >= sum) {
            left -= sum;
            continue;
          }
          for (int64_t i = from; i < to; i++) {
            const uint64_t w = floor.left(v[i - from]);
            if (left < w) {
              found = first + i;
              return false;
            }
            left -= w;
          }
        }
        return false;
      },
      tile * kTile);
  return found;
}

// The four Philox words of one block of a sample.
inline void row_words(uint64_t seed, uint32_t sample, uint32_t stream, uint32_t block, uint32_t to[4]) {
  const uint32_t aligned = block / kLanes * kLanes;
  vu words[4];
  philox_words(PhiloxKey{seed, sample, stream}, aligned, words);
  for (int w = 0; w < 4; w++) to[w] = words[w][block - aligned];
}

}  // namespace
}  // namespace genfast
