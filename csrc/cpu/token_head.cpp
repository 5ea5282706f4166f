// Tokens out of hidden states and the head's weight. The vocabulary is cut in tiles of 512; with l the logits of a row
// in one of them and m the largest, a tile gives m, where it is, sum exp(l - m), and the draw within the tile,
//
//     v_i = trunc(2^52 2^((l_i - m) c)),    candidate = first i with v_0 + ... + v_i > floor(u V / 2^64),    V = sum v;
//
// a merge draws a tile by V 2^((m - M) c) in the same way (genfast/reference/token_head.py is the specification, to the
// bit). A thread takes one tile after the other: the product with a block of rows goes to a buffer in the second-level
// cache, and from there row by row through the statistics. Nothing else is stored.
#include "cpu/token_head.h"

#include <algorithm>
#include <new>
#include <vector>

#include "cpu/head_product.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/token_math.h"

namespace genfast {
namespace {

constexpr int64_t kStretch = 64;  // entries whose weights are added before the draw looks closer
constexpr int kTileBits = 52;
constexpr int64_t kGrain = 1 << 18;  // products
constexpr float kTanhP[6] = {1.0f, -1.0f / 3, 2.0f / 15, -17.0f / 315, 62.0f / 2835, -1382.0f / 155925};
constexpr float kTanhNear = 0.25f;

// cap tanh(l / cap).
inline vf capped(vf l, float cap) {
  const vf z = l / splat(cap);
  const vf a = as_float(as_int(z) & 0x7FFFFFFF), square = a * a;
  vf near = splat(kTanhP[5]);
  for (int k = 4; k >= 0; k--) near = fma_exact(near, square, splat(kTanhP[k]));
  vf t;
  vi n;
  const vf p = exp2_parts(a, splat(-2.0f * kLog2E), t, n), e = times_power(p, n);
  const vf tanh = a < splat(kTanhNear) ? a * near : (splat(1.0f) - e) / (splat(1.0f) + e);
  const vf value = as_float(as_int(tanh * splat(cap)) | (as_int(z) & (int32_t)0x80000000));
  return l == l ? value : l;
}

struct Workspace {
  ProductSpace product;
  alignas(64) float bias[kHeadTile];
  alignas(64) float row[kLanes][kHeadTile];
  alignas(64) float judged[kHeadTile], weights[kHeadTile];
  const char* rows[kRowBlock];
};

int64_t blocked(int64_t count) {  // rows of a block, in vectors
  return (std::min(count, kRowBlock) + kLanes - 1) / kLanes;
}

struct Words {
  uint64_t seed;
  uint32_t sample, position;

