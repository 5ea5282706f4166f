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

// Words of blocks [block, block + kLanes), `block` a multiple of kLanes. A 32-bit word lives in the low half of a
// 64-bit lane, because the multiplier reads just that half: a product's low word needs no masking, its high word is one
// shift, and no lane is ever shuffled until the end.
inline void philox_words(const PhiloxKey& key, uint64_t block, vu w[4]) {
  constexpr int kHalf = kLanes / 2;
  vq c0[2], c1[2], c2[2], c3[2], lane{};
  for (int i = 0; i < kHalf; i++) lane[i] = (uint64_t)i;
  for (int h = 0; h < 2; h++) {
    c0[h] = lane + (block + h * kHalf);
    c1[h] = vq{} + (block >> 32);
    c2[h] = vq{} + key.sample;
    c3[h] = vq{} + key.stream;
  }
  uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
  for (int round = 0; round < 10; round++) {
    for (int h = 0; h < 2; h++) {
      const vq p0 = multiply_low(c0[h], kPhiloxM0), p1 = multiply_low(c2[h], kPhiloxM1);
      c0[h] = high_half(p1) ^ c1[h] ^ (uint64_t)k0;
      c1[h] = p1;
      c2[h] = high_half(p0) ^ c3[h] ^ (uint64_t)k1;
      c3[h] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  w[0] = pack_low(c0[0], c0[1]), w[1] = pack_low(c1[0], c1[1]);
  w[2] = pack_low(c2[0], c2[1]), w[3] = pack_low(c3[0], c3[1]);
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
