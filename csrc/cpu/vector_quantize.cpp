// The k nearest codes of every row, exactly. A row's codes are ruled out by lower bounds of their scores in low
// precision (code_screen.h), of which the least is kept for each lane and every few blocks of codes: a group. The codes
// of the groups with the k least bounds are computed in float32, with an error bound relative to the distance itself
// (code_distance.h); the k-th least of what their scores are at most is a cut, and only codes of groups whose bound
// lies under it are computed too. What float32 cannot tell apart is computed in float64. So the result is that of the
// specification, whatever the order of the codes, the tiles and the threads.
//
// Codes are packed once, by all threads, as many as fit the memory that a call may take; then each thread takes chunks
// of rows. With few rows it takes a part of the codes, and the parts' nearest codes are candidates once more. A handful
// of rows costs less than packing: all their codes are computed in float32. Many rows of few numbers ask a tree of the
// codes instead (code_tree.h).
#include "cpu/vector_quantize.h"

#include <algorithm>
#include <vector>

#include "cpu/code_distance.h"
#include "cpu/code_screen.h"
#include "cpu/code_tree.h"
#include "cpu/workspace.h"

namespace genfast {
namespace {

constexpr int64_t kMostGroups = 256;   // of a row
constexpr int64_t kCentreCodes = 256;  // that say where the centre is taken out
constexpr int kCentreTurns = 12;       // at the most; the last makes distances shorter by less than this
constexpr double kCentreGain = 0.05;

// Bytes of codes that are packed at a time: a share of what the matrix of scores would take, about what the caches hold
// at the most; but a few rows are not to make many turns.
constexpr double kShareOfScores = 0.01;
constexpr int64_t kMostBytes = 4 << 20, kSomeRows = 1024, kBytesOfSome = 1 << 20;

// The same share, in floats to a code, for a tree of the codes; rows that tell whether it is of use, and rows that a
// thread takes at a time.
constexpr double kShareOfTree = 0.018;
constexpr int64_t kTreeSamples = 128, kTreeRows = 128;
constexpr int64_t kLeastTreeRows = 4096, kLeastTreeCodes = 1024;  // fewer do not pay for the tree

// What a leaf costs that is looked at in the tree, and what a row costs without the tree beside its scores, both in the
// time that as many scores take without it. Measured.
constexpr double kRowCost = kBytes ? 290 : 16;
inline double leaf_cost(int64_t width) { return kBytes ? 2.2 + 0.44 * (double)width : 1.3 + 0.07 * (double)width; }

enum RowState : char { kNormal, kNotFinite, kOutOfRange };

// One group of the problem: `rows` rows of `size` numbers, and a codebook.
struct Problem {
  const NearestArgs& a;
  int64_t group, rows;
  Codes codes;