  Words(const HeadArgs& a, int64_t r) {
    const int64_t flat = a.rows ? a.rows[r] : r, sequence = flat / a.length;
    sample = a.offset + (a.seed_per_sequence ? 0 : (uint32_t)sequence), position = (uint32_t)(flat % a.length);
    if (a.ids) sample = (uint32_t)((uint64_t)a.ids[r] >> 32), position = (uint32_t)a.ids[r];
    seed = (uint64_t)(a.seeds ? a.seeds[a.seed_per_sequence ? sequence : 0] : a.seed);
  }
  uint64_t uniform(uint32_t stream, uint64_t tile) const {
    vu words[4];
    const uint32_t aligned = position / kLanes * kLanes;
    philox_words(PhiloxKey{seed, sample, stream}, tile << 32 | aligned, words);
    const int lane = (int)(position - aligned);
    return (uint64_t)words[0][lane] << 32 | words[1][lane];
  }
};

struct Top {
  float value;
  int64_t index;
};

// The largest of n entries, a multiple of kLanes, and its first place; the first NaN if there is one.
Top find_top(const float* x, int64_t n) {
  vf m0 = splat(-kInfinity), m1 = m0;
  NaNs nans;
  int64_t end = 0;
  for (; end + 2 * kLanes <= n; end += 2 * kLanes) {
    const vf a = load<vf>(x + end), b = load<vf>(x + end + kLanes);
    nans.look(a, b);
    m0 = larger(a, m0), m1 = larger(b, m1);
  }
  if (end < n) {
    const vf a = load<vf>(x + end);
    nans.look(a, a);
    m0 = larger(a, m0);
  }
  if (nans.any()) {
    int64_t i = 0;
    while (x[i] == x[i]) i++;
    return {x[i], i};
  }
  const float value = largest(larger(m0, m1));
  for (int64_t i = 0; i < n; i += kLanes)
    if (any(load<vf>(x + i) == splat(value))) {
      while (x[i] != value) i++;
      return {value, i};
    }
  return {value, 0};
}

double add_exponentials(const float* x, int64_t n, float m, float c) {
  vf even{}, odd{};
  const auto one = [&](int64_t i) {
    vf t;
    vi power;
    const vf p = exp2_parts(load<vf>(x + i) - splat(m), splat(c), t, power);
    return times_power(p, power);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) even += one(i), odd += one(i + kLanes);
  if (i < n) even += one(i);
  return total(even + odd);
}

void drop(const int64_t* from, const int64_t* to, int64_t begin, int64_t n, float* x) {
  for (const int64_t* id = std::lower_bound(from, to, begin); id != to && *id < begin + n; id++)
    x[*id - begin] = -kInfinity;
}

// The sum of the weights of n entries, and the entry drawn.
uint64_t draw(const float* x, int64_t n, float m, float c, uint64_t u, float* v, int64_t& drawn) {
  uint64_t ends[kHeadTile / kStretch], sum = 0;
  for (int64_t from = 0; from < n; from += kStretch) {
    WholeSum whole;
    for (int64_t i = from; i < std::min(n, from + kStretch); i += kLanes) {
      const vf w = weight(load<vf>(x + i) - splat(m), splat(c), vi{} + kTileBits);
      whole.add(w);
      store(v + i, w);
    }
    ends[from / kStretch] = sum += whole.total();
  }
  uint64_t target = high_product(u, sum);
  int64_t chunk = 0;
  while (ends[chunk] <= target) chunk++;
  if (chunk) target -= ends[chunk - 1];
  drawn = chunk * kStretch;
  while (target >= (uint64_t)v[drawn]) target -= (uint64_t)v[drawn++];
  return sum;
}

// The figures of one row and tile; x holds n logits, from entry `begin` of the vocabulary on, and room up to a whole
// vector.
void judge(const HeadArgs& a, int64_t r, int64_t tile, int64_t begin, int64_t n, float* x, Workspace& space) {
  const int64_t at = r * a.tiles + tile, padded = (n + kLanes - 1) / kLanes * kLanes;
  if (a.bias || a.softcap != 0)
    for (int64_t i = 0; i < padded; i += kLanes) {
      vf l = load<vf>(x + i);
      if (a.bias) l += load<vf>(space.bias + i);
      if (a.softcap != 0) l = capped(l, a.softcap);
      store(x + i, l);
    }
  std::fill(x + n, x + padded, -kInfinity);
  drop(a.suppress, a.suppress + a.suppress_count, begin, n, x);
  const Top top = find_top(x, padded);
  const float m = top.value;
  const bool odd = !(m > -kInfinity && m < kInfinity);
  a.largest[at] = m;
  a.index[at] = (int32_t)(begin + top.index);
  const float c = a.scale && a.scale[r] > 0 ? a.scale[r] : kLog2E;
  int64_t chosen = top.index;
  double sum = 0;  // of 2^((l - m) c), once known
  if (a.mass) {
    uint64_t whole = 0;
    if (!odd) {
      int64_t drawn;
      const uint64_t u = Words(a, r).uniform(a.stream, (uint64_t)(begin / kHeadTile) + 1);
      whole = draw(x, padded, m, c, u, space.weights, drawn);
      sum = (double)whole * 0x1p-52;
      if (a.scale[r] > 0) chosen = drawn;
    }
    a.mass[at] = (int64_t)whole;
    a.candidate[at] = (int32_t)(begin + chosen);
  }
  const auto exponentials = [&](const float* x, float m, float own) {
    return (float)(sum != 0 && own == c && x != space.judged ? sum : add_exponentials(x, padded, m, own));
  };
  if (a.exponentials) a.exponentials[at] = odd ? 0.0f : exponentials(x, m, kLog2E);
  const float* judged = x;
  float base = m;
  if (a.judged_largest) {
    std::copy(x, x + padded, space.judged);
    drop(a.suppress_confidence, a.suppress_confidence + a.suppress_confidence_count, begin, n, space.judged);
    judged = space.judged;
    base = odd ? -kInfinity : find_top(judged, padded).value;
    a.judged_largest[at] = base;
  }
  if (a.judged_sum) {
    const float own = a.judged_scale ? a.judged_scale[r] : kLog2E;
    a.judged_sum[at] = odd || base == -kInfinity ? 0.0f : exponentials(judged, base, own);
  }
  if (a.judged_logit) a.judged_logit[at] = odd ? m : judged[chosen];
}

void tile_of_rows(const HeadArgs& a, int64_t tile, Workspace& space, float* out) {
  const int64_t first_cut = (a.first / kHeadTile + 1) * kHeadTile;
  const int64_t begin = tile ? first_cut + (tile - 1) * kHeadTile : a.first;
  const int64_t ids = std::min(first_cut + tile * kHeadTile, a.first + a.size) - begin;
  const int64_t entry = size_of(a.dtype), row_bytes = a.weight_stride * entry;
  const char* weight = a.weight + (begin - a.first) * row_bytes;
  const int64_t last = a.first + a.size - 1 - begin;
  if (a.bias) load_run(a.bias + (begin - a.first) * size_of(a.bias_dtype), a.bias_dtype, ids, space.bias);
  for (int64_t block = 0; block < a.count; block += kRowBlock) {
    const int64_t count = std::min(kRowBlock, a.count - block);
    for (int64_t j = 0; j < count; j++) {
      const int64_t flat = a.rows ? a.rows[block + j] : block + j;
      space.rows[j] = a.hidden + (flat / a.length * a.sequence_stride + flat % a.length * a.position_stride) * entry;
    }
    const auto run = kHasPairs && a.dtype == kBFloat16 ? product<kHasPairs> : product<false>;
    run(space.rows, count, weight, row_bytes, ids, last, a.dtype, a.depth, space.product, out);
    for (int64_t j = 0; j < count; j += kLanes) {
      const float* from = out + j / kLanes * kOutStride;
      for (int64_t i = 0; i < ids; i += kLanes) {
        vf v[kLanes];
        for (int k = 0; k < kLanes; k++) v[k] = load<vf>(from + (i + k) * kLanes);
        transpose(v);
        for (int k = 0; k < kLanes; k++) store(space.row[k] + i, v[k]);
      }
      for (int64_t k = 0; k < std::min<int64_t>(kLanes, count - j); k++)
        judge(a, block + j + k, tile, begin, ids, space.row[k], space);
    }
  }
}

}  // namespace

int64_t head_workspace(int64_t count) { return (int64_t)sizeof(Workspace) + blocked(count) * kOutStride * 4 + 64; }

int head_threads(int64_t count, int64_t size, int64_t depth) {
  const int64_t most = (size + kHeadTile - 1) / kHeadTile;
  return (int)std::min<int64_t>(most, threads_for(count * size * depth, kGrain));
}

void head_partials(const HeadArgs& a) {
  const int64_t bytes = head_workspace(a.count);
  parallel_for(a.threads, a.threads, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const uintptr_t start = ((uintptr_t)(a.workspace + t * bytes) + 63) & ~(uintptr_t)63;
      Workspace* space = new (reinterpret_cast<void*>(start)) Workspace;
      float* out = reinterpret_cast<float*>(start + sizeof(Workspace));
      for (int64_t tile = a.tiles * t / a.threads; tile < a.tiles * (t + 1) / a.threads; tile++)
        tile_of_rows(a, tile, *space, out);
    }
  });
  if (a.uniform)
    for (int64_t r = 0; r < a.count; r++) a.uniform[r] = (int64_t)Words(a, r).uniform(a.stream, 0);
}

