// `ema_update_`: a codebook that follows moving averages. With n and s the count and the sum of a code's vectors
// (genfast/reference/code_update.py is the specification):
//
//     N += (1 - decay) (n - N),  A += (1 - decay) (s - A),  T = sum N
//     codebook = A / ((N + eps) / (T + K eps) T)
//     dead codes, N < threshold: codebook = a vector z, N = reset, A = reset z
//
// The cluster sizes go first, for their sum and for the dead codes; then one pass over the rows of the codebook and of
// A, which are all of the memory there is to speak of, does the rest. A code's vectors are added there, where they are
// needed, in float64 and in their own order: the result does not depend on the number of threads.
#include <cmath>

#include "cpu/code_segments.h"
#include "cpu/philox.h"

namespace genfast {
namespace {

// floor(a b / 2^64), and the remainder.
inline uint64_t shared_out(uint64_t a, uint64_t b, uint64_t& rest) {
  const unsigned __int128 product = (unsigned __int128)a * b;
  rest = (uint64_t)product;
  return (uint64_t)(product >> 64);
}

// The vectors that the slots of one group draw on this rank, in the order of the slots.
class Slots {
 public:
  Slots(const AverageArgs& args, int64_t group) : a_(args), group_(group), taken_(args.n.count()) {}

  // The vector of slot j, or -1 if it is empty or another rank's.
  int64_t draw(int64_t j) {
    if (j / kLanes != block_ / kLanes || block_ < 0) {
      philox_words(PhiloxKey{a_.draw.seed, a_.draw.offset, a_.draw.stream},
                   (uint64_t)group_ << 32 | (uint64_t)(j / kLanes * kLanes), words_);
      block_ = j;
    }
    uint64_t bits = (uint64_t)words_[0][j % kLanes] << 32 | words_[1][j % kLanes];
    if ((int64_t)shared_out(bits, (uint64_t)a_.draw.world, bits) != a_.draw.rank || !a_.n.count()) return -1;
    const int64_t r = (int64_t)shared_out(bits, (uint64_t)a_.n.count(), bits);
    if (taken_[r] || (uint64_t)a_.indices[r * a_.n.groups + group_] >= (uint64_t)a_.n.codes) return -1;
    taken_[r] = true;
    return r;
  }

 private:
  const AverageArgs& a_;
  int64_t group_, block_ = -1;
  std::vector<bool> taken_;
  vu words_[4];
};

// Of each code of a group, the slot (or whatever `draw` gives for it) that revives it, or -1.
template <class Draw>
std::vector<int64_t> revived(const AverageArgs& a, int64_t group, const Draw& draw) {
  std::vector<int64_t> found(a.n.codes, -1);
  const float* sizes = a.cluster_size + group * a.n.codes;
  for (int64_t k = 0, j = 0; k < a.n.codes && j < a.n.codes; k++) {
    if (!(sizes[k] < a.threshold)) continue;
    while (j < a.n.codes && found[k] < 0) found[k] = draw(j++);
  }
  return found;
}

// The arithmetic of torch.lerp.
inline float lerp(float from, float to, float weight, float rest) {
  const float difference = to - from;
  return weight < 0.5f ? from + weight * difference : to - difference * rest;
}

float average_sizes(const AverageArgs& a, int64_t group, const float* counts, int64_t stride) {
  float* sizes = a.cluster_size + group * a.n.codes;
  double total = 0;
  for (int64_t k = 0; k < a.n.codes; k++) {
    sizes[k] = lerp(sizes[k], counts[k * stride], a.weight, a.rest);
    total += (double)sizes[k];
  }
  return (float)total;
}

// Averages, smooths and writes one row; `sum` is what its vectors add up to, null where there are none.
void average_row(const AverageArgs& a, int64_t row, float total, const float* sum) {
  const int64_t size = a.n.size;
  float* __restrict average = a.embed_avg + row * size;
  float* __restrict code = a.codebook + row * size;
  const float codes = (float)a.n.codes;
  const float smooth = (a.cluster_size[row] + a.eps) / (total + codes * a.eps) * total;
  const float weight = a.weight, rest = a.rest;
  if (!sum)
    for (int64_t d = 0; d < size; d++) average[d] = lerp(average[d], 0.0f, weight, rest);
  else
    for (int64_t d = 0; d < size; d++) average[d] = lerp(average[d], sum[d], weight, rest);
  if (!(smooth > 0)) return;
  for (int64_t d = 0; d < size; d++) code[d] = average[d] / smooth;
  if (!a.cosine) return;
  const float length = length_of(code, size);
  for (int64_t d = 0; d < size; d++) code[d] /= length;
}

void revive(const AverageArgs& a, int64_t row, const float* vector, float divisor) {
  const int64_t size = a.n.size;
  float* code = a.codebook + row * size;
  float* average = a.embed_avg + row * size;
  for (int64_t d = 0; d < size; d++) {
    code[d] = vector[d] / divisor;
    average[d] = code[d] * a.reset;
  }
  a.cluster_size[row] = a.reset;
}

int threads_of(const AverageArgs& a) {
  return threads_for((a.n.count() + a.n.codes) * a.n.groups * a.n.size, kVectorGrain);
}

// Sums of the vectors of codes, of one thread.
class CodeSum {
 public:
  CodeSum(const AverageArgs& args, const Segments& segments)
      : a_(args), segments_(segments), adder_(args.n.size), sum_(args.n.size) {}

