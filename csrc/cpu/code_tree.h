// The nearest code among short ones ("l2"), from a tree of the codes.
//
// Codes are halved along the dimension in which they vary most until kLeaf of them are left, a leaf; kGroup leaves that
// were split last are a group. A row's distance from the box around a leaf or a group is a lower bound of its distances
// from the codes there. The group on a row's side of every split is computed whole; of the others, leaves are passed
// over whose box is farther away than the nearest code so far. With a centre c taken out of rows and codes, a code's
// score S = |e - c|^2 / 2 - (z - c) . (e - c) is computed in float32 with
//
//     |error| <= (2 size + 32) u (|z - c| + L)^2,        L the greatest |e - c|, u a rounding,
//
// |z - c|^2 + 2 S being the squared distance. Codes within twice that of the least S are candidates.
//
// Boxes and codes lie in lanes, a row's numbers in registers. What passes is first listed and then looked at: a branch
// for each box would cost more than the box.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/code_distance.h"

namespace genfast {
namespace {

constexpr int64_t kLeaf = 16;       // codes
constexpr int64_t kGroup = 16;      // leaves
constexpr int64_t kTreeSize = 16;   // numbers of a code at the most
constexpr float kTreeHuge = 1e15f;  // lengths above it are left to others
constexpr int kLeafVectors = kLeaf / kLanes;

// Bits of the lanes in which a <= b.
inline unsigned not_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return (unsigned)_mm256_movemask_ps((__m256)(a <= b));
#elif defined(__SSE2__)
  return (unsigned)_mm_movemask_ps((__m128)(a <= b));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= (unsigned)(a[i] <= b[i]) << i;
  return bits;
#endif
}

inline float smallest_lane(vf v) { return -largest_lane(-v); }

// Numbers first + i of the bits i that are set; `to` has room for kLanes. Returns how many.
inline int64_t list_bits(unsigned bits, int64_t first, int32_t* to) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)first));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)bits, all));
  return __builtin_popcount(bits);
#else
  int64_t n = 0;
  for (; bits; bits &= bits - 1) to[n++] = (int32_t)first + __builtin_ctz(bits);
  return n;
#endif
}

// Numbers of a code in the tree: sizes that have a loop of their own.
inline int64_t tree_width(int64_t size) { return tiles_of(size, 4) * 4; }

class CodeTree {
 public:
  // Floats that a tree takes for each code, about.
  static int64_t floats_of(int64_t size) { return kTreeSize + tree_width(size) + tree_width(size) / 8 + 6; }

  CodeTree(const Codes& codes, const float* centre, int threads)
      : width_(tree_width(codes.size)),
        count_(codes.count),
        leaves_(tiles_of(codes.count, kLeaf)),
        groups_(tiles_of(leaves_, kGroup)),
        packed_((groups_ * kGroup + 1) * leaf_floats()),
        boxes_(groups_ * box_floats()),
        group_boxes_(tiles_of(groups_, kGroup) * box_floats()),
        rows_(codes.count * kTreeSize),
        order_(codes.count) {
    usable_ = read(codes, centre, threads);
    if (!usable_) return;
    while (((int64_t)1 << depth_) < groups_ * kGroup) depth_++;
    nodes_.resize((size_t)1 << depth_);
    homes_.resize((size_t)1 << depth_);
    for (int64_t b = leaves_; b <= groups_ * kGroup; b++) empty_leaf(b);
    for (int64_t b = leaves_; b < groups_ * kGroup; b++) empty_box(boxes_.data(), b);
    for (int64_t g = groups_; g < tiles_of(groups_, kGroup) * kGroup; g++) empty_box(group_boxes_.data(), g);
    // A few splits one after another; what is below them by all threads.
    std::vector<Part> parts;
    split({1, 0, 0, leaves_}, threads > 1 ? 3 : 0, &parts);
    for_each(threads, (int64_t)parts.size(), [] { return 0; }, [&](int, int64_t i) { split(parts[i], -1, nullptr); });
    for (int64_t g = 0; g < groups_; g++) surround(g);
    float most = 0;
    for (int64_t j = 0; j < count_; j++) most = std::max(most, leaf(j / kLeaf)[width_ * kLeaf + j % kLeaf]);
    farthest_ = std::sqrt(2 * most) * (1 + 64 * (float)kUnit) + 1e-18f;
  }

