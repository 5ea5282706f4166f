// The exponential, and what is made of it.
#pragma once
#include "cpu/token_math.h"

namespace genfast {
namespace {

// e^x, 0 below e^-60; NaN stays NaN. With x = k ln 2 + r, r is made in two steps, so that the error is that of the
// polynomial (of 2^(r log2 e)) whatever x is.
inline vf exponential(vf x) {
  constexpr float kLowest = -60.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = larger(splat(kLowest), x);
  const vi gone = x <= splat(kLowest);
  const vf big = fma_exact(x, splat(kLog2E), splat(kRoundToInteger)), k = big - splat(kRoundToInteger);
  const vf r = fma_exact(k, splat(-kLn2Low), fma_exact(k, splat(-kLn2High), x)) * splat(kLog2E);
  const vi n = as_int(big) - as_int(splat(kRoundToInteger));
  vf p = splat(kExp2P[6]);
  for (int i = 5; i >= 0; i--) p = fma_exact(p, r, splat(kExp2P[i]));
  return as_float(as_int(times_power(p, n)) & ~gone);
}

// log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3, of which nine terms are left of the series.
inline vf log_one_plus(vf e) {
  const vf s = e / (e + splat(2.0f)), s2 = s * s;
  vf p = splat(1.0f / 17);
  for (int k = 15; k >= 1; k -= 2) p = p * s2 + splat(1.0f / (float)k);
  return (s + s) * p;
}

}  // namespace
}  // namespace genfast