  int64_t place(int64_t row) const { return row * a.groups + group; }
  int64_t* indices(int64_t row) const { return a.indices + place(row) * a.k; }
  float* distances(int64_t row) const { return a.distances + place(row) * a.k; }
};

const char* number_at(const Problem& p, int64_t row, int64_t d) {
  const NearestArgs& a = p.a;
  return a.z + (row / a.length * a.batch_stride + row % a.length * a.row_stride + p.group * a.z_group_stride +
                d * a.number_stride) *
                   size_of(a.z_dtype);
}

// Rows [first, first + n) as floats, `width` apart and padded with zeros.
void load_rows(const Problem& p, int64_t first, int64_t n, int64_t width, float* to) {
  const int64_t size = p.a.size;
  for (int64_t i = 0; i < n; i++) std::fill(to + i * width + size, to + (i + 1) * width, 0.0f);
  if (p.a.number_stride == 1) {
    for (int64_t i = 0; i < n; i++) load_run(number_at(p, first + i, 0), p.a.z_dtype, size, to + i * width);
    return;
  }
  // Channel-first: the same number of neighbouring rows is a run.
  float run[kRowChunk];
  for (int64_t i = 0, count; i < n; i += count) {
    const int64_t row = first + i;
    count = p.a.row_stride == 1 ? std::min({n - i, p.a.length - row % p.a.length, kRowChunk}) : 1;
    for (int64_t d = 0; d < size; d++) {
      load_run(number_at(p, row, d), p.a.z_dtype, count, run);
      for (int64_t r = 0; r < count; r++) to[(i + r) * width + d] = run[r];
    }
  }
}

// Any centre is right, and the bounds are as wide as codes are far from it. The point with the least sum of distances
// from some codes (Weiszfeld 1937: a mean in which each weighs one over its distance) makes short vectors of those that
// have much in common, whichever few are far away.
void find_centre(const Problem& p, float* centre) {
  const int64_t size = p.codes.size, width = padded(size);
  const int64_t step = (p.codes.count / kCentreCodes) | 1;  // odd: codes may come in turns of two kinds
  const Floats memory(3 * width);
  float *const code = memory.data(), *const sum = code + width, *const last = sum + width;
  std::fill(code, code + width, 0.0f);
  std::fill(centre, centre + width, 0.0f);
  double before = kInfinite;
  for (int turn = 0; turn < kCentreTurns; turn++) {
    double logarithms = 0, weights = 0;
    int64_t used = 0;
    std::fill(sum, sum + width, 0.0f);
    for (int64_t j = 0; j < p.codes.count; j += step) {
      load_run(p.codes.at(j), p.codes.dtype, size, code);
      const float squares = measure(code, width).squares;
      if (!(squares < kHuge * kHuge)) continue;
      const vf shrink = splat(p.a.metric == kCosine ? 1 / std::max(std::sqrt(squares), (float)kShortest) : 1.0f);
      float weight = 1;  // to begin with, the mean
      if (turn > 0) {
        vf apart{};
        for (int64_t d = 0; d < width; d += kLanes) {
          const vf from = load<vf>(code + d) * shrink - load<vf>(centre + d);
          apart = multiply_add(from, from, apart);
        }
        const float distance = std::sqrt(sum_of(apart));
        weight = 1 / std::max(distance, 1e-18f);
        logarithms -= std::log(weight);
      }
      weights += weight, used++;
      const vf scaled = splat(weight) * shrink;
      for (int64_t d = 0; d < width; d += kLanes)
        store(sum + d, multiply_add(scaled, load<vf>(code + d), load<vf>(sum + d)));
    }
    if (weights == 0) return;
    if (turn > 0) {
      if (!(logarithms < before)) std::copy(last, last + width, centre);
      if (!(logarithms < before - kCentreGain * (double)used)) return;
      before = logarithms;
    }
    std::copy(centre, centre + width, last);
    const vf share = splat((float)(1 / weights));
    for (int64_t d = 0; d < width; d += kLanes) store(centre + d, load<vf>(sum + d) * share);
  }
}

// What a thread works in.
struct Space {
  int64_t width;
  Floats numbers, words, begin, least, shifted;
  ScreenRows rows;
  Row row[kRowChunk];
  double offset[kRowChunk];  // from half a score of the specification to S (code_screen.h), rounded upward
  RowState state[kRowChunk];
  Distance distance;
  Candidates candidates;

