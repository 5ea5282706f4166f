// The nearest code among short ones ("l2"), from a tree of the codes.
//
// Codes are halved along the dimension in which they vary most until kLeaf of them are left, a leaf. A row's distance
// from the box around a leaf is a lower bound of its distances from the codes there. The leaf on a row's side of every
// split comes first; other leaves are passed over where the box is farther away than the nearest code so far. In a
// leaf, with a centre c taken out, S = |e - c|^2 / 2 - (z - c) . (e - c) is computed in float32 with
//
//     |error| <= (2 size + 32) u (|z - c| + L)^2,        L the greatest |e - c|, u a rounding,
//
// |z - c|^2 + 2 S being the squared distance. Codes within twice that of the least S are candidates.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/code_distance.h"

namespace genfast {
namespace {

constexpr int64_t kLeaf = 64;       // codes
constexpr int64_t kTreeSize = 16;   // numbers of a code at the most
constexpr float kTreeHuge = 1e15f;  // lengths above it are left to others
constexpr int kLeafVectors = kLeaf / kLanes;

inline unsigned not_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#else
  unsigned bits = 0;
  if (!any(a <= b)) return 0;
  for (int i = 0; i < kLanes; i++) bits |= (unsigned)(a[i] <= b[i]) << i;
  return bits;
#endif
}

inline float smallest_lane(vf v) { return -largest_lane(-v); }

// Numbers of a code in the tree: sizes that have a loop of their own.
inline int64_t tree_width(int64_t size) { return tiles_of(size, 4) * 4; }

class CodeTree {
 public:
  // Floats that a tree takes for each code, about.
  static int64_t floats_of(int64_t size) { return kTreeSize + 2 * tree_width(size) + 8; }

  CodeTree(const Codes& codes, const float* centre)
      : width_(tree_width(codes.size)),
        count_(codes.count),
        leaves_(tiles_of(codes.count, kLeaf)),
        boxes_(leaves_ * 2 * width_),
        packed_(leaves_ * leaf_floats()),
        rows_(codes.count * kTreeSize) {
    float* row = rows_.data();
    std::fill(row, row + count_ * kTreeSize, 0.0f);
    for (int64_t j = 0; j < count_; j++, row += kTreeSize) {
      load_run(codes.at(j), codes.dtype, codes.size, row);
      for (int64_t d = 0; d < codes.size; d++) usable_ &= std::abs(row[d]) < kTreeHuge;
    }
    if (!usable_) return;
    order_.resize(count_);
    for (int64_t j = 0; j < count_; j++) order_[j].code = (int32_t)j;
    split(0, leaves_);
    for (int64_t b = 0; b < leaves_; b++) pack(b, centre);
  }

  bool usable() const { return usable_; }
  int64_t width() const { return width_; }
  int64_t leaves() const { return leaves_; }
  float farthest() const { return farthest_; }
  const float* box(int64_t b) const { return boxes_.data() + b * 2 * width_; }
  const float* leaf(int64_t b) const { return packed_.data() + b * leaf_floats(); }
  int64_t code(int64_t b, int64_t place) const { return order_[b * kLeaf + place].code; }

  // The leaf on whose side of every split a row lies: rows of one leaf visit about the same leaves.
  int64_t home(const float* z) const {
    int64_t at = 0;
    while (nodes_[at].right) at = z[nodes_[at].dim] < nodes_[at].at ? at + 1 : nodes_[at].right;
    return nodes_[at].dim;
  }

 private:
  struct Place {
    float key;
    int32_t code;
  };
  // Its left child comes next; a leaf has no right one, and its number for `dim`.
  struct Node {
    int32_t dim, right;
    float at;
  };

  int64_t leaf_floats() const { return (width_ + 1) * kLeaf; }

