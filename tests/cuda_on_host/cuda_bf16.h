#pragma once
#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return host::bits<float>((uint32_t)v.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t u = host::bits<uint32_t>(v);
  return {(uint16_t)(v != v ? 0x7FFFu : (u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};
}