  Space(const Problem& p, int64_t blocks, int64_t groups)
      : width(padded(p.a.size)),
        numbers(kRowChunk * width),
        words(kRowChunk * row_floats(p.a.size)),
        begin(begin_floats(p.a.size, blocks)),
        least(kRowChunk * groups * kLanes),
        shifted(width),
        distance(p.codes, p.a.metric),
        candidates(distance, p.a.k, p.a.exact) {}
};

// What is needed of row i of the chunk, once its numbers have been read.
void judge_row(int64_t i, Space& w) {
  const float* z = w.numbers.data() + i * w.width;
  const double squares = sum_in_lanes(w.width, [&](int64_t d) { return (double)z[d] * z[d]; });
  w.row[i] = {z, std::sqrt(squares) * (1 + 0x1p-30)};
  w.state[i] = !Distance::all_finite(z, w.width) ? kNotFinite : w.row[i].length < (double)kHuge ? kNormal : kOutOfRange;
}

// Reads a chunk of rows.
void begin_rows(const Problem& p, int64_t first, int64_t n, Space& w) {
  load_rows(p, first, n, w.width, w.numbers.data());
  for (int64_t i = 0; i < n; i++) judge_row(i, w);
}

// Reads a row for place i of the chunk.
void begin_row(const Problem& p, int64_t row, int64_t i, Space& w) {
  load_rows(p, row, 1, w.width, w.numbers.data() + i * w.width);
  judge_row(i, w);
}

// Fills in what the screen multiplies.
void shift_rows(const Problem& p, int64_t n, const float* centre, Space& w) {
  const int64_t size = p.a.size;
  const bool l2 = p.a.metric == kL2;
  float* x = w.shifted.data();
  ScreenRows& rows = w.rows;
  rows.words = words_of(size), rows.stride = row_floats(size), rows.data = w.words.data();
  rows.length = rows.residual = 0, rows.scale = 1;
  std::fill(x, x + w.width, 0.0f);
  const auto shift = [&](int64_t i) {
    for (int64_t d = 0; d < size; d++) x[d] = w.row[i].numbers[d] - (l2 ? centre[d] : 0.0f);
  };
  float largest = 0;
  for (int64_t i = 0; i < n; i++) {
    if (w.state[i] != kNormal) continue;
    shift(i);
    const Sums sums = measure(x, w.width);
    const float length = length_of(sums, size);
    if (!(length < kHuge)) {
      w.state[i] = kOutOfRange;
      continue;
    }
    rows.length = std::max(rows.length, length);
    largest = std::max(largest, sums.largest);
  }
  if (kBytes) rows.scale = std::max(largest / 127.0f, kLeastScale);
  for (int64_t i = 0; i < kRowChunk; i++) {
    float* to = rows.data + i * rows.stride;
    rows.start[i] = 0;
    std::fill(to, to + rows.stride, 0.0f);
    if (i >= n || w.state[i] != kNormal) continue;
    shift(i);
    // S is half of |z - e|^2 - |z'|^2, or - z . e + z . c.
    const float* z = w.row[i].numbers;
    double sum, sizes;
    if (l2) {
      sizes = sum_in_lanes(w.width, [&](int64_t d) {
        const double apart = (double)z[d] - centre[d];
        return apart * apart;
      });
      sum = -sizes;
    } else {
      sum = sum_in_lanes(w.width, [&](int64_t d) { return (double)z[d] * centre[d]; });
      sizes = sum_in_lanes(w.width, [&](int64_t d) { return std::abs((double)z[d] * centre[d]); });
    }
    w.offset[i] = sum + sizes * (double)(2 * size + 16) * 0x1p-52;
#if defined(__AVX512VNNI__)
    for (int64_t d = 0; d < size; d++) x[d] = -x[d];
    int8_t* bytes = reinterpret_cast<int8_t*>(to);
    const Rounded found = to_bytes(x, w.width, rows.scale, 0, bytes);
    rows.residual = std::max(rows.residual, found.rest + 2.0f * (float)kUnit * rows.length);
    int32_t all = 0;
    for (int64_t d = 0; d < size; d++) all += bytes[d];
    rows.start[i] = -128 * all;
    if (is_short(size))
      for (int64_t d = 0; d < rows.words * 4; d++) bytes[d] = (int8_t)(bytes[d] ^ 0x80);
#else
    for (int64_t d = 0; d < size; d++) to[d] = -x[d];
#endif
  }
}

// Groups and lanes whose codes are candidates, in a queue while their codes come from memory.
class Hits {
 public:
  Hits(const Problem& p, int64_t first, int64_t blocks, int64_t span, Candidates& candidates)
      : p_(p), first_(first), blocks_(blocks), span_(span), candidates_(candidates) {}
  ~Hits() {
    for (int i = 0; i < std::min(seen_, kQueue); i++) offer(queue_[(seen_ + i) % std::min(seen_, kQueue)]);
  }

  void add(int64_t group, int lane) {
    Hit& place = queue_[seen_ % kQueue];
    if (seen_ >= kQueue) offer(place);
    place = {group, lane};
    seen_++;
    const int64_t bytes = p_.codes.size * size_of(p_.codes.dtype);
    for_codes(place, [&](int64_t j) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p_.codes.at(j) + at);
    });
  }

 private:
  static constexpr int kQueue = 4;
  struct Hit {
    int64_t group;
    int lane;
  };