  void split(int64_t begin, int64_t end) {
    const int64_t node = (int64_t)nodes_.size();
    nodes_.push_back({(int32_t)begin, 0, 0});
    if (end - begin == 1) return;
    const int64_t middle = (begin + end) / 2;
    Place *from = order_.data() + begin * kLeaf, *to = order_.data() + std::min(end * kLeaf, count_);
    const int32_t dim = widest(from, to);
    for (Place* p = from; p < to; p++) p->key = rows_.data()[p->code * kTreeSize + dim];
    Place* half = order_.data() + middle * kLeaf;
    std::nth_element(from, half, to, [](const Place& a, const Place& b) { return a.key < b.key; });
    const float at = half->key;
    split(begin, middle);
    nodes_[node] = {dim, (int32_t)nodes_.size(), at};
    split(middle, end);
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

  void pack(int64_t b, const float* centre) {
    const int64_t n = std::min(kLeaf, count_ - b * kLeaf);
    float *to = packed_.data() + b * leaf_floats(), *half = to + width_ * kLeaf;
    std::fill(to, half, 0.0f);
    std::fill(half, half + kLeaf, std::numeric_limits<float>::infinity());
    float *low = boxes_.data() + b * 2 * width_, *high = low + width_;
    for (int64_t i = 0; i < n; i++) {
      const float* x = rows_.data() + code(b, i) * kTreeSize;
      float squares = 0;
      for (int64_t d = 0; d < width_; d++) {
        low[d] = i ? std::min(low[d], x[d]) : x[d];
        high[d] = i ? std::max(high[d], x[d]) : x[d];
        const float apart = x[d] - centre[d];
        to[d * kLeaf + i] = apart;
        squares += apart * apart;
      }
      half[i] = 0.5f * squares;
      farthest_ = std::max(farthest_, std::sqrt(squares) * (1 + 64 * (float)kUnit) + 1e-18f);
    }
  }

  int64_t width_, count_, leaves_;
  bool usable_ = true;
  float farthest_ = 0;
  Floats boxes_;   // of each leaf: the least numbers, then the greatest
  Floats packed_;  // of each leaf: [width][kLeaf], then half of the squared lengths
  Floats rows_;    // [count][kTreeSize], the codes as floats
  std::vector<Place> order_;
  std::vector<Node> nodes_;
};

// The nearest codes of a few rows, which lie in lanes when they are compared with a box.
class TreeSearch {
 public:
  static constexpr int kRows = kLanes;

  explicit TreeSearch(const CodeTree& tree, const float* centre) : tree_(tree), centre_(centre) {}

  // The codes nearest to `n` rows, of which those that are not `usable` (of length below kTreeHuge) are passed over.
  // Counts the leaves and the candidates that were looked at.
  void nearest(const Row* rows, const bool* usable, int n, Candidates& candidates, int64_t* to, int64_t& work) {
    switch (tree_.width()) {
      case 4:
        return find<4>(rows, usable, n, candidates, to, work);
      case 8:
        return find<8>(rows, usable, n, candidates, to, work);
      case 12:
        return find<12>(rows, usable, n, candidates, to, work);
      default:
        return find<16>(rows, usable, n, candidates, to, work);
    }
  }

 private:
  static constexpr int64_t kTurn = 32;  // leaves between looks at how near the nearest codes are

  // Scores of a leaf, of ROWS rows; of each lane the least, and all of them where `sum` is given.
  template <int WIDTH, int ROWS>
  void scores(const float* leaf, const int* rows, vf* most, vf* sum) const {
    for (int m = 0; m < ROWS; m++) most[m] = splat(std::numeric_limits<float>::infinity());
    for (int first = 0; first < kLeafVectors; first += 4) {
      vf part[ROWS][4];
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < 4; v++) part[m][v] = load<vf>(leaf + WIDTH * kLeaf + (first + v) * kLanes);
#pragma GCC unroll 16
      for (int d = 0; d < WIDTH; d++) {
        vf right[4];
        for (int v = 0; v < 4; v++) right[v] = load<vf>(leaf + d * kLeaf + (first + v) * kLanes);
        for (int m = 0; m < ROWS; m++) {
          const vf all = splat(minus_[rows[m]][d]);
          for (int v = 0; v < 4; v++) part[m][v] = multiply_add(all, right[v], part[m][v]);
        }
      }
      for (int m = 0; m < ROWS; m++) {
        most[m] = smaller(smaller(smaller(part[m][0], part[m][1]), smaller(part[m][2], part[m][3])), most[m]);
        for (int v = 0; sum && v < 4; v++) sum[first + v] = part[m][v];
      }
    }
  }

  // Keeps of each lane the least score, where it was, and the least but one of the leaves.
  template <int WIDTH, int ROWS>
  void visit(int64_t b, const int* rows) {
    vf found[ROWS];
    scores<WIDTH, ROWS>(tree_.leaf(b), rows, found, nullptr);
    for (int m = 0; m < ROWS; m++) {
      const int r = rows[m];
      const vf most = most_[r];
      const vi better = (vi)(found[m] < most);
      second_[r] = smaller(larger(found[m], most), second_[r]);
      where_[r] = (better & (vi{} + (int)b)) | (~better & where_[r]);
      most_[r] = smaller(found[m], most);
    }
  }

  // Not less than the squared distance of the nearest code so far, with room for what the bounds were rounded.
  float cut(int r) const {
    return (squares_[r] + 2 * smallest_lane(most_[r]) + 4 * error_[r]) * (1 + 64 * (float)kUnit) + 4 * error_[r];
  }

