// Standard normals from Philox4x32-10 and Box-Muller. The addressing, the polynomials and the order of operations are
// those of genfast/random.py, so that every instruction set gives the same bits.
#pragma once
#include "common/philox_constants.h"
#include "cpu/simd.h"

namespace genfast {
namespace {

constexpr int kGroup = 64;  // elements that share 16 Philox blocks: word w of block j is element 16 w + j

struct PhiloxKey {
  uint64_t seed;
  uint32_t sample, stream;
};

inline void philox_words(const PhiloxKey& key, uint64_t block, vu w[4]) {
  vu lane{};
  for (int i = 0; i < kLanes; i++) lane[i] = (uint32_t)i;
  // Blocks of a group start at a multiple of 16, so adding a lane number never carries into the high word.
  vu c0 = splat((uint32_t)block) + lane, c1 = splat((uint32_t)(block >> 32));
  vu c2 = splat(key.sample), c3 = splat(key.stream);
  uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
  for (int round = 0; round < 10; round++) {
    vu hi0, lo0, hi1, lo1;
    multiply_wide(c0, kPhiloxM0, hi0, lo0);
    multiply_wide(c2, kPhiloxM1, hi1, lo1);
    c0 = hi1 ^ c1 ^ splat(k0);
    c1 = lo1;
    c2 = hi0 ^ c3 ^ splat(k1);
    c3 = lo0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

inline void box_muller(vu w0, vu w1, vf& z0, vf& z1) {
  const vf u = to_float(w0 | splat(1u)) * splat(kTwoToMinus32);
  const vi bits = as_int(u) - kSqrtHalfBits;
  const vf exponent = to_float(bits >> 23);
  const vf f = as_float((bits & 0x7FFFFF) + kSqrtHalfBits) - splat(1.0f);
  vf p = splat(kLogP[7]);
  for (int k = 6; k >= 0; k--) p = fma_exact(p, f, splat(kLogP[k]));
  const vf tail = fma_exact(exponent, splat(kLn2Lo), (f * f) * fma_exact(p, f, splat(-0.5f)));
  const vf radius = square_root(splat(-2.0f) * fma_exact(exponent, splat(kLn2Hi), f + tail));

  const vu turns = (w1 & splat(~63u)) | splat(32u);
  const vu quadrant = (turns + splat(1u << 29)) >> 30;
  const vf y = to_float((vi)(turns - (quadrant << 30))) * splat(kTwoToMinus32);
  const vf y2 = y * y;
  vf s = splat(kSinP[2]);
  s = fma_exact(s, y2, splat(kSinP[1]));
  s = fma_exact(s, y2, splat(kSinP[0]));
  s = fma_exact(s, y2, splat(kSinLo));
  s = fma_exact(y, splat(kSinHi), y * s);
  vf c = splat(kCosP[3]);
  c = fma_exact(c, y2, splat(kCosP[2]));
  c = fma_exact(c, y2, splat(kCosP[1]));
  c = fma_exact(c, y2, splat(kCosP[0]));
  c = fma_exact(c, y2, splat(1.0f));
  const vi odd = (vi)(quadrant & splat(1u)) != 0;
  const vf cos = odd ? s : c, sin = odd ? c : s;
  // Negation is the sign bit alone: cosine in quadrants 1 and 2, sine in 2 and 3.
  z0 = radius * (vf)((vu)cos ^ (((quadrant + splat(1u)) & splat(2u)) << 30));
  z1 = radius * (vf)((vu)sin ^ ((quadrant & splat(2u)) << 30));
}

// Elements [64 first, 64 (first + groups)) of one sample.
inline void philox_normal(const PhiloxKey& key, int64_t first, int64_t groups, float* z) {
  for (int64_t g = 0; g < groups; g++, z += kGroup) {
    for (int j = 0; j < 16; j += kLanes) {
      vu w[4];
      philox_words(key, (uint64_t)(first + g) * 16 + j, w);
      vf z0, z1, z2, z3;
      box_muller(w[0], w[1], z0, z1);
      box_muller(w[2], w[3], z2, z3);
      store(z + j, z0);
      store(z + 16 + j, z1);
      store(z + 32 + j, z2);
      store(z + 48 + j, z3);
    }
  }
}

}  // namespace
}  // namespace genfast
