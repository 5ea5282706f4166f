// Lower bounds of the scores of all codes for a few rows, in low precision.
//
// With a centre c taken out of both, the l2 score of code j for row i is, up to what is the same for all codes,
//
//     S_ij = |e'_j|^2 / 2 - z'_i . e'_j,        z' = z - c,  e' = e - c,
//
// ("dot": - z_i . e'_j; "cosine": the same of codes of length 1). Where z' ~ s p and e' ~ t_j q with whole numbers
// p and q of 8 bits,
//
//     z' . e' = s t_j p . q + (z' - s p) . t_j q + z' . (e' - t_j q),   so that by Cauchy and Schwarz
//     S_ij >= n_j - r_i a_j - l_i b_j - s t_j p . q,
//
// n_j = |e'_j|^2 / 2, a_j = |t_j q|, b_j = |e'_j - t_j q|, l_i = |z'_i|, r_i = |z'_i - s p|. One instruction multiplies
// and adds four of them in each of 16 lanes (AVX512-VNNI). Short codes share t among a block, so that a score needs
// nothing but whole numbers: the rest of the bound is where its sum begins. Elsewhere p . q is a float32 product, b_j
// holds its rounding and r_i is 0. Codes lie in lanes: packed[word][code], a word being four bytes of a code or one
// float.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/code_distance.h"
#include "cpu/token_math.h"
#include "cpu/transpose.h"

namespace genfast {
namespace {

#if defined(__AVX512VNNI__)
constexpr bool kBytes = true;
#else
constexpr bool kBytes = false;
#endif
#if defined(__AVX512F__)
constexpr int kCodeVectors = 4;
#else
constexpr int kCodeVectors = 2;
#endif
constexpr int kScreenRows = 6;                     // of a register tile
constexpr int64_t kBlock = kCodeVectors * kLanes;  // codes that are packed together
constexpr int64_t kRowChunk = 4 * kScreenRows;     // rows that share a scale, and a pass over the packed codes

constexpr int64_t words_of(int64_t size) { return kBytes ? (size + 3) / 4 : size; }

// Words up to which a code is short: a tile of rows then stays in registers while the codes pass by.
constexpr int64_t kShortWords = 4;
constexpr bool is_short(int64_t size) { return kBytes && words_of(size) <= kShortWords; }

// What a row takes: bytes are written in whole vectors of 16.
constexpr int64_t row_floats(int64_t size) { return kBytes ? (size + 15) / 16 * 4 : size; }

// Code j of a block lies in lane (j / kCodeVectors) of vector (j % kCodeVectors): neighbours share a lane.
struct Packed {
  int64_t words;
  float* data;  // of each block: [words][kBlock], then n, a, b and t of its codes

  static int64_t block_floats(int64_t size) { return (words_of(size) + 4) * kBlock; }
  float* block(int64_t b) const { return data + b * (words + 4) * kBlock; }
};

// Rows of a chunk as they are multiplied, and what they share.
struct ScreenRows {
  int64_t words, stride;
  float* data;               // [kRowChunk][stride], of which words are multiplied
  int32_t start[kRowChunk];  // where the sums of whole numbers begin
  float scale;               // s
  float residual, length;    // largest r_i and l_i
};

constexpr float kHuge = 1e18f;  // lengths above it may overflow
constexpr float kLeastScale = 1e-30f;

struct Sums {
  float squares, largest;
};

// Not less than |x| of `size` numbers: a sum of squares loses what underflows.
inline float length_of(const Sums& sums, int64_t size) {
  const float inflate = 1.0f + (float)(size + 24) * (float)kUnit;
  if (sums.squares > 1e-25f) return std::sqrt(sums.squares) * inflate;
  return sums.largest * std::sqrt((float)size) * inflate;
}

// |x|^2 and the largest magnitude; n is a multiple of kLanes.
inline Sums measure(const float* x, int64_t n) {
  vf sum{}, most{};
  for (int64_t d = 0; d < n; d += kLanes) {
    const vf v = load<vf>(x + d), size = as_float(as_int(v) & (vi{} + 0x7FFFFFFF));
    sum = multiply_add(v, v, sum);
    most = larger(size, most);
  }
  return {sum_of(sum), largest_lane(most)};
}

#if defined(__AVX512VNNI__)
// Whole numbers nearest to x / scale as bytes, xor'ed with `flip`; lengths of what they stand for and of the rest, or
// more.
struct Rounded {
  float length, rest;
};
inline Rounded to_bytes(const float* x, int64_t n, float scale, int8_t flip, int8_t* to) {
  const vf inverse = splat(1.0f / scale), s = splat(scale);
  vf squares{}, rest{};
  for (int64_t d = 0; d < n; d += kLanes) {
    const vf v = load<vf>(x + d);
    const __m512i whole = _mm512_cvtps_epi32((__m512)(v * inverse));
    const vf near = (vf)_mm512_cvtepi32_ps(whole) * s, left = v - near;
    squares = multiply_add(near, near, squares), rest = multiply_add(left, left, rest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d),
                     _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8(flip)));
  }
  const float root = std::sqrt((float)n), inflate = 1.0f + (float)(n + 24) * (float)kUnit;
  if (scale < 1e-12f) return {127.5f * scale * root, 0.5f * scale * root * inflate};  // squares underflow
  return {std::sqrt(sum_of(squares)) * inflate, std::sqrt(sum_of(rest)) * inflate};
}
#endif