  template <int WIDTH>
  void find(const Row* rows, const bool* usable, int n, Candidates& candidates, int64_t* to, int64_t& work) {
    alignas(64) float across[WIDTH][kRows] = {}, limits[kRows];
    const vf infinite = splat(std::numeric_limits<float>::infinity());
    std::fill(limits, limits + kRows, -1.0f);
    int64_t home[kRows];
    for (int r = 0; r < n; r++) {
      if (!usable[r]) continue;
      const float* z = rows[r].numbers;
      float squares = 0;
      for (int d = 0; d < WIDTH; d++) {
        const float apart = z[d] - centre_[d];
        squares += apart * apart;
        minus_[r][d] = -apart, across[d][r] = z[d];
      }
      const float reach = std::sqrt(squares) * (1 + 64 * (float)kUnit) + 1e-18f + tree_.farthest();
      squares_[r] = squares;
      error_[r] = (2 * WIDTH + 32) * (float)kUnit * reach * reach + 64 * (float)kSmallest;
      most_[r] = second_[r] = infinite, where_[r] = vi{};
      home[r] = tree_.home(z);
      visit<WIDTH, 1>(home[r], &r);
      limits[r] = cut(r);
    }
    int64_t seen = 0;
    vf z[WIDTH];
    for (int d = 0; d < WIDTH; d++) z[d] = load<vf>(across[d]);
    for (int64_t begin = 0; begin < tree_.leaves(); begin += kTurn) {
      const vf limit = load<vf>(limits);
      const int64_t before = seen;
      for (int64_t b = begin; b < std::min(tree_.leaves(), begin + kTurn); b++) {
        const float* box = tree_.box(b);
        vf even{}, odd{};
#pragma GCC unroll 16
        for (int d = 0; d < WIDTH; d += 2) {
          const vf a = z[d] - smaller(larger(z[d], splat(box[d])), splat(box[WIDTH + d]));
          const vf c = z[d + 1] - smaller(larger(z[d + 1], splat(box[d + 1])), splat(box[WIDTH + d + 1]));
          even = multiply_add(a, a, even), odd = multiply_add(c, c, odd);
        }
        unsigned bits = not_above(even + odd, limit);
        int list[kRows], count = 0, i = 0;
        for (; bits; bits &= bits - 1) {
          list[count] = __builtin_ctz(bits);
          count += home[list[count]] != b;
        }
        for (; i + 2 <= count; i += 2) visit<WIDTH, 2>(b, list + i);
        if (i < count) visit<WIDTH, 1>(b, list + i);
        seen += count;
      }
      for (int r = 0; seen > before && r < n; r++)
        if (usable[r]) limits[r] = cut(r);
    }
    work += seen;
    for (int r = 0; r < n; r++)
      if (usable[r]) to[r] = choose<WIDTH>(rows[r], r, candidates, work);
  }

  // The nearest code of row r once all leaves have been seen or ruled out.
  template <int WIDTH>
  int64_t choose(const Row& row, int r, Candidates& candidates, int64_t& work) {
    const vf under = splat(smallest_lane(most_[r]) + 2 * error_[r]);
    int64_t only = -1, count = 0;
    const auto offer = [&](int64_t b) {
      vf sum[kLeafVectors], ignored;
      scores<WIDTH, 1>(tree_.leaf(b), &r, &ignored, sum);
      for (int v = 0; v < kLeafVectors; v++)
        for (unsigned bits = not_above(sum[v], under); bits; bits &= bits - 1) {
          if (count == 1) {
            candidates.begin(row);
            candidates.offer(only);
          }
          const int64_t j = tree_.code(b, v * kLanes + __builtin_ctz(bits));
          if (count++) candidates.offer(j);
          only = j;
        }
    };
    if (not_above(second_[r], under)) {
      // A lane may have lost a candidate.
      for (int64_t b = 0; b < tree_.leaves(); b++) offer(b);
      work += tree_.leaves();
    } else {
      for (unsigned bits = not_above(most_[r], under); bits; bits &= bits - 1) {
        const int64_t b = where_[r][__builtin_ctz(bits)];
        if (!seen_before(r, bits, under)) offer(b);
      }
    }
    work += count;
    if (count > 1) candidates.finish(&only);
    return only;
  }

  // Whether a lane before the lowest of `bits` led to the same leaf.
  bool seen_before(int r, unsigned bits, vf under) const {
    const int lane = __builtin_ctz(bits);
    unsigned before = not_above(most_[r], under) & ((1u << lane) - 1);
    for (; before; before &= before - 1)
      if (where_[r][__builtin_ctz(before)] == where_[r][lane]) return true;
    return false;
  }

  const CodeTree& tree_;
  const float* centre_;
  alignas(64) float minus_[kRows][kTreeSize];
  vf most_[kRows], second_[kRows];
  vi where_[kRows];
  float squares_[kRows], error_[kRows];
};

}  // namespace
}  // namespace genfast
