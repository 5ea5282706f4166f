// One reverse step of a discrete diffusion. A token stays with weight H, or goes to another id y with a weight
// proportional to v_y, the whole-number weight of the draw:
//
//     jump:       H = max(0, X - W),   X = 2^K e^-m / c,            W = sum v over the other ids
//     uniform:    H = b g_x,           g = max(0, v - floor(a W)),  W = sum v over all
//     posterior:  H = a W / (1 - a)
//
// (genfast/reference/token_transition.py is the specification, to the bit). The rows that can change are listed first,
// so that threads share the rows that are read and not those that are passed over: of an absorbing graph only masked
// ones, and of a posterior only those that its random number unmasks. Such a row is read as in token_sampling.cpp, once
// from memory for the largest, then from the second-level cache for the sums (the uniform law adds twice), and the tile
// of the target once more.
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/token_filter.h"
#include "cpu/token_rows.h"
#include "cpu/token_sampling.h"

namespace genfast {
namespace {

constexpr double kLog2EDouble = 1.4426950408889634;
constexpr double kFarthest = 900.0;
constexpr double kEps = 1e-10;

// 2^bits e^-m: a float32 polynomial times a power of two, which is exact.
double inverse_exponential(float m, int bits) {
  const double t = std::min(std::max((double)m * -kLog2EDouble, -kFarthest), kFarthest);
  const double n = std::nearbyint(t);
  return std::ldexp((double)exp2_fraction(splat((float)(t - n)))[0], (int)n + bits);
}

// u, from words 2 and 3.
double fraction(const uint32_t words[4]) {
  return (double)((uint64_t)words[2] << 21 | (uint64_t)words[3] >> 11) * 0x1p-53;
}

// The Philox words of positions, which are neighbours more often than not: a vector of blocks is kept for the next.
class Words {
 public:
  explicit Words(const TransitionArgs& args) : a_(args) {}

  void find(int64_t sequence, int64_t position, uint32_t to[4]) {
    uint32_t sample = a_.offset + (a_.seed_per_sequence ? 0 : (uint32_t)sequence), block = (uint32_t)position;
    if (a_.ids) {
      const uint64_t id = (uint64_t)a_.ids[sequence * a_.length + position];
      sample = (uint32_t)(id >> 32), block = (uint32_t)id;
    }
    const uint64_t seed = (uint64_t)(a_.seeds ? a_.seeds[a_.seed_per_sequence ? sequence : 0] : a_.seed);
    const uint32_t first = block / kLanes * kLanes;
    if (!known_ || seed != seed_ || sample != sample_ || first != first_) {
      philox_words(PhiloxKey{seed, sample, a_.stream}, first, words_);
      known_ = true, seed_ = seed, sample_ = sample, first_ = first;
    }
    for (int w = 0; w < 4; w++) to[w] = words_[w][block - first];
  }

 private:
  const TransitionArgs& a_;
  bool known_ = false;
  uint64_t seed_ = 0;
  uint32_t sample_ = 0, first_ = 0;
  vu words_[4];
};

// Sums of what is left of the weights, at the end of each tile.
uint64_t add_floored(const Row& row, float m, float c, int bits, const Floor& floor, std::vector<uint64_t>& ends) {
  uint64_t sum = 0;
  const vi exponent = (vi{} + bits);
  ends.clear();
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t n) {
    prefetch(row, first, n);
    FlooredSum tile;
    for (int64_t i = 0; i < n; i += kLanes)
      tile.add(weight(load_logits<dt>(p, i) - splat(m), splat(c), exponent), floor);
    sum += tile.total(floor);
    ends.push_back(sum);
    return true;
  });
  return sum;
}

template <class T>
double gumbel_argument(const char* noise, int64_t at) {
  return (double)(reinterpret_cast<const T*>(noise)[at] + (T)kEps);
}

// argmax of weight / (eps - log(u + eps)) over the other ids and, with weight `stay`, the token itself. Since
// -log w >= 1 - w, the logarithm is taken only of an entry that could win by that.
int64_t noisy_argmax(const TransitionArgs& a, const Row& row, float m, float c, int bits, const Floor& floor,
                     const char* noise, int64_t own, double stay) {
  const auto argument = [&](int64_t at) {
    return a.noise_is_float64 ? gumbel_argument<double>(noise, at) : gumbel_argument<float>(noise, at);
  };
  const vi exponent = (vi{} + bits);
  double best = -1;
  int64_t found = own;
  row.tiles([&](auto dt, const char* p, int64_t first, int64_t n) {
    n = std::min(n, row.size - first);
    alignas(64) float v[kLanes];
    for (int64_t i = 0; i < n; i += kLanes) {
      store(v, weight(load_logits<dt>(p, i) - splat(m), splat(c), exponent));
      for (int k = 0; k < kLanes && i + k < n; k++) {
        const int64_t at = first + i + k;
        const double value = (double)floor.left(v[k]);
        if (at == own) continue;
        const double w = argument(at);
        if (value < best * (1 - w)) continue;
        const double now = value / (kEps - std::log(w));
        if (now > best) best = now, found = at;
      }
    }
    return true;
  });
  if (stay > 0) {
    const double now = stay / (kEps - std::log(argument(own)));
    if (now > best || (now == best && own < found)) found = own;
  }
  return found;
}