  template <class F>
  void for_codes(const Hit& hit, const F& f) {
    for (int64_t b = hit.group * span_; b < std::min(blocks_, (hit.group + 1) * span_); b++) {
      const int64_t begin = first_ + b * kBlock + hit.lane * kCodeVectors;
      for (int64_t j = begin; j < std::min(begin + kCodeVectors, p_.codes.count); j++) f(j);
    }
  }
  void offer(const Hit& hit) {
    for_codes(hit, [&](int64_t j) { candidates_.offer(j); });
  }

  const Problem& p_;
  int64_t first_, blocks_, span_;
  Candidates& candidates_;
  int seen_ = 0;
  Hit queue_[kQueue];
};

// About the k-th least number, and not less than it. The least of each lane of every `sets`-th vector are k or more
// numbers, so that the k-th least of all is not above the largest of them: what remains under that is sorted.
float kth_least(const float* x, int64_t vectors, int64_t k) {
  const int64_t sets = tiles_of(k, kLanes);
  if (vectors < sets) return std::numeric_limits<float>::infinity();
  float bound = -std::numeric_limits<float>::infinity();
  for (int64_t s = 0; s < sets; s++) {
    vf most = load<vf>(x + s * kLanes);
    for (int64_t v = s + sets; v < vectors; v += sets) most = smaller(load<vf>(x + v * kLanes), most);
    bound = std::max(bound, largest_lane(most));
  }
  float some[256];
  int count = 0;
  for (int64_t v = 0; v < vectors; v++) {
    const vf these = load<vf>(x + v * kLanes);
    if (!any(these <= splat(bound))) continue;
    for (int i = 0; i < kLanes; i++)
      if (these[i] <= bound) {
        if (count == 256) return bound;
        some[count++] = these[i];
      }
  }
  std::nth_element(some, some + k - 1, some + count);
  return some[k - 1];
}

// Whether there is a code at all: in a codebook that was never trained all may equal the one before.
bool any_code(const Packed& packed, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++) {
    const float* n = packed.block(b) + packed.words * kBlock;
    for (int64_t j = 0; j < kBlock; j++)
      if (n[j] < std::numeric_limits<float>::infinity()) return true;
  }
  return false;
}

// Offers what the bounds leave of the packed codes, which begin at `first`.
void offer_packed(const Problem& p, int64_t i, int64_t first, const Packed& packed, int64_t blocks, int64_t span,
                  Space& w) {
  const int64_t groups = tiles_of(blocks, span), k = p.a.k;
  float* least = w.least.data() + i * groups * kLanes;
  // The least of kSummed groups each, so that most groups are not looked at again.
  constexpr int64_t kSummed = 8;
  alignas(64) float summary[(kMostGroups + kSummed - 1) / kSummed * kLanes];
  const int64_t summaries = tiles_of(groups, kSummed);
  float best;  // the k-th least bound
  vf all = splat(std::numeric_limits<float>::infinity());
  for (int64_t s = 0; s < summaries; s++) {
    vf most = load<vf>(least + s * kSummed * kLanes);
    for (int64_t g = s * kSummed + 1; g < std::min(groups, (s + 1) * kSummed); g++)
      most = smaller(load<vf>(least + g * kLanes), most);
    store(summary + s * kLanes, most);
    all = smaller(most, all);
  }
  best = k == 1 ? -largest_lane(-all) : kth_least(least, groups, k);
  if (best == std::numeric_limits<float>::infinity() && !any_code(packed, blocks)) return;
  const auto under = [&](float cut) {
    Hits hits(p, first, blocks, span, w.candidates);
    for (int64_t s = 0; s < summaries; s++) {
      if (!any(load<vf>(summary + s * kLanes) <= splat(cut))) continue;
      for (int64_t g = s * kSummed; g < std::min(groups, (s + 1) * kSummed); g++) {
        float* from = least + g * kLanes;
        for (unsigned lanes = not_above(load<vf>(from), splat(cut)); lanes; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          from[lane] = std::numeric_limits<float>::quiet_NaN();  // not twice
          hits.add(g, lane);
        }
      }
    }
  };
  under(best);
  w.candidates.sharpen();
  const double half = p.a.metric == kL2 ? 0.5 : 1.0;
  const double cut = half * (w.candidates.cut() + w.offset[i]) + (double)(p.a.size + 2) * 8 * kSmallest;
  const double scaled = cut / w.rows.scale;
  under((float)(scaled + std::abs(scaled) * 4 * kUnit));
}