namespace {

// The tiles of one row, in whole vectors.
struct Merge {
  std::vector<float> x, e;
  std::vector<uint64_t> shares;

  void read(const float* from, int64_t n) {
    x.assign((n + kLanes - 1) / kLanes * kLanes, -kInfinity);
    std::copy(from, from + n, x.begin());
  }

  // sum of sums[t] 2^((x_t - m) c)
  double scaled(const float* sums, int64_t n, float m, float c) {
    e.resize(x.size());
    for (size_t i = 0; i < x.size(); i += kLanes) {
      vf t;
      vi power;
      const vf p = exp2_parts(load<vf>(&x[i]) - splat(m), splat(c), t, power);
      store(&e[i], times_power(p, power));
    }
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)e[i] * (double)sums[i];
    return sum;
  }

  // The tile drawn.
  int64_t draw(const int64_t* mass, int64_t n, float m, float c, uint64_t u) {
    e.resize(x.size());
    shares.resize(n);
    const vi bits = vi{} + weight_bits(n);
    for (size_t i = 0; i < x.size(); i += kLanes) store(&e[i], weight(load<vf>(&x[i]) - splat(m), splat(c), bits));
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += shares[i] = high_product((uint64_t)mass[i] << 2, (uint64_t)e[i]);
    uint64_t target = high_product(u, sum);
    int64_t tile = 0;
    while (target >= shares[tile]) target -= shares[tile++];
    return tile;
  }
};