const char* address(const TransitionArgs& a, int64_t flat) {
  const int64_t sequence = flat / a.length, position = flat % a.length;
  return a.output.data +
         (sequence * a.output.sequence_stride + position * a.output.position_stride) * size_of(a.output.dtype);
}

// The next token of a row that may change.
int64_t next_token(const TransitionArgs& a, int64_t flat, const char* next_row, Words& words,
                   std::vector<uint64_t>& ends) {
  const int64_t sequence = flat / a.length, position = flat % a.length;
  const int64_t own = a.x.at(sequence, position);
  const double first = a.a[sequence], second = a.b[sequence];
  if (first != first) return own;
  Row all{};
  all.data = address(a, flat), all.dtype = a.output.dtype;
  all.size = a.size;
  all.next = next_row;
  Row others = all;
  others.first_suppressed = &own, others.last_suppressed = &own + 1;
  const bool uniform = a.law == kUniform;

  const Largest top = find_largest(uniform ? all : others);
  const float m = top.value, c = a.scale > 0 ? a.scale : kLog2E;
  if (top.nan || std::isinf(m)) return own;
  if (a.scale == 0) return top.index;
  const int bits = weight_bits(a.size);
  Filter filter;
  if (a.share) {
    filter = find_filter(others, m, c, bits, 0, a.share, a.keep_crossing);
    others.filter = &filter;
  }

  Floor floor;
  uint64_t sum;
  double stay, whole;  // of the token itself; of everything
  if (uniform) {
    floor = Floor((uint64_t)(int64_t)(first * (double)add_weights(all, m, c, bits, nullptr)));
    float x;
    all.fill(own, 1, &x);
    const double left = (double)floor.left(weight(splat(x) - splat(m), splat(c), vi{} + bits)[0]);
    stay = std::isinf(second) ? second : second * left;
    sum = add_floored(others, m, c, bits, floor, ends);
    whole = (double)sum + stay;
  } else {
    sum = add_weights(others, m, c, bits, &ends);
    whole = a.law == kJump ? inverse_exponential(m, bits) * first : 0;
    stay = a.law == kJump ? std::max(whole - (double)sum, 0.0) : first * (double)sum / (1 - first);
  }
  if (a.noise) {
    const int64_t entry = flat * a.noise_width * (a.noise_is_float64 ? 8 : 4);
    return noisy_argmax(a, others, m, c, bits, floor, a.noise + entry, own, stay);
  }
  uint32_t w[4];
  words.find(sequence, position, w);
  if (a.law != kPosterior && !(fraction(w) * whole < (double)sum)) return own;
  return draw(others, m, c, bits, ends, high_product((uint64_t)w[0] << 32 | w[1], sum), floor);
}

// Whether a row may change, as far as can be said without reading it.
bool may_change(const TransitionArgs& a, int64_t sequence, int64_t position, Words& words) {
  if (a.masked_only && a.x.at(sequence, position) != a.mask_id) return false;
  if (a.active.data && !a.active.at(sequence, position)) return false;
  if (a.law != kPosterior || a.noise) return true;
  uint32_t w[4];
  words.find(sequence, position, w);
  return fraction(w) >= a.a[sequence];
}

}  // namespace

void discrete_transition(const TransitionArgs& args) {
  std::vector<int64_t> rows;
  Words words(args);
  for (int64_t sequence = 0; sequence < args.batch; sequence++)
    for (int64_t position = 0; position < args.length; position++) {
      if (may_change(args, sequence, position, words))
        rows.push_back(sequence * args.length + position);
      else
        args.out.at(sequence, position) = args.x.at(sequence, position);
    }
  const int64_t count = (int64_t)rows.size();
  parallel_for(threads_for(count * args.size, kGrain), count, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> ends;
    Words words(args);
    for (int64_t r = first; r < last; r++) {
      const int64_t sequence = rows[r] / args.length, position = rows[r] % args.length;
      const int64_t before = args.x.at(sequence, position);
      const int64_t token = next_token(args, rows[r], r + 1 < last ? address(args, rows[r + 1]) : nullptr, words, ends);
      args.out.at(sequence, position) = token;
      if (token != before) __atomic_store_n(args.changed + sequence, 1, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace genfast