void offer_all(const Problem& p, int64_t begin, int64_t end, Candidates& candidates) {
  for (int64_t j = begin; j < end; j++) candidates.offer(j);
}

// Offers what was found before, where there is something.
void offer_found(const int64_t* found, int64_t k, Candidates& candidates) {
  for (int64_t i = 0; i < k; i++)
    if (found[i] >= 0) candidates.offer(found[i]);
}

void write_distances(const Problem& p, int64_t first, int64_t n, Space& w) {
  for (int64_t i = 0; i < n; i++) {
    const int64_t* index = p.indices(first + i);
    float* to = p.distances(first + i);
    const float* z = w.row[i].numbers;
    double squares = 0;
    for (int64_t d = 0; d < p.a.size; d++) squares += (double)z[d] * z[d];
    for (int64_t r = 0; r < p.a.k; r++) {
      if (index[r] < 0) {
        const float none = p.a.metric == kL2 ? INFINITY : -INFINITY;
        to[r] = w.state[i] == kNotFinite ? NAN : none;
        continue;
      }
      double score = w.distance.exact(z, index[r]);
      if (p.a.metric == kCosine) score /= std::max(std::sqrt(squares), kShortest);
      to[r] = (float)(p.a.metric == kL2 ? score : -score);
    }
  }
}

// What is left of the rows without their codes. A row without a code leaves NaN.
void subtract_codes(const Problem& p, int64_t first, int64_t n, Space& w) {
  const NearestArgs& a = p.a;
  const int64_t whole = a.size / kLanes * kLanes;
  float* const space = w.shifted.data();
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = *p.indices(first + i), at = p.place(first + i);
    const float *z = w.row[i].numbers, *code = space;
    if (index < 0)
      std::fill(space, space + a.size, NAN);
    else if (p.codes.dtype == kFloat32)
      code = reinterpret_cast<const float*>(p.codes.at(index));
    else
      load_run(p.codes.at(index), p.codes.dtype, a.size, space);
    float *const sum = a.sum + at * a.size, *const left = a.residual ? a.residual + at * a.size : space;
    for (int64_t d = 0; d < whole; d += kLanes) {
      const vf e = load<vf>(code + d);
      store(sum + d, a.first ? e : load<vf>(sum + d) + e);
      store(left + d, load<vf>(z + d) - e);
    }
    for (int64_t d = whole; d < a.size; d++) {
      const float e = code[d];
      sum[d] = a.first ? e : sum[d] + e;
      left[d] = z[d] - e;
    }
    if (!a.errors) continue;
    double squares = sum_in_lanes(whole, [&](int64_t d) { return (double)left[d] * left[d]; });
    for (int64_t d = whole; d < a.size; d++) squares += (double)left[d] * left[d];
    a.errors[at] = (float)squares;
  }
}

// After the nearest codes of a chunk of rows are known.
void end_rows(const Problem& p, int64_t first, int64_t n, Space& w) {
  if (p.a.distances) write_distances(p, first, n, w);
  if (p.a.sum) subtract_codes(p, first, n, w);
}

// Whether a tree of the codes fits the memory that a call may take, and may be worth making.
bool may_have_tree(const Problem& p) {
  const NearestArgs& a = p.a;
  return a.metric == kL2 && a.k == 1 && !a.packed && !a.sum && a.size <= kTreeSize && p.rows >= kLeastTreeRows &&
         a.count >= kLeastTreeCodes && kShareOfTree * (double)p.rows >= (double)CodeTree::floats_of(a.size) &&
         a.count <= INT32_MAX && p.rows <= INT32_MAX;
}

