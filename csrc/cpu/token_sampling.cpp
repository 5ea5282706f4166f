// Tokens and confidences from logits. With m the largest logit of a row and c = log2(e) / T,
//
//     v_i = trunc(2^K 2^((l_i - m) c)),   token = first i with v_0 + ... + v_i > floor(u W / 2^64),   W = sum v,
//
// in whole numbers, so that the draw does not depend on who adds what first (genfast/reference/token_sampling.py is the
// specification, to the bit). A row is read twice: for m, from memory; for the sums, from the second-level cache. The
// tile that holds the target is read a third time. Greedy rows need a float sum only. Entries pass through a buffer of
// one tile only if something is done to them first: guidance, suppression, a filter.
#include "cpu/token_sampling.h"

#include "cpu/parallel.h"
#include "cpu/token_filter.h"
#include "cpu/token_rows.h"

namespace genfast {
namespace {

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

  uint32_t words[4];
  uint64_t u = 0;
  if (a.philox) {
    uint32_t sample = a.offset + (a.seed_per_sequence ? 0 : (uint32_t)sequence), block = (uint32_t)position;
    if (a.ids) sample = (uint32_t)((uint64_t)a.ids[r] >> 32), block = (uint32_t)a.ids[r];
    const uint64_t seed = (uint64_t)(a.seeds ? a.seeds[a.seed_per_sequence ? sequence : 0] : a.seed);
    row_words(seed, sample, a.stream, block, words);
    u = (uint64_t)words[0] << 32 | words[1];
    if (a.confidence == kRandom) a.confidences[r] = (float)(words[2] >> 8) * 0x1p-24f;
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
    filter = find_filter(row, m, c, bits, a.top_k, a.share, a.keep_crossing);
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