// Work space for packing a block.
struct PackSpace {
  int64_t width;
  Floats code, rows;
  explicit PackSpace(int64_t size) : width(padded(size)), code(width), rows(kLanes * padded(words_of(size))) {}
};

// Codes [first, first + kBlock) into block `to`; beyond the last code there are codes that are never near, and so is,
// if `one` is asked for, a code that equals the one before: a codebook that was never trained may have a single code.
inline void pack_block(const Codes& codes, Metric metric, bool one, const float* centre, int64_t first, int64_t words,
                       float* to, PackSpace& space) {
  const int64_t size = codes.size, width = space.width, row_words = padded(words);
  float *n = to + words * kBlock, *a = n + kBlock, *b = a + kBlock, *t = b + kBlock;
  float* x = space.code.data();
  std::fill(x + size, x + width, 0.0f);
  // Leaves in x what is packed of code j, and how large it is: NaN if no code is there, infinite if float32 cannot
  // judge it. Such a code is always looked at; what is not finite will then be found out.
  const auto prepare = [&](int64_t j) -> Sums {
    if (j >= codes.count || (one && j > 0 && codes.equal(j, j - 1))) return {NAN, 0};
    load_run(codes.at(j), codes.dtype, size, x);
    const auto [squares, largest] = measure(x, width);
    const bool usable = squares < kHuge * kHuge && (metric != kCosine || squares > 1e-20f || largest == 0);
    if (!usable) return {INFINITY, 0};
    if (metric == kCosine && squares > 0) {
      const float shrink = 1.0f / std::sqrt(squares);
      for (int64_t d = 0; d < size; d++) x[d] *= shrink;
    }
    for (int64_t d = 0; d < size; d++) x[d] -= centre[d];
    return measure(x, width);
  };
  float shared = 0;
  if (is_short(size))
    for (int64_t j = first; j < first + kBlock; j++) shared = std::max(shared, prepare(j).largest);
  for (int v = 0; v < kCodeVectors; v++) {
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t j = first + lane * kCodeVectors + v, at = v * kLanes + lane;
      float* row = space.rows.data() + lane * row_words;
      const Sums sums = prepare(j);
      if (!std::isfinite(sums.squares)) {
        n[at] = std::isnan(sums.squares) ? INFINITY : -INFINITY;
        a[at] = b[at] = 0, t[at] = std::max(shared / 127.0f, kLeastScale);
        std::memset(row, is_short(size) ? 0 : 0x80, row_words * 4);
        continue;
      }
      const float length = length_of(sums, size);
      const float half = metric == kL2 ? sums.squares * 0.5f : 0.0f;
      // What was rounded before this: the difference from the centre, a length of 1.
      float before = 2.0f * (float)kUnit * length;
      if (metric == kCosine) before += (float)(size + 24) * (float)kUnit;
#if defined(__AVX512VNNI__)
      const float scale = std::max((is_short(size) ? shared : sums.largest) / 127.0f, kLeastScale);
      const int8_t flip = is_short(size) ? 0 : (int8_t)0x80;
      const Rounded found = to_bytes(x, width, scale, flip, reinterpret_cast<int8_t*>(row));
      a[at] = found.length;
      b[at] = found.rest + before + 16.0f * (float)kUnit * length;
      t[at] = scale;
#else
      std::copy(x, x + size, row);
      std::fill(row + size, row + row_words, 0.0f);
      a[at] = t[at] = 0;
      b[at] = before + (float)(2 * size + 24) * (float)kUnit * length;
#endif
      n[at] = half - half * (float)(2 * size + 32) * (float)kUnit;
    }
    for (int64_t k = 0; k < words; k += kLanes) {
      vf square[kLanes];
      for (int lane = 0; lane < kLanes; lane++) square[lane] = load<vf>(space.rows.data() + lane * row_words + k);
      transpose(square);
      const int64_t count = std::min<int64_t>(kLanes, words - k);
      for (int64_t i = 0; i < count; i++) store(to + (k + i) * kBlock + v * kLanes, square[i]);
    }
  }
}