// The rows' nearest codes from a tree. False, with nothing done, where it does not rule out enough: some rows tell.
bool run_tree(const Problem& p) {
  const NearestArgs& a = p.a;
  const int64_t rows = p.rows;
  const int threads = threads_for(rows * a.count, 1 << 16);
  const Floats memory(padded(kTreeSize));
  float* const centre = memory.data();
  std::fill(centre, centre + padded(kTreeSize), 0.0f);
  find_centre(p, centre);
  const CodeTree tree(p.codes, centre, threads);
  if (!tree.usable()) return false;

  struct TreeSpace {
    Space space;
    TreeSearch search;
  };
  const auto make = [&] { return TreeSpace{Space(p, 1, 1), TreeSearch(tree, centre)}; };
  // The nearest code of a row, whose home is -1 if it is not known yet; adds to `work` how many leaves it took.
  const auto find = [&](TreeSpace& s, int64_t row, int32_t home, int64_t& work) {
    Space& w = s.space;
    begin_row(p, row, 0, w);
    int64_t index = -1;
    if (w.state[0] == kNotFinite) return index;
    if (w.row[0].length < (double)kTreeHuge)
      return s.search.nearest(w.row[0], home < 0 ? s.search.home(w.row[0].numbers) : home, w.candidates, work);
    w.candidates.begin(w.row[0]);
    offer_all(p, 0, a.count, w.candidates);
    w.candidates.finish(&index);
    work += tree.leaves();
    return index;
  };

  std::vector<int64_t> work(kTreeSamples, 0);
  for_each(threads, kTreeSamples, make,
           [&](TreeSpace& s, int64_t i) { find(s, rows / kTreeSamples * i, -1, work[i]); });
  int64_t total = 0;
  for (int64_t w : work) total += w;
  if ((double)total * leaf_cost(tree.width()) > kTreeSamples * ((double)tree.leaves() + kRowCost)) return false;

  // Rows of one leaf after another, so that what they look at is in the caches.
  std::vector<int32_t> home(rows), order(rows);
  for_each(threads, tiles_of(rows, kRowChunk), make, [&](TreeSpace& s, int64_t chunk) {
    const int64_t first = chunk * kRowChunk, n = std::min(kRowChunk, rows - first), width = s.space.width;
    float* numbers = s.space.numbers.data();
    load_rows(p, first, n, width, numbers);
    for (int64_t i = 0; i < n; i++) home[first + i] = s.search.home(numbers + i * width);
  });
  std::vector<int64_t> next(tree.leaves() + 1, 0);
  for (int64_t i = 0; i < rows; i++) next[home[i] + 1]++;
  for (int64_t b = 0; b < tree.leaves(); b++) next[b + 1] += next[b];
  for (int64_t i = 0; i < rows; i++) order[next[home[i]]++] = (int32_t)i;

  for_each(threads, tiles_of(rows, kTreeRows), make, [&](TreeSpace& s, int64_t chunk) {
    for (int64_t i = chunk * kTreeRows; i < std::min(rows, (chunk + 1) * kTreeRows); i++) {
      const int64_t row = order[i];
      int64_t ignored = 0;
      *p.indices(row) = find(s, row, home[row], ignored);
      if (a.distances) write_distances(p, row, 1, s.space);
    }
  });
  return true;
}

