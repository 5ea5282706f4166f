// Tokens and confidences from logits. With m the largest logit of a row and c = log2(e) / T,
//
//     v_i = trunc(2^K 2^((l_i - m) c)),   token = first i with v_0 + ... + v_i > floor(u W / 2^64),   W = sum v,
//
// in whole numbers, so that the draw does not depend on who adds what first (genfast/reference/token_sampling.py is the
// specification, to the bit). A row is read twice: for m, from memory; for the sums, from the second-level cache. The
// tile that holds the target is read a third time. Greedy rows need a float sum only. Entries pass through a buffer of
// one tile only if something is done to them first: guidance, suppression, a filter.
#include "cpu/token_sampling.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/order_key.h"
#include "cpu/parallel.h"
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

  bool plain() const { return !uncond && first_suppressed == last_suppressed && first_quiet == last_quiet && !filter; }

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
    const bool direct = plain();
    alignas(64) float buffer[kTile];
    for (int64_t first = from; first < size; first += kTile) {
      const int64_t n = std::min(kTile, size - first);
      bool more;
      if (direct && n % kLanes == 0) {
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

Largest find_largest(const Row& row) {
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

// The second largest, which may equal the largest; -inf if there is none.
float find_second(const Row& row) {
  vf first = splat(-kInfinity), second = first;
  row.tiles([&](auto dt, const char* p, int64_t, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf x = load_logits<dt>(p, i);
      second = larger(second, smaller(first, x));
      first = larger(first, x);
    }
    return true;
  });
  float a = -kInfinity, b = -kInfinity;
  for (int k = 0; k < kLanes; k++)
    for (float x : {first[k], second[k]}) {
      b = std::max(b, std::min(a, x));
      a = std::max(a, x);
    }
  return b;
}

// Asks for a tile of the next row while this one is computed with: sums wait for the arithmetic, the search of the
// largest waits for memory.
inline void prefetch(const Row& row, int64_t first, int64_t n) {
  if (!row.next) return;
  const int64_t entry = size_of(row.dtype);
  for (int64_t at = 0; at < n * entry; at += 64) __builtin_prefetch(row.next + first * entry + at, 0, 2);
}

// Running sums of v at the end of each tile.
uint64_t add_weights(const Row& row, float m, float c, int bits, std::vector<uint64_t>* ends) {
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

int64_t draw(const Row& row, float m, float c, int bits, const std::vector<uint64_t>& ends, uint64_t target) {
  const int64_t tile = std::upper_bound(ends.begin(), ends.end(), target) - ends.begin();
  uint64_t left = target - (tile ? ends[tile - 1] : 0);
  int64_t found = -1;
  const vi exponent = (vi{} + bits);
  row.tiles(
      [&](auto dt, const char* p, int64_t first, int64_t n) {
        for (int64_t from = 0; from < n; from += kChunk) {
          const int64_t to = std::min(n, from + kChunk);
          alignas(64) float v[kChunk];
          WholeSum whole;
          for (int64_t i = from; i < to; i += kLanes) {
            const vf x = weight(load_logits<dt>(p, i) - splat(m), splat(c), exponent);
            whole.add(x);
            store(v + i - from, x);
          }
          const uint64_t sum = whole.total();
          if (left >= sum) {
            left -= sum;
            continue;
          }
          for (int64_t i = from; i < to; i++) {
            const uint64_t w = (uint64_t)v[i - from];
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

// The first key, from above, at which the running sum (of weights, or of entries) exceeds `most`: by 11, 11 and 10 bits
// at a time. With `of_sum`, `most` is a share of the whole, times 2^64. Neighbours are counted apart, for they often
// fall into one bin. After the first pass next to no entry matters, and most vectors are passed over.
struct Crossing {
  uint32_t key = 0;
  uint64_t above = 0, at = 0;  // sums of the larger keys, and of this one
  uint64_t most = 0;           // the sum asked for, where it was given as a share
};

template <bool COUNT>
Crossing cross(const Row& row, float m, float c, int bits, uint64_t most, bool of_sum) {
  constexpr int kBins = 2048;
  Crossing found;
  const vi exponent = (vi{} + bits);
  std::vector<uint64_t> bins(2 * kBins);
  int known = 0;
  for (int width : {11, 11, 10}) {
    std::fill(bins.begin(), bins.end(), 0);
    const int shift = 32 - known - width;
    const uint32_t low = known ? found.key << (32 - known) : 0;
    const uint32_t high = known ? low | ((1u << (32 - known)) - 1) : ~0u;
    row.tiles([&](auto dt, const char* p, int64_t, int64_t n) {
      alignas(64) uint32_t key[kLanes];
      alignas(64) float v[kLanes];
      for (int64_t i = 0; i < n; i += kLanes) {
        const vf x = load_logits<dt>(p, i);
        const vu keys = order_keys(x);
        if (known && !any((keys >= splat(low)) & (keys <= splat(high)))) continue;
        store(key, keys);
        if (!COUNT) store(v, weight(x - splat(m), splat(c), exponent));
        for (int k = 0; k < kLanes; k++)
          if (key[k] >= low && key[k] <= high)
            bins[2 * ((key[k] - low) >> shift) + (k & 1)] += COUNT ? 1 : (uint64_t)(int64_t)v[k];
      }
      return true;
    });
    if (of_sum && !known) {
      uint64_t all = 0;
      for (uint64_t b : bins) all += b;
      found.most = most = high_product(most, all);
    }
    int bin = (1 << width) - 1;
    const auto sum = [&] { return bins[2 * bin] + bins[2 * bin + 1]; };
    for (; bin > 0 && found.above + sum() <= most; bin--) found.above += sum();
    found.at = sum();
    found.key = found.key << width | (uint32_t)bin;
    known += width;
  }
  return found;
}

// Index after the n-th entry that equals x.
int64_t end_of_ties(const Row& row, float x, uint64_t n) {
  int64_t end = 0;
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t entries) {
    for (int64_t i = 0; i < entries; i += kLanes) {
      const vf v = load_logits<dt>(p, i);
      for (int k = 0; k < kLanes; k++)
        if (v[k] == x && n-- == 1) {
          end = first + i + k + 1;
          return false;
        }
    }
    return true;
  });
  return end;
}

// The weight of one logit, by the vector code.
uint64_t one_weight(float x, float m, float c, int bits) {
  return (uint64_t)weight(splat(x) - splat(m), splat(c), vi{} + bits)[0];
}

Filter find_filter(const TokenArgs& a, Row row, float m, float c, int bits) {
  Filter filter;
  filter.ties_end = row.size;
  if (a.share) {
    const Crossing at = cross<false>(row, m, c, bits, a.share, true);
    filter.cut = from_key(at.key);
    const uint64_t v = one_weight(filter.cut, m, c, bits);  // of each of the entries that are equal to the cut
    uint64_t ties = (at.most - at.above) / v + (a.keep_crossing ? 1 : 0);
    if (ties == 0 && filter.cut == m) ties = 1;
    filter.ties_end = ties >= at.at / v ? row.size : ties == 0 ? 0 : end_of_ties(row, filter.cut, ties);
  }
  if (a.top_k && a.top_k < row.size) {
    row.filter = &filter;
    // The k-th largest: the first key at which more than k - 1 have been counted.
    const Crossing at = cross<true>(row, m, c, bits, (uint64_t)a.top_k - 1, false);
    const float cut = from_key(at.key);
    if (cut > filter.cut) filter = Filter{cut, row.size};
  }
  return filter;
}

// argmax of l - T log(-log u). Since -log u >= 1 - u, the noise is at most -log(1 - u): the two logarithms are taken
// only of an entry that could win by that.
int64_t gumbel_argmax(const Row& row, double temperature, const char* noise, bool float64) {
  double best = -std::numeric_limits<double>::infinity();
  int64_t found = 0;
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t n) {
    n = std::min(n, row.size - first);
    alignas(64) float x[kLanes];
    for (int64_t i = 0; i < n; i += kLanes) {
      store(x, load_logits<dt>(p, i));
      for (int k = 0; k < kLanes && i + k < n; k++) {
        const int64_t at = first + i + k;
        const double u =
            float64 ? reinterpret_cast<const double*>(noise)[at] : (double)reinterpret_cast<const float*>(noise)[at];
        uint64_t bits;
        const double rest = 1.0 - u;
        std::memcpy(&bits, &rest, 8);
        const double bound = (double)(1023 - (int)(bits >> 52)) * kLn2;  // at least -log(1 - u)
        if ((double)x[k] + temperature * bound < best) continue;
        const double value = (double)x[k] - temperature * std::log(-std::log(u));
        if (value > best) best = value, found = at;
      }
    }
    return true;
  });
  return found;
}

const char* address(const TokenArgs& a, const Logits& l, int64_t r) {
  if (!l.data) return nullptr;
  const int64_t flat = a.rows ? a.rows[r] : r, sequence = flat / a.length, position = flat % a.length;
  const int64_t source = a.shift && position ? position - 1 : position;
  return l.data + (sequence * l.sequence_stride + source * l.position_stride) * size_of(l.dtype);
}

void sample_row(const TokenArgs& a, int64_t r, bool last, std::vector<uint64_t>& ends) {
  const int64_t flat = a.rows ? a.rows[r] : r, sequence = flat / a.length, position = flat % a.length;
  Row row{};
  row.data = address(a, a.logits, r), row.dtype = a.logits.dtype;
  row.uncond = address(a, a.uncond, r), row.uncond_dtype = a.uncond.dtype;
  row.guidance = a.guidance;
  row.size = a.size;
  row.first_suppressed = a.suppress, row.last_suppressed = a.suppress + a.suppress_count;
  row.next = last ? nullptr : address(a, a.logits, r + 1);
  const int bits = weight_bits(a.size);
  const float nan = std::numeric_limits<float>::quiet_NaN();

  vu words[4];
  uint64_t u = 0;
  if (a.philox) {
    uint32_t sample = a.offset + (a.seed_per_sequence ? 0 : (uint32_t)sequence), block = (uint32_t)position;
    if (a.ids) sample = (uint32_t)((uint64_t)a.ids[r] >> 32), block = (uint32_t)a.ids[r];
    const uint64_t seed = (uint64_t)(a.seeds ? a.seeds[a.seed_per_sequence ? sequence : 0] : a.seed);
    const uint32_t aligned = block / kLanes * kLanes;
    philox_words(PhiloxKey{seed, sample, a.stream}, aligned, words);
    const int lane = (int)(block - aligned);
    u = (uint64_t)words[0][lane] << 32 | words[1][lane];
    if (a.confidence == kRandom) a.confidences[r] = (float)(words[2][lane] >> 8) * 0x1p-24f;
  }
  const auto settle = [&](float value) {  // rows without a distribution
    if (a.confidences && a.confidence != kRandom) a.confidences[r] = value;
    if (a.logsumexp) a.logsumexp[r] = value == 0 ? -kInfinity : value;
    if (a.entropy) a.entropy[r] = value;
    if (a.margin) a.margin[r] = value;
  };

  const Largest top = find_largest(row);
  const float m = top.value;
  a.tokens[r] = top.index;
  if (top.nan || m == kInfinity) return settle(nan);
  if (m == -kInfinity) return settle(0);

  const float asked = a.scales ? a.scales[r] : a.scale;
  const bool tempered = asked > 0;
  const float c = tempered ? asked : kLog2E;
  Filter filter;
  Row left = row;
  const bool filtered = a.share || (a.top_k && a.top_k < a.size);
  const bool of_filtered = a.confidence >= kTempered && a.confidence <= kNegativeEntropy;
  if (filtered && (tempered || of_filtered)) {
    filter = find_filter(a, row, m, c, bits);
    left.filter = &filter;
  }
  double sum = 0;           // of 2^((l - m) log2 e) over the row, once known
  double tempered_sum = 0;  // of 2^((l - m) c) over what is left of it, once known
  if (tempered && a.noise) {
    const int64_t entry = flat * a.size * (a.noise_is_float64 ? 8 : 4);
    a.tokens[r] =
        gumbel_argmax(left, a.temperatures ? a.temperatures[r] : a.temperature, a.noise + entry, a.noise_is_float64);
  } else if (tempered && a.philox) {
    const uint64_t all = add_weights(left, m, c, bits, &ends);
    a.tokens[r] = draw(left, m, c, bits, ends, high_product(u, all));
    tempered_sum = std::ldexp((double)all, -bits);
    if (!filtered && c == kLog2E) sum = tempered_sum;
  }

  const auto entry = [&](int64_t i) {
    float x;
    row.fill(i, 1, &x);
    return x;
  };
  const bool quiet = a.suppress_confidence_count > 0;
  const auto without_quiet = [&](Row of) {
    of.first_quiet = a.suppress_confidence;
    of.last_quiet = a.suppress_confidence + a.suppress_confidence_count;
    return of;
  };
  const auto is_quiet = [&](int64_t id) {
    return std::binary_search(a.suppress_confidence, a.suppress_confidence + a.suppress_confidence_count, id);
  };

  const bool own_sum = a.logsumexp || a.margin || a.entropy || (a.confidence == kProbability && !quiet);
  double et = 0;
  if (a.entropy) {
    const Sums sums = add_exponentials<true>(row, m, kLog2E);
    sum = sums.e, et = sums.et;
  } else if (own_sum && sum == 0) {
    sum = add_exponentials<false>(row, m, kLog2E).e;
  }
  if (a.logsumexp) a.logsumexp[r] = (float)((double)m + std::log(sum));
  if (a.entropy) a.entropy[r] = (float)std::max(0.0, std::log(sum) - et / sum * kLn2);
  if (a.margin) a.margin[r] = (float)((1 - exponential(find_second(row), m, kLog2E)) / sum);

  if (a.confidence == kProbability) {
    const int64_t token = a.tokens[r];
    if (quiet && is_quiet(token)) {
      a.confidences[r] = 0.0f;
    } else {
      // Of what is left the largest may be another one.
      float base = m;
      if (quiet) {
        const Row others = without_quiet(row);
        base = find_largest(others).value;
        sum = add_exponentials<false>(others, base, kLog2E).e;
      }
      a.confidences[r] = (float)(exponential(entry(token), base, kLog2E) / sum);
    }
  } else if (of_filtered) {
    Row judged = quiet ? without_quiet(left) : left;
    const float base = quiet ? find_largest(judged).value : m;
    const int64_t token = a.tokens[r];
    if (base == -kInfinity || (a.confidence == kTempered && quiet && is_quiet(token))) {
      a.confidences[r] = 0.0f;
    } else if (a.confidence == kNegativeEntropy) {
      const Sums sums = add_exponentials<true>(judged, base, c);
      a.confidences[r] = (float)std::min(0.0, sums.et / sums.e * kLn2 - std::log(sums.e));
    } else {
      const double all = quiet || tempered_sum == 0 ? add_exponentials<false>(judged, base, c).e : tempered_sum;
      if (a.confidence == kTempered)
        a.confidences[r] = (float)(exponential(entry(token), base, c) / all);
      else
        a.confidences[r] = (float)((1 - exponential(find_second(judged), base, c)) / all);
    }
  }
}

}  // namespace

void sample_tokens(const TokenArgs& args) {
  if (args.count == 0) return;
  const int threads = threads_for(args.count * args.size, kGrain);
  parallel_for(threads, args.count, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> ends;
    for (int64_t r = first; r < last; r++) sample_row(args, r, r + 1 == last, ends);
  });
}

}  // namespace genfast