  // False where a code is too long, or not finite: nothing else may be asked then.
  bool usable() const { return usable_; }
  int64_t width() const { return width_; }
  int64_t leaves() const { return leaves_; }
  int64_t groups() const { return groups_; }
  float farthest() const { return farthest_; }
  // Of kGroup leaves or groups, from `first` on, a multiple of it: the least numbers [width][kGroup], then the
  // greatest.
  const float* boxes(int64_t first) const { return boxes_.data() + first / kGroup * box_floats(); }
  const float* group_boxes(int64_t first) const { return group_boxes_.data() + first / kGroup * box_floats(); }
  // Minus the codes, [width][kLeaf], then half of the squared lengths, infinite where there is no code.
  const float* leaf(int64_t b) const { return packed_.data() + b * leaf_floats(); }
  // The number of a leaf without codes.
  int64_t no_leaf() const { return groups_ * kGroup; }
  int64_t code(int64_t place) const { return order_[place].code; }

  // The leaf on whose side of every split a row lies, of numbers without the centre: rows of one leaf look at about the
  // same leaves.
  int32_t home(const float* z) const {
    size_t at = 1;
    for (int level = 0; level < depth_; level++) {
      const Node& node = nodes_[at];
      at = 2 * at + (size_t)(z[node.dim] >= node.at);
    }
    return homes_[at - homes_.size()];
  }

 private:
  struct Place {
    float key;
    int32_t code;
  };
  // Its children are 2 i and 2 i + 1. What lies below a leaf always turns to the left.
  struct Node {
    int32_t dim = 0;
    float at = std::numeric_limits<float>::infinity();
  };
  struct Part {
    int64_t node;
    int level;
    int64_t begin, end;  // leaves
  };

  int64_t leaf_floats() const { return (width_ + 1) * kLeaf; }
  int64_t box_floats() const { return 2 * width_ * kGroup; }
  float* low(float* boxes, int64_t b) const { return boxes + b / kGroup * box_floats() + b % kGroup; }

  bool read(const Codes& codes, const float* centre, int threads) {
    constexpr int64_t kSome = 1024;
    std::atomic<bool> usable{true};
    for_each(
        threads, tiles_of(count_, kSome), [] { return 0; },
        [&](int, int64_t chunk) {
          bool fine = true;
          for (int64_t j = chunk * kSome; j < std::min(count_, (chunk + 1) * kSome); j++) {
            float* row = rows_.data() + j * kTreeSize;
            std::fill(row, row + kTreeSize, 0.0f);
            load_run(codes.at(j), codes.dtype, codes.size, row);
            for (int64_t d = 0; d < codes.size; d++) {
              fine &= std::abs(row[d]) < kTreeHuge;
              row[d] -= centre[d];
            }
            order_[j].code = (int32_t)j;
          }
          if (!fine) usable = false;
        });
    return usable;
  }

  // Splits a part down to its leaves, or to `last` levels below the root: what is left then is listed.
  void split(Part part, int last, std::vector<Part>* rest) {
    const auto [node, level, begin, end] = part;
    if (end - begin == 1) {
      homes_[((size_t)node << (depth_ - level)) - homes_.size()] = (int32_t)begin;
      pack(begin);
      return;
    }
    if (level == last) {
      rest->push_back(part);
      return;
    }
    const int64_t whole = tiles_of(end - begin, kGroup);
    const int64_t middle = whole > 1 ? begin + whole / 2 * kGroup : (begin + end) / 2;
    Place *from = order_.data() + begin * kLeaf, *to = order_.data() + std::min(end * kLeaf, count_);
    const int32_t dim = widest(from, to);
    for (Place* p = from; p < to; p++) p->key = rows_.data()[p->code * kTreeSize + dim];
    Place* half = order_.data() + middle * kLeaf;
    std::nth_element(from, half, to, [](const Place& a, const Place& b) { return a.key < b.key; });
    nodes_[node] = {dim, half->key};
    split({2 * node, level + 1, begin, middle}, last, rest);
    split({2 * node + 1, level + 1, middle, end}, last, rest);
  }

  // Of the greatest variance, of some of the codes.
  int32_t widest(const Place* from, const Place* to) const {
    const int64_t step = std::max<int64_t>((to - from) / 256, 1);
    float sum[kTreeSize] = {}, squares[kTreeSize] = {}, used = 0;
    const float* first = rows_.data() + from->code * kTreeSize;
    for (const Place* p = from; p < to; p += std::min<int64_t>(step, to - p), used++) {
      const float* x = rows_.data() + p->code * kTreeSize;
      for (int64_t d = 0; d < kTreeSize; d++) {
        const float apart = x[d] - first[d];
        sum[d] += apart, squares[d] += apart * apart;
      }
    }
    int32_t best = 0;
    float most = -1;
    for (int64_t d = 0; d < width_; d++) {
      const float spread = squares[d] - sum[d] * sum[d] / used;
      if (spread > most) most = spread, best = (int32_t)d;
    }
    return best;
  }