void run_group(const Problem& p) {
  if (may_have_tree(p) && run_tree(p)) return;
  const NearestArgs& a = p.a;
  const int64_t rows = p.rows, k = a.k, chunks = tiles_of(rows, kRowChunk);
  const int threads = threads_for(rows * a.count * a.size, 1 << 16);
  const bool few = rows <= (a.size < 2 * kLanes ? 12 : 6);  // not worth packing the codes

  // Packed at a time, and how the codes are shared out where there are fewer chunks of rows than threads keep busy.
  const int64_t all_blocks = tiles_of(a.count, kBlock);
  const int64_t bytes = Packed::block_floats(a.size) * 4;
  const int64_t share = (int64_t)(kShareOfScores * 4 * (double)rows * (double)a.count);
  const int64_t allowed = std::max(std::min(kMostBytes, share), rows < kSomeRows ? kBytesOfSome : 0);
  const int64_t most_blocks = a.packed ? all_blocks : std::max<int64_t>(allowed / bytes, 8);
  const int64_t passes = few ? 1 : tiles_of(all_blocks, most_blocks), pass_blocks = tiles_of(all_blocks, passes);
  const int64_t wanted = threads > 1 && chunks < 2 * threads ? tiles_of(2 * threads, chunks) : 1;
  const int64_t part_blocks = tiles_of(pass_blocks, wanted), parts = tiles_of(pass_blocks, part_blocks);
  const int64_t span = tiles_of(part_blocks, kMostGroups), groups = tiles_of(part_blocks, span);

  // The centre comes first in what was packed beforehand.
  const int64_t width = padded(a.size);
  const Floats memory(few || a.packed ? width : width + pass_blocks * Packed::block_floats(a.size));
  float* const centre = memory.data();
  if (a.packed)
    std::copy(a.packed, a.packed + width, centre);
  else if (!few)
    find_centre(p, centre);
  const Packed packed{words_of(a.size), a.packed ? const_cast<float*>(a.packed) + width : centre + width};
  std::vector<int64_t> found(parts > 1 ? parts * rows * k : 0);
  const auto make = [&] { return few ? Space(p, 1, 1) : Space(p, part_blocks, groups); };

  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t begin = pass * pass_blocks, blocks = std::min(pass_blocks, all_blocks - begin);
    if (!few && !a.packed)
      for_each(
          threads, blocks, [&] { return PackSpace(a.size); },
          [&](PackSpace& space, int64_t b) {
            pack_block(p.codes, a.metric, k == 1, centre, (begin + b) * kBlock, packed.words, packed.block(b), space);
          });
    for_each(threads, chunks * parts, make, [&](Space& w, int64_t item) {
      const int64_t first = item / parts * kRowChunk, n = std::min(kRowChunk, rows - first), part = item % parts;
      const int64_t from = part * part_blocks, to = std::min(blocks, from + part_blocks);
      const bool last = parts == 1 && pass + 1 == passes;
      begin_rows(p, first, n, w);
      if (!few && from < to) {
        shift_rows(p, n, centre, w);
        screen(w.rows, n, Packed{packed.words, packed.block(from)}, to - from, span, w.begin.data(), w.least.data(),
               tiles_of(to - from, span) * kLanes);
      }
      for (int64_t i = 0; i < n; i++) {
        int64_t* index = parts == 1 ? p.indices(first + i) : found.data() + ((first + i) * parts + part) * k;
        if (w.state[i] == kNotFinite) {
          std::fill(index, index + k, -1);
          continue;
        }
        w.candidates.begin(w.row[i]);
        if (pass > 0) offer_found(index, k, w.candidates);
        const int64_t code = (begin + from) * kBlock;
        if (from >= to) {
        } else if (few || w.state[i] == kOutOfRange) {
          offer_all(p, code, std::min(a.count, (begin + to) * kBlock), w.candidates);
        } else {
          offer_packed(p, i, code, Packed{packed.words, packed.block(from)}, to - from, span, w);
        }
        w.candidates.finish(index);
      }
      if (last) end_rows(p, first, n, w);
    });
  }
  if (parts == 1) return;
  for_each(threads, chunks, make, [&](Space& w, int64_t chunk) {
    const int64_t first = chunk * kRowChunk, n = std::min(kRowChunk, rows - first);
    begin_rows(p, first, n, w);
    for (int64_t i = 0; i < n; i++) {
      w.candidates.begin(w.row[i]);
      offer_found(found.data() + (first + i) * parts * k, parts * k, w.candidates);
      w.candidates.finish(p.indices(first + i));
    }
    end_rows(p, first, n, w);
  });
}

}  // namespace

int64_t packed_floats(int64_t count, int64_t size) {
  return padded(size) + tiles_of(count, kBlock) * Packed::block_floats(size);
}

void pack_codes(const NearestArgs& a, float* to) {
  const Problem p{a, 0, 0, Codes{a.codes, a.codes_dtype, a.code_stride, a.count, a.size}};
  find_centre(p, to);
  const Packed packed{words_of(a.size), to + padded(a.size)};
  for_each(
      threads_for(a.count * a.size, 1 << 16), tiles_of(a.count, kBlock), [&] { return PackSpace(a.size); },
      [&](PackSpace& space, int64_t b) {
        pack_block(p.codes, a.metric, false, to, b * kBlock, packed.words, packed.block(b), space);
      });
}

void nearest_code(const NearestArgs& a) {
  const int64_t rows = a.batch * a.length;
  if (rows == 0) return;
  for (int64_t g = 0; g < a.groups; g++) {
    const char* codes = a.codes + g * a.codes_group_stride * size_of(a.codes_dtype);
    run_group(Problem{a, g, rows, Codes{codes, a.codes_dtype, a.code_stride, a.count, a.size}});
  }
}

}  // namespace genfast