// Whether GCC keeps a tile's sums in registers, at twice the speed, depends on what else is in the file. It does where
// every loop over them is unrolled by order and partial redundancies are left in.
#if defined(__clang__)
#define GENFAST_SUMS_IN_REGISTERS __attribute__((noinline))
#else
#define GENFAST_SUMS_IN_REGISTERS __attribute__((noinline, optimize("no-tree-pre")))
#endif

// Scores of ROWS rows with a block, in units of the scale; of each lane the least one goes to `least`.
template <int ROWS>
GENFAST_SUMS_IN_REGISTERS void screen_tile(const ScreenRows& rows, int64_t row, const float* block, const float* first,
                                           float* least, int64_t stride, bool fresh) {
  const int64_t words = rows.words;
  const float* left = rows.data + row * rows.stride;
#if defined(__AVX512VNNI__)
  __m512i sum[ROWS][kCodeVectors];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) sum[m][v] = _mm512_set1_epi32(rows.start[row + m]);
  for (int64_t k = 0; k < words; k++) {
    __m512i right[kCodeVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) right[v] = _mm512_loadu_si512(block + k * kBlock + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      int32_t word;
      std::memcpy(&word, left + m * rows.stride + k, 4);
      const __m512i four = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int v = 0; v < kCodeVectors; v++) sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], right[v], four);
    }
  }
  const float* scale = block + (words + 3) * kBlock;
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    vf most = splat(std::numeric_limits<float>::infinity());
    if (!fresh) most = load<vf>(least + m * stride);
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) {
      const vf score =
          multiply_add((vf)_mm512_cvtepi32_ps(sum[m][v]), load<vf>(scale + v * kLanes), load<vf>(first + v * kLanes));
      most = smaller(score, most);
    }
    store(least + m * stride, most);
  }
#else
  vf sum[ROWS][kCodeVectors];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) sum[m][v] = load<vf>(first + v * kLanes);
  for (int64_t k = 0; k < words; k++) {
    vf right[kCodeVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) right[v] = load<vf>(block + k * kBlock + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      const vf all = splat_word(left + m * rows.stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < kCodeVectors; v++) sum[m][v] = multiply_add(all, right[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    vf most = fresh ? sum[m][0] : load<vf>(least + m * stride);
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) most = smaller(sum[m][v], most);
    store(least + m * stride, most);
  }
#endif
}

#if defined(__AVX512VNNI__)
// Where the sums of whole numbers of all codes begin, in units of s t: begin[block][code]. The bytes of the rows have
// 128 added to them. A code that is always looked at, or whose bound is beyond whole numbers, leaves minus infinity in
// `forced`, lane by lane; a bound that is too large is lowered.
inline void begin_short(const ScreenRows& rows, const Packed& packed, int64_t blocks, int32_t* begin, float* forced) {
  constexpr float kLimit = 0x1p30f;
  const vf residual = splat(rows.residual), length = splat(rows.length), inverse = splat(1.0f / rows.scale);
  for (int64_t b = 0; b < blocks; b++) {
    const float *block = packed.block(b), *n = block + rows.words * kBlock;
    vf always = splat(INFINITY);
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const vf apart = residual * load<vf>(n + kBlock + j) + length * load<vf>(n + 2 * kBlock + j);
      const vf bound = (load<vf>(n + j) - apart) * inverse / load<vf>(n + 3 * kBlock + j);
      const vi low = bound < splat(-kLimit);
      always = smaller(as_float((as_int(splat(-INFINITY)) & low) | (as_int(splat(INFINITY)) & ~low)), always);
      const __m512 held = _mm512_max_ps(_mm512_min_ps((__m512)bound, _mm512_set1_ps(kLimit)), _mm512_set1_ps(-kLimit));
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = 0; k < rows.words; k++)
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(block + k * kBlock + j));
      const __m512i whole = _mm512_cvt_roundps_epi32(held, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      _mm512_storeu_si512(begin + b * kBlock + j, _mm512_sub_epi32(whole, _mm512_slli_epi32(sum, 7)));
    }
    store(forced + b * kLanes, always);
  }
}