  const float* vector(int64_t r, int64_t g) { return adder_.read(a_.z, a_.n, r, g); }
  float divisor(const float* vector) const { return a_.cosine ? length_of(vector, a_.n.size) : 1.0f; }

  // Null where there are none.
  const float* sum(int64_t g, int64_t k) {
    const int64_t count = segments_.count(g, k), *rows = segments_.begin(g, k);
    if (!count) return nullptr;
    adder_.clear();
    for (int64_t i = 0; i < count; i++) {
      const float* x = vector(rows[i], g);
      adder_.add(x, divisor(x));
    }
    std::copy(adder_.total(), adder_.total() + a_.n.size, sum_.begin());
    return sum_.data();
  }

 private:
  const AverageArgs& a_;
  const Segments& segments_;
  Adder adder_;
  std::vector<float> sum_;
};

}  // namespace

void ema_update(const AverageArgs& a) {
  const Segments segments(a.indices, a.n);
  std::vector<float> totals(a.n.groups), counts(a.n.codes);
  std::vector<std::vector<int64_t>> revivals(a.n.groups);
  for (int64_t g = 0; g < a.n.groups; g++) {
    for (int64_t k = 0; k < a.n.codes; k++) counts[k] = (float)segments.count(g, k);
    totals[g] = average_sizes(a, g, counts.data(), 1);
    if (!(a.threshold > 0)) continue;
    Slots slots(a, g);
    revivals[g] = revived(a, g, [&](int64_t j) { return slots.draw(j); });
  }
  parallel_for(threads_of(a), a.n.groups * a.n.codes, [&](int64_t first, int64_t last) {
    CodeSum sums(a, segments);
    for (int64_t row = first; row < last; row++) {
      const int64_t g = row / a.n.codes, k = row % a.n.codes;
      const int64_t from = revivals[g].empty() ? -1 : revivals[g][k];
      if (from < 0) {
        average_row(a, row, totals[g], sums.sum(g, k));
        continue;
      }
      const float* x = sums.vector(from, g);
      revive(a, row, x, sums.divisor(x));
    }
  });
}

void code_sums(const AverageArgs& a) {
  const Segments segments(a.indices, a.n);
  const int64_t width = a.n.size + 1;
  std::vector<std::vector<int64_t>> drawn(a.n.groups);
  if (a.slots)
    for (int64_t g = 0; g < a.n.groups; g++) {
      Slots slots(a, g);
      for (int64_t j = 0; j < a.n.codes; j++) drawn[g].push_back(slots.draw(j));
    }
  parallel_for(threads_of(a), a.n.groups * a.n.codes, [&](int64_t first, int64_t last) {
    CodeSum sums(a, segments);
    const std::vector<float> none(width);
    for (int64_t row = first; row < last; row++) {
      const int64_t g = row / a.n.codes, k = row % a.n.codes;
      const float* sum = sums.sum(g, k);
      std::copy_n(sum ? sum : none.data(), a.n.size, a.sums + row * width);
      a.sums[row * width + a.n.size] = (float)segments.count(g, k);
      if (!a.slots) continue;
      float* slot = a.slots + row * width;
      const int64_t from = drawn[g][k];
      slot[a.n.size] = from < 0 ? 0.0f : 1.0f;
      const float* x = from < 0 ? none.data() : sums.vector(from, g);
      const float divisor = from < 0 ? 1.0f : sums.divisor(x);
      for (int64_t d = 0; d < a.n.size; d++) slot[d] = x[d] / divisor;
    }
  });
}

void ema_apply(const AverageArgs& a) {
  const int64_t width = a.n.size + 1;
  std::vector<float> totals(a.n.groups);
  std::vector<std::vector<int64_t>> revivals(a.n.groups);
  for (int64_t g = 0; g < a.n.groups; g++) {
    const int64_t group = g * a.n.codes * width;
    totals[g] = average_sizes(a, g, a.sums + group + a.n.size, width);
    if (!a.slots) continue;
    revivals[g] = revived(a, g, [&](int64_t j) { return a.slots[group + j * width + a.n.size] > 0 ? j : int64_t{-1}; });
  }
  parallel_for(threads_of(a), a.n.groups * a.n.codes, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const int64_t g = row / a.n.codes, from = revivals[g].empty() ? -1 : revivals[g][row % a.n.codes];
      if (from < 0)
        average_row(a, row, totals[g], a.sums + row * width);
      else
        revive(a, row, a.slots + (g * a.n.codes + from) * width, 1.0f);
    }
  });
}

void min_distance_update(const float* z, const float* centre, float* distance, int64_t count, int64_t size) {
  parallel_for(threads_for(count * size, kVectorGrain), count, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float* x = z + r * size;
      vf sum[2] = {};
      int64_t d = 0;
      for (; d + 2 * kLanes <= size; d += 2 * kLanes)
        for (int k = 0; k < 2; k++) {
          const vf difference = load<vf>(x + d + k * kLanes) - load<vf>(centre + d + k * kLanes);
          sum[k] = fma_exact(difference, difference, sum[k]);
        }
      float total = 0;
      for (; d < size; d++) total += (x[d] - centre[d]) * (x[d] - centre[d]);
      for (int k = 0; k < kLanes; k++) total += sum[0][k] + sum[1][k];
      distance[r] = std::min(distance[r], total);
    }
  });
}

}  // namespace genfast
