// The forward process of discrete diffusion: noise position e of a sequence if its uniform number is below
//
//     p = slope t + floor,    t = (high - low) u + low,    u stratified or not, one per block.
//
// All in float32, one rounding per operation: genfast/reference/token_masking.py is the specification, to the bit. The
// uniform number is a Philox word w, and w 2^-32 < p is the same as w < ceil(p 2^32) in whole numbers, so that a row is
// its words, a comparison with one number per block, and the writes.
//
// A fixed count takes the smallest words of a row. They need no sort: a bisection over the 32 bits of a word, a count
// of all words each, until just so many are below.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/token_masking.h"

namespace genfast {
namespace {

constexpr int64_t kGrain = 1 << 14;
constexpr uint64_t kAll = (uint64_t)1 << 32;  // above every word
constexpr uint64_t kTokenBlocks = (uint64_t)1 << 62, kTimeBlocks = (uint64_t)1 << 63;

constexpr int64_t kShortBlock = 64;  // below it, what belongs to a block is first written out for every position

struct Workspace {
  std::vector<uint32_t> words, tokens;  // of a row, padded to whole groups
  std::vector<float> uniform, shares;
  std::vector<uint64_t> limits;
};

PhiloxKey key_of(const MaskArgs& a, int64_t row) {
  const uint64_t seed = (uint64_t)(a.seeds ? a.seeds[a.seed_per_sequence ? row : 0] : a.seed);
  return {seed, a.offset + (a.seed_per_sequence ? 0 : (uint32_t)row), a.stream};
}

// The word of every position of a row, from the blocks that begin at `first`.
void position_words(const PhiloxKey& key, uint64_t first, int64_t length, std::vector<uint32_t>& out) {
  const int64_t groups = (length + kGroup - 1) / kGroup;
  out.resize(groups * kGroup);
  uint32_t* p = out.data();
  for (int64_t g = 0; g < groups; g++, p += kGroup) {
    for (int j = 0; j < 16; j += kLanes) {
      vu w[4];
      philox_words(key, first + (uint64_t)g * 16 + j, w);
      for (int k = 0; k < 4; k++) store(p + 16 * k + j, w[k]);
    }
  }
}

void find_times(const MaskArgs& a, int64_t row, std::vector<float>& uniform, float* out) {
  const float* u = a.times ? a.times + row * a.blocks : nullptr;
  if (!u) {
    uniform.resize(a.blocks + kLanes);
    const PhiloxKey key = key_of(a, row);
    for (int64_t j = 0; j < a.blocks; j += kLanes) {
      vu w[4];
      philox_words(key, kTimeBlocks + (uint64_t)j, w);
      for (int k = 0; k < kLanes; k++) uniform[j + k] = (float)(w[0][k] >> 8) * 0x1p-24f;
    }
    u = uniform.data();
  } else if (!a.drawn) {
    std::copy(u, u + a.blocks, out);
    return;
  }
  const float strata = (float)a.strata;
  for (int64_t j = 0; j < a.blocks; j++) {
    float v = u[j];
    if (a.strata) {
      const int64_t stratum = (((int64_t)a.offset + row) * a.blocks + j) % a.strata;
      v = v / strata + (float)stratum / strata;
      if (v >= 1) v = v - 1;
    }
    out[j] = v * a.spread + a.low;
  }
}

// w < limit is w 2^-32 < p; no word for NaN.
uint64_t limit_of(float p) {
  if (!(p > 0)) return 0;
  return p >= 1 ? kAll : (uint64_t)std::ceil((double)p * 0x1p32);
}

int64_t token_of(const MaskArgs& a, const Workspace& w, int64_t row, int64_t at) {
  if (!a.vocab_size) return a.mask_id;
  if (a.tokens) return a.tokens[row * a.length + at];
  return (int64_t)((uint64_t)w.tokens[at] * a.vocab_size >> 32);
}

// Positions [first, last): noised where maskable and `noised` is true, with the weight `share`.
template <class Noised, class Share>
void write(const MaskArgs& a, const Workspace& w, int64_t row, int64_t first, int64_t last, const Share& share,
           const Noised& noised) {
  const int64_t* x0 = a.x0 + row * a.x0_stride;
  const uint8_t* maskable = a.maskable ? a.maskable + row * a.maskable_stride : nullptr;
  int64_t* x = a.x + row * a.length;
  uint8_t* mask = a.mask + row * a.length;
  if (maskable)
    for (int64_t i = first; i < last; i++) mask[i] = maskable[i] && noised(i);
  else
    for (int64_t i = first; i < last; i++) mask[i] = noised(i);
  if (a.vocab_size)
    for (int64_t i = first; i < last; i++) x[i] = mask[i] ? token_of(a, w, row, i) : x0[i];
  else
    for (int64_t i = first; i < last; i++) x[i] = mask[i] ? a.mask_id : x0[i];
  if (a.weight)
    for (int64_t i = first; i < last; i++) a.weight[row * a.length + i] = mask[i] ? share(i) : 0.0f;
}

void mask_by_time(const MaskArgs& a, int64_t row, Workspace& w) {
  float* times = a.times_out + row * a.blocks;
  find_times(a, row, w.uniform, times);
  const float* noise = a.noise ? a.noise + row * a.length : nullptr;
  const uint32_t* words = w.words.data();
  const bool brief = a.blocks > 1 && a.block_size < kShortBlock && !noise;
  if (brief) w.limits.resize(a.length), w.shares.resize(a.length);
  for (int64_t j = 0; j < a.blocks; j++) {
    const int64_t first = j * a.block_size, last = std::min(first + a.block_size, a.length);
    const float p = times[j] * a.slope + a.floor;
    const float weight = 1.0f / (a.by_time ? times[j] : p);
    const auto share = [=](int64_t) { return weight; };
    const uint64_t limit = limit_of(p);
    if (brief) {
      std::fill(w.limits.begin() + first, w.limits.begin() + last, limit);
      std::fill(w.shares.begin() + first, w.shares.begin() + last, weight);
    } else if (noise) {
      write(a, w, row, first, last, share, [=](int64_t i) { return noise[i] < p; });
    } else if (limit == kAll) {
      write(a, w, row, first, last, share, [](int64_t) { return true; });
    } else {
      write(a, w, row, first, last, share, [words, limit = (uint32_t)limit](int64_t i) { return words[i] < limit; });
    }
  }
  if (brief)
    write(
        a, w, row, 0, a.length, [shares = w.shares.data()](int64_t i) { return shares[i]; },
        [words, limits = w.limits.data()](int64_t i) { return words[i] < limits[i]; });
}

int64_t count_below(const std::vector<uint32_t>& words, uint32_t limit) {
  vi sum{};
  for (size_t i = 0; i < words.size(); i += kLanes) sum -= (vi)(load<vu>(words.data() + i) < splat(limit));
  int64_t count = 0;
  for (int k = 0; k < kLanes; k++) count += sum[k];
  return count;
}

void mask_by_count(const MaskArgs& a, int64_t row, Workspace& w) {
  const uint8_t* maskable = a.maskable ? a.maskable + row * a.maskable_stride : nullptr;
  int64_t most = a.length;
  if (maskable) {
    most = 0;
    for (int64_t i = 0; i < a.length; i++) most += maskable[i] != 0;
  }
  const int64_t wanted = std::clamp<int64_t>(a.counts ? a.counts[row] : a.count, 0, most);
  const float p = most ? (float)wanted / (float)most : 0.0f;
  a.times_out[row] = p;
  const auto weight = [share = 1.0f / p](int64_t) { return share; };
  if (wanted == most) return write(a, w, row, 0, a.length, weight, [](int64_t) { return true; });
  if (wanted == 0) return write(a, w, row, 0, a.length, weight, [](int64_t) { return false; });

  // A word of all ones is below no limit that is tried, so it also stands for "not maskable".
  const uint32_t none = ~0u;
  for (int64_t i = 0; i < (int64_t)w.words.size(); i++)
    if (i >= a.length || (maskable && !maskable[i])) w.words[i] = none;
  uint64_t low = 0, high = kAll;  // at most `wanted` words are below `low`, more are below `high`
  int64_t below = 0;
  while (high - low > 1 && below < wanted) {
    const uint64_t middle = (low + high) / 2;
    const int64_t count = count_below(w.words, (uint32_t)middle);
    if (count > wanted)
      high = middle;
    else
      low = middle, below = count;
  }
  int64_t ties = wanted - below;
  const uint32_t* words = w.words.data();
  write(a, w, row, 0, a.length, weight, [=, limit = (uint32_t)low, &ties](int64_t i) {
    if (words[i] < limit) return true;
    return words[i] == limit && ties-- > 0;
  });
}

}  // namespace

void forward_mask(const MaskArgs& a) {
  parallel_for(threads_for(a.batch * a.length, kGrain), a.batch, [&](int64_t first, int64_t last) {
    Workspace w;
    for (int64_t row = first; row < last; row++) {
      if (!a.noise) position_words(key_of(a, row), 0, a.length, w.words);
      if (a.vocab_size && !a.tokens) position_words(key_of(a, row), kTokenBlocks, a.length, w.tokens);
      if (a.exact)
        mask_by_count(a, row, w);
      else
        mask_by_time(a, row, w);
    }
  });
}

}  // namespace genfast