void merge_row(const MergeArgs& a, int64_t r, Merge& work) {
  const int64_t row = r * a.tiles;
  work.read(a.largest + row, a.tiles);
  const Top top = find_top(work.x.data(), (int64_t)work.x.size());
  const float m = top.value;
  const auto settle = [&](float value) {  // rows without a distribution
    if (a.confidences) a.confidences[r] = value;
    if (a.logsumexp) a.logsumexp[r] = value == 0 ? -kInfinity : value;
  };
  if (m == -kInfinity) {
    a.tokens[r] = 0;
    return settle(0.0f);
  }
  a.tokens[r] = a.index[row + top.index];
  if (!(m < kInfinity)) return settle(std::numeric_limits<float>::quiet_NaN());

  int64_t tile = top.index;
  if (a.mass && a.scale[r] > 0) {
    tile = work.draw(a.mass + row, a.tiles, m, a.scale[r], (uint64_t)a.uniform[r]);
    a.tokens[r] = a.candidate[row + tile];
  }
  if (a.logsumexp)
    a.logsumexp[r] = (float)((double)m + std::log(work.scaled(a.exponentials + row, a.tiles, m, kLog2E)));
  if (a.confidences) {
    const float c = a.judged_scale ? a.judged_scale[r] : kLog2E;
    float base = m;
    if (a.judged_largest) {
      work.read(a.judged_largest + row, a.tiles);
      base = find_top(work.x.data(), (int64_t)work.x.size()).value;
    }
    const float logit = a.judged_logit ? a.judged_logit[row + tile] : a.largest[row + tile];
    a.confidences[r] = base == -kInfinity
                           ? 0.0f
                           : (float)(exponential(logit, base, c) / work.scaled(a.judged_sum + row, a.tiles, base, c));
  }
}

}  // namespace

void merge_partials(const MergeArgs& args) {
  const int threads = threads_for(args.count * args.tiles, 1 << 14);
  parallel_for(threads, args.count, [&](int64_t first, int64_t last) {
    Merge work;
    for (int64_t r = first; r < last; r++) merge_row(args, r, work);
  });
}

}  // namespace genfast