  void pack(int64_t b) {
    empty_leaf(b);
    float *to = packed_.data() + b * leaf_floats(), *least = low(boxes_.data(), b), *most = least + width_ * kGroup;
    for (int64_t i = 0; i < std::min(kLeaf, count_ - b * kLeaf); i++) {
      const float* x = rows_.data() + code(b * kLeaf + i) * kTreeSize;
      float squares = 0;
      for (int64_t d = 0; d < width_; d++) {
        least[d * kGroup] = i ? std::min(least[d * kGroup], x[d]) : x[d];
        most[d * kGroup] = i ? std::max(most[d * kGroup], x[d]) : x[d];
        to[d * kLeaf + i] = -x[d];
        squares += x[d] * x[d];
      }
      to[width_ * kLeaf + i] = 0.5f * squares;
    }
  }

  void empty_leaf(int64_t b) {
    float* to = packed_.data() + b * leaf_floats();
    std::fill(to, to + width_ * kLeaf, 0.0f);
    std::fill(to + width_ * kLeaf, to + leaf_floats(), std::numeric_limits<float>::infinity());
  }

  // A box that is infinitely far away.
  void empty_box(float* boxes, int64_t b) {
    for (int64_t d = 0; d < 2 * width_; d++) low(boxes, b)[d * kGroup] = std::numeric_limits<float>::infinity();
  }

  // Makes the box of a group from those of its leaves.
  void surround(int64_t g) {
    const int64_t n = std::min(kGroup, leaves_ - g * kGroup);
    const float* least = low(boxes_.data(), g * kGroup);
    float* to = low(group_boxes_.data(), g);
    for (int64_t d = 0; d < width_; d++) {
      const float *a = least + d * kGroup, *b = a + width_ * kGroup;
      to[d * kGroup] = *std::min_element(a, a + n);
      to[(width_ + d) * kGroup] = *std::max_element(b, b + n);
    }
  }

  int64_t width_, count_, leaves_, groups_;
  int depth_ = 0;
  bool usable_ = true;
  float farthest_ = 0;
  Floats packed_, boxes_, group_boxes_;
  Floats rows_;  // [count][kTreeSize], the codes as floats, without the centre
  std::vector<Place> order_;
  std::vector<Node> nodes_;     // from 1 on
  std::vector<int32_t> homes_;  // the leaves below the lowest nodes
};

// The nearest codes of rows, one row after another.
class TreeSearch {
 public:
  explicit TreeSearch(const CodeTree& tree, const float* centre)
      : tree_(tree), centre_(centre), groups_(tree.groups() + 2 * kLanes) {}

  // The leaf of a row, for `nearest`: rows of one leaf are best looked for one after another.
  int32_t home(const float* numbers) const {
    float z[kTreeSize];
    for (int64_t d = 0; d < tree_.width(); d++) z[d] = numbers[d] - centre_[d];
    return tree_.home(z);
  }

  // The code nearest to a row of length below kTreeHuge. Counts in `work` about how many leaves it took.
  int64_t nearest(const Row& row, int32_t home, Candidates& candidates, int64_t& work) {
    switch (tree_.width()) {
      case 4:
        return find<4>(row, home, candidates, work);
      case 8:
        return find<8>(row, home, candidates, work);
      case 12:
        return find<12>(row, home, candidates, work);
      default:
        return find<16>(row, home, candidates, work);
    }
  }

 private:
  static constexpr int64_t kTurn = 64;  // leaves between looks at how near the nearest code is

  // Of each lane the least score, in which vector of codes it was, and the least but one.
  struct Best {
    vf most, second;
    vi where;
  };

  template <int WIDTH>
  static vf scores(const float* codes, const vf* z) {
    vf sum = load<vf>(codes + WIDTH * kLeaf);
#pragma GCC unroll 16
    for (int d = 0; d < WIDTH; d++) sum = multiply_add(z[d], load<vf>(codes + d * kLeaf), sum);
    return sum;
  }

  template <int WIDTH>
  void visit(int64_t b, const vf* z, Best& best) const {
    for (int v = 0; v < kLeafVectors; v++) {
      const vf sum = scores<WIDTH>(tree_.leaf(b) + v * kLanes, z);
      best.second = smaller(larger(sum, best.most), best.second);
      best.where = sum < best.most ? vi{} + (int)(b * kLeafVectors + v) : best.where;
      best.most = smaller(sum, best.most);
    }
  }

