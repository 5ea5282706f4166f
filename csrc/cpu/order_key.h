// Floats as whole numbers of the same order; -0 is 0, -inf is 0x7FFFFF.
#pragma once
#include "cpu/dtype.h"

namespace genfast {
namespace {

inline vu order_keys(vf x) {
  const vi u = as_int(x + splat(0.0f));
  return (vu)u ^ ((vu)(u >> 31) | splat(0x80000000u));
}
inline uint32_t order_key(float x) {
  const uint32_t u = to_bits(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
inline float from_key(uint32_t key) { return from_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

}  // namespace
}  // namespace genfast