template <int WORDS, int ROWS>
inline void screen_short(const ScreenRows& rows, int64_t row, const Packed& packed, int64_t blocks, int64_t span,
                         const int32_t* begin, const float* forced, float* least, int64_t stride) {
  __m512i left[ROWS][WORDS];
  for (int m = 0; m < ROWS; m++)
    for (int k = 0; k < WORDS; k++) {
      int32_t word;
      std::memcpy(&word, rows.data + (row + m) * rows.stride + k, 4);
      left[m][k] = _mm512_set1_epi32(word);
    }
  for (int64_t b = 0; b < blocks; b++) {
    const float* block = packed.block(b);
    __m512i most[ROWS];
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) {
      __m512i right[WORDS];
      for (int k = 0; k < WORDS; k++) right[k] = _mm512_loadu_si512(block + k * kBlock + v * kLanes);
      const __m512i start = _mm512_loadu_si512(begin + b * kBlock + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        __m512i sum = start;
        for (int k = 0; k < WORDS; k++) sum = _mm512_dpbusd_epi32(sum, left[m][k], right[k]);
        most[m] = v ? _mm512_min_epi32(sum, most[m]) : sum;
      }
    }
    const vf scale = load<vf>(block + (WORDS + 3) * kBlock), always = load<vf>(forced + b * kLanes);
    float* to = least + b / span * kLanes;
    for (int m = 0; m < ROWS; m++) {
      vf score = smaller((vf)_mm512_cvtepi32_ps(most[m]) * scale, always);
      if (b % span) score = smaller(score, load<vf>(to + m * stride));
      store(to + m * stride, score);
    }
  }
}
#endif

// Floats of `begin`, which is for short codes.
constexpr int64_t begin_floats(int64_t size, int64_t blocks) { return is_short(size) ? blocks * (kBlock + kLanes) : 0; }

// Blocks [0, blocks): least[row][group][lane] of every `span` blocks, `stride` floats from row to row.
inline void screen(const ScreenRows& rows, int64_t count, const Packed& packed, int64_t blocks, int64_t span,
                   float* begin, float* least, int64_t stride) {
#if defined(__AVX512VNNI__)
  if (rows.words <= kShortWords) {
    int32_t* const sums = reinterpret_cast<int32_t*>(begin);
    float* const forced = begin + blocks * kBlock;
    begin_short(rows, packed, blocks, sums, forced);
    const auto run = [&](auto words) {
      constexpr int kWords = decltype(words)::value, kRows = kWords <= 2 ? 6 : 4;
      for (int64_t row = 0; row < count; row += kRows)
        screen_short<kWords, kRows>(rows, row, packed, blocks, span, sums, forced, least + row * stride, stride);
    };
    if (rows.words == 1) return run(std::integral_constant<int, 1>());
    if (rows.words == 2) return run(std::integral_constant<int, 2>());
    if (rows.words == 3) return run(std::integral_constant<int, 3>());
    return run(std::integral_constant<int, 4>());
  }
#endif
  alignas(64) float first[kBlock];
  const vf inverse = splat(1.0f / rows.scale), residual = splat(rows.residual), length = splat(rows.length);
  for (int64_t b = 0; b < blocks; b++) {
    const float *block = packed.block(b), *n = block + rows.words * kBlock;
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const vf apart = residual * load<vf>(n + kBlock + j) + length * load<vf>(n + 2 * kBlock + j);
      store(first + j, (load<vf>(n + j) - apart) * inverse);
    }
    float* to = least + b / span * kLanes;
    for (int64_t row = 0; row < count; row += kScreenRows)
      screen_tile<kScreenRows>(rows, row, block, first, to + row * stride, stride, b % span == 0);
  }
}

}  // namespace
}  // namespace genfast