  // The squared distances of kLanes boxes.
  template <int WIDTH>
  static vf apart(const float* boxes, const vf* z) {
    vf even{}, odd{};
#pragma GCC unroll 16
    for (int d = 0; d < WIDTH; d += 2) {
      const auto outside = [&](int d) {
        return z[d] - smaller(larger(z[d], load<vf>(boxes + d * kGroup)), load<vf>(boxes + (WIDTH + d) * kGroup));
      };
      const vf a = outside(d), b = outside(d + 1);
      even = multiply_add(a, a, even), odd = multiply_add(b, b, odd);
    }
    return even + odd;
  }

  template <int WIDTH>
  int64_t find(const Row& row, int32_t home, Candidates& candidates, int64_t& work) {
    alignas(64) float centred[WIDTH];
    float squares = 0;
    for (int d = 0; d < WIDTH; d++) {
      centred[d] = row.numbers[d] - centre_[d];
      squares += centred[d] * centred[d];
    }
    const float reach = std::sqrt(squares) * (1 + 64 * (float)kUnit) + 1e-18f + tree_.farthest();
    const float error = (2 * WIDTH + 32) * (float)kUnit * reach * reach + 64 * (float)kSmallest;
    vf z[WIDTH];
    for (int d = 0; d < WIDTH; d++) z[d] = splat(centred[d]);
    const vf infinite = splat(std::numeric_limits<float>::infinity());
    Best best{infinite, infinite, vi{}};
    // Not less than the squared distance of the nearest code so far, with room for what the bounds were rounded.
    const auto cut = [&] {
      return splat((squares + 2 * smallest_lane(best.most) + 4 * error) * (1 + 64 * (float)kUnit) + 4 * error);
    };

    const int64_t own = home / kGroup;
    for (int64_t i = 0; i < kGroup; i++) visit<WIDTH>(own * kGroup + i, z, best);
    vf limit = cut();
    int64_t groups = 0;
    for (int64_t g = 0; g < tree_.groups(); g += kLanes) {
      const float* boxes = tree_.group_boxes(g) + g % kGroup;
      unsigned bits = not_above(apart<WIDTH>(boxes, z), limit);
      if (g == own / kLanes * kLanes) bits &= ~(1u << own % kLanes);
      groups += list_bits(bits, g, groups_.data() + groups);
    }
    int32_t leaves[kTurn + kGroup + kLanes];
    int64_t listed = 0, seen = 0;
    const auto look = [&] {
      for (int64_t i = 0; i < listed; i++) visit<WIDTH>(leaves[i], z, best);
      seen += listed, listed = 0;
    };
    for (int64_t i = 0; i < groups; i++) {
      if (listed >= kTurn) {
        look();
        limit = cut();
      }
      const int64_t first = groups_[i] * kGroup;
      for (int64_t b = 0; b < kGroup; b += kLanes)
        listed += list_bits(not_above(apart<WIDTH>(tree_.boxes(first) + b, z), limit), first + b, leaves + listed);
    }
    look();
    work += kGroup + seen + 2 * groups + tree_.groups() / kLanes * 2;

    const vf under = splat(smallest_lane(best.most) + 2 * error);
    const unsigned left = not_above(best.most, under);
    const auto code_at = [&](int64_t vector, unsigned bits) {
      return tree_.code(vector * kLanes + __builtin_ctz(bits));
    };
    if (not_above(best.second, under)) {
      // A lane may have lost a candidate.
      candidates.begin(row);
      for (int64_t v = 0; v < tree_.leaves() * kLeafVectors; v++) {
        const float* codes = tree_.leaf(v / kLeafVectors) + v % kLeafVectors * kLanes;
        for (unsigned bits = not_above(scores<WIDTH>(codes, z), under); bits; bits &= bits - 1)
          candidates.offer(code_at(v, bits));
      }
      work += tree_.leaves();
    } else {
      if (!(left & (left - 1))) return code_at(best.where[__builtin_ctz(left)], left);
      candidates.begin(row);
      for (unsigned bits = left; bits; bits &= bits - 1)
        candidates.offer(code_at(best.where[__builtin_ctz(bits)], bits));
    }
    int64_t found;
    candidates.finish(&found);
    return found;
  }

  const CodeTree& tree_;
  const float* centre_;
  std::vector<int32_t> groups_;
};

}  // namespace
}  // namespace genfast
