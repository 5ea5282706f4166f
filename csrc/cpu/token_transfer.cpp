// Which masked positions to unmask, and the write. Order: the score falling, equal scores by position.
//
// The n best of a row need no sort: the score at which n positions are reached is found by guesses at its 32-bit key,
// a count of all keys each. Strategies that look at the order itself (factor, entropy bound) sort.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/order_key.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/token_sampling.h"

namespace genfast {
namespace {

constexpr int64_t kSelectGrain = 1 << 14;
constexpr float kNever = std::numeric_limits<float>::infinity();

struct Workspace {
  std::vector<float> score;
  std::vector<uint32_t> key;  // 0: no candidate
  std::vector<uint64_t> order;
};

// Word 3 of positions [first, first + kLanes).
vu position_words(const SelectArgs& a, int64_t row, int64_t first) {
  const uint64_t seed = (uint64_t)(a.seeds ? a.seeds[a.seed_per_sequence ? row : 0] : a.seed);
  vu words[4];
  philox_words(PhiloxKey{seed, a.offset + (a.seed_per_sequence ? 0 : (uint32_t)row), a.stream}, (uint64_t)first, words);
  return words[3];
}

void find_scores(const SelectArgs& a, int64_t row, float* score) {
  const float* confidence = a.confidence + row * a.confidence_stride;
  if (a.strategy == kSequential) {
    for (int64_t i = 0; i < a.length; i++) score[i] = -(float)i;
    return;
  }
  if (a.strategy != kRandomOrder && a.temperature == 0) {
    for (int64_t i = 0; i < a.length; i++) score[i] = confidence[i] == confidence[i] ? confidence[i] : -kNever;
    return;
  }
  for (int64_t first = 0; first < a.length; first += kLanes) {
    const vu words = position_words(a, row, first);
    const int64_t n = std::min<int64_t>(kLanes, a.length - first);
    for (int64_t k = 0; k < n; k++) {
      if (a.strategy == kRandomOrder) {
        score[first + k] = (float)(words[k] >> 8);
      } else {
        const double u = ((double)words[k] + 0.5) * 0x1p-32;
        const float noisy = (float)((double)confidence[first + k] / a.temperature - std::log(-std::log(u)));
        score[first + k] = noisy == noisy ? noisy : -kNever;
      }
    }
  }
}

// How many keys are at least `least`; `n` is a multiple of kLanes.
int64_t count_from(const uint32_t* key, int64_t n, uint32_t least) {
  vi sum{};
  for (int64_t i = 0; i < n; i += kLanes) sum -= (vi)(load<vu>(key + i) >= splat(least));
  int64_t count = 0;
  for (int k = 0; k < kLanes; k++) count += sum[k];
  return count;
}

// The smallest key of a candidate and the largest key; `n` is a multiple of kLanes.
void find_range(const uint32_t* key, int64_t n, uint64_t& least, uint64_t& most) {
  // Keys less one wrap to the largest number where there is no candidate.
  vu low = splat(~0u), high{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vu k = load<vu>(key + i), less = k - splat(1u);
    low = less < low ? less : low;
    high = k > high ? k : high;
  }
  least = ~0u, most = 0;
  for (int k = 0; k < kLanes; k++) {
    least = std::min<uint64_t>(least, low[k]);
    most = std::max<uint64_t>(most, high[k]);
  }
  least++;
}

void choose_best(const std::vector<uint32_t>& key, int64_t n, int64_t length, uint8_t* out) {
  const int64_t padded = (int64_t)key.size();
  const int64_t all = count_from(key.data(), padded, 1);
  if (n >= all) {
    for (int64_t i = 0; i < length; i++) out[i] = key[i] > 0;
    return;
  }
  // The largest key that n positions reach: `low` always has enough, `high` too few. A key that exactly n reach will do
  // as well, and is found long before. Every other guess is where n would be if keys were spread evenly between the
  // two, which finds it in a few steps; halving in between keeps the number of steps below 64 in the worst case.
  uint64_t low = 0, high = 0;
  find_range(key.data(), padded, low, high);
  high++;
  int64_t at_low = all, at_high = 0;
  for (bool even = true; high - low > 1; even = !even) {
    uint64_t middle = (low + high) / 2;
    if (even) {
      const double share = (double)(n - at_high) / (double)(at_low - at_high);
      middle = high - (uint64_t)((double)(high - low) * share);
      middle = std::min(std::max(middle, low + 1), high - 1);
    }
    const int64_t count = count_from(key.data(), padded, (uint32_t)middle);
    if (count == n) {
      for (int64_t i = 0; i < length; i++) out[i] = key[i] >= middle;
      return;
    }
    if (count > n)
      low = middle, at_low = count;
    else
      high = middle, at_high = count;
  }
  int64_t ties = n - (low == ~0u ? 0 : count_from(key.data(), padded, (uint32_t)low + 1));
  for (int64_t i = 0; i < length; i++) {
    const bool tie = key[i] == low;
    out[i] = key[i] > low || (tie && ties > 0);
    ties -= tie;
  }
}

// Candidates from the best, as (key, position) in one number each.
void sort_candidates(Workspace& w, int64_t length) {
  w.order.clear();
  for (int64_t i = 0; i < length; i++)
    if (w.key[i]) w.order.push_back((uint64_t)w.key[i] << 32 | (uint32_t)~(uint32_t)i);
  std::sort(w.order.begin(), w.order.end(), std::greater<uint64_t>());
}

int64_t reached(const SelectArgs& a, const Workspace& w) {
  const int64_t count = (int64_t)w.order.size();
  const auto score = [&](int64_t rank) { return w.score[(uint32_t)~(uint32_t)w.order[rank]]; };
  if (a.strategy == kFactor) {
    int64_t first = 1;
    while (first < count && score(first) >= (float)(1 - a.factor / (double)(first + 2))) first++;
    first = std::min(first, count);
    return a.accept_last && first == count - 1 ? count : first;
  }
  double sum = 0;
  for (int64_t rank = 0; rank < count; rank++) {
    const double entropy = -(double)score(rank);
    const bool within = a.inclusive ? sum + entropy < a.bound : sum <= a.bound;
    if (!within) return rank;
    sum += entropy;
  }
  return count;
}

void select_row(const SelectArgs& a, int64_t row, Workspace& w) {
  const uint8_t* mask = a.mask + row * a.mask_stride;
  uint8_t* out = a.out + row * a.length;
  find_scores(a, row, w.score.data());
  const int64_t start = std::max<int64_t>(a.start[row], 0), end = std::min(a.end[row], a.length);
  std::fill(w.key.begin(), w.key.end(), 0);
  // The key of -inf is 0x7FFFFF, so 0 is free to say "no candidate".
  for (int64_t i = start; i < end; i++) w.key[i] = mask[i] ? order_key(w.score[i]) : 0;

  int64_t n = std::max<int64_t>(a.n[row], 0);
  if (a.strategy == kFactor || a.strategy == kEntropyBound) {
    sort_candidates(w, a.length);
    n = std::max(n, reached(a, w));
  }
  if (n == 0)
    std::fill(out, out + a.length, 0);
  else
    choose_best(w.key, n, a.length, out);

  const auto reaches = [&](float score, float limit) { return a.strict ? score > limit : score >= limit; };
  if (a.strategy == kThreshold || a.strategy == kHierarchy) {
    float limit = a.threshold;
    if (a.slack >= 0) {
      float best = -kNever;
      for (int64_t i = start; i < end; i++) best = w.key[i] ? std::max(best, w.score[i]) : best;
      limit = std::min(std::max(best - a.slack, std::numeric_limits<float>::lowest()), limit);
    }
    for (int64_t i = start; i < end; i++) out[i] |= w.key[i] && reaches(w.score[i], limit);
  }
  if (a.strategy == kHierarchy) {
    for (int64_t i = start; i < end;) {
      if (!w.key[i]) {
        i++;
        continue;
      }
      int64_t best = i;
      for (; i < end && w.key[i]; i++)
        if (w.key[i] > w.key[best]) best = i;
      if (reaches(w.score[best], a.low_threshold)) out[best] = 1;
    }
  }
}

}  // namespace

void select_transfer(const SelectArgs& args) {
  const int threads = threads_for(args.batch * args.length, kSelectGrain);
  parallel_for(threads, args.batch, [&](int64_t first, int64_t last) {
    Workspace w;
    w.score.resize(args.length);
    w.key.resize((args.length + kLanes - 1) / kLanes * kLanes);
    for (int64_t row = first; row < last; row++) select_row(args, row, w);
  });
}

void commit(const CommitArgs& a) {
  parallel_for(threads_for(a.batch * a.length, kSelectGrain), a.batch, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      int64_t* x = a.x + row * a.x_stride;
      const int64_t* tokens = a.tokens + row * a.tokens_stride;
      const uint8_t* selected = a.selected + row * a.selected_stride;
      int64_t left = 0, first_mask = a.length, first_eos = a.length;
      for (int64_t i = 0; i < a.length; i++) {
        x[i] = selected[i] ? tokens[i] : x[i];
        left += x[i] == a.mask_id;
      }
      for (int64_t i = 0; i < a.length && first_mask == a.length && first_eos == a.length; i++) {
        if (x[i] == a.mask_id) first_mask = i;
        if (a.has_eos && x[i] == a.eos_id) first_eos = i;
      }
      a.left[row] = left;
      a.finished[row] = left == 0 || first_eos < first_mask;
    }
  });
}

}  // namespace genfast
