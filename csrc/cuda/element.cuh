// Elements of any dtype to and from the type of the arithmetic, V at a time, and arithmetic that is never contracted:
// the kernels follow genfast/reference/sampler_step.py operation by operation.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/sampler_step.h"

namespace genfast {

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double root(double a) { return __dsqrt_rn(a); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// exp to about 1 ulp, whatever the compiler's flags.
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential(float x) {
  x = x < -110.0f ? -110.0f : x;
  x = x > 90.0f ? 90.0f : x;
  const float k = floorf(__fmaf_rn(x, 1.44269504f, 0.5f));
  const float r = __fmaf_rn(-k, 1.42860676533018e-06f, __fmaf_rn(-k, 0.693145751953125f, x));
  float p = __fmaf_rn(r, 1.0f / 5040, 1.0f / 720);
  p = __fmaf_rn(p, r, 1.0f / 120);
  p = __fmaf_rn(p, r, 1.0f / 24);
  p = __fmaf_rn(p, r, 1.0f / 6);
  p = __fmaf_rn(p, r, 0.5f);
  p = __fadd_rn(__fmaf_rn(__fmul_rn(p, r), r, r), 1.0f);
  // 2^k in two factors: the result may overflow or be subnormal.
  const int power = (int)k, half = power >> 1;
  return __fmul_rn(__fmul_rn(p, __int_as_float((half + 127) << 23)), __int_as_float((power - half + 127) << 23));
}

template <int D>
struct Storage;
template <>
struct Storage<kFloat32> {
  using type = float;
};
template <>
struct Storage<kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct Storage<kFloat16> {
  using type = __half;
};
template <>
struct Storage<kFloat64> {
  using type = double;
};

template <class C>
__device__ __forceinline__ C widen(float v) {
  return (C)v;
}
template <class C>
__device__ __forceinline__ C widen(double v) {
  return (C)v;
}
template <class C>
__device__ __forceinline__ C widen(__nv_bfloat16 v) {
  return (C)__bfloat162float(v);
}
template <class C>
__device__ __forceinline__ C widen(__half v) {
  return (C)__half2float(v);
}
template <class T, class C>
__device__ __forceinline__ T narrow(C v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn((float)v);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn((float)v);
  else
    return (T)v;
}

// One access as wide as the type and V allow, up to 16 bytes each.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

// Elements [e, e + count) at p; the others become 0. `wide` promises alignment of p + e and needs count == V.
template <int D, int V, class C>
__device__ __forceinline__ void load_as(C (&to)[V], const char* p, int64_t e, int count, bool wide) {
  using T = typename Storage<D>::type;
  const T* s = reinterpret_cast<const T*>(p) + e;
  if (wide && count == V) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(s);
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = widen<C>(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = i < count ? widen<C>(s[i]) : C(0);
  }
}

template <int D, int V, class C>
__device__ __forceinline__ void store_as(const C (&from)[V], char* p, int64_t e, int count, bool wide) {
  using T = typename Storage<D>::type;
  T* s = reinterpret_cast<T*>(p) + e;
  if (wide && count == V) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; i++) pack.v[i] = narrow<T>(from[i]);
    *reinterpret_cast<Pack<T, V>*>(s) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < V; i++)
      if (i < count) s[i] = narrow<T>(from[i]);
  }
}

constexpr int kAny = -1;  // the dtype is known at run time only, and looked at once per V elements

template <int D, int V, class C>
__device__ __forceinline__ void load(C (&to)[V], const Operand& o, int64_t e, int count, bool wide) {
  if constexpr (D != kAny) {
    load_as<D>(to, o.data, e, count, wide);
  } else {
    switch (o.dtype) {
      case kFloat32:
        return load_as<kFloat32>(to, o.data, e, count, wide);
      case kBFloat16:
        return load_as<kBFloat16>(to, o.data, e, count, wide);
      case kFloat16:
        return load_as<kFloat16>(to, o.data, e, count, wide);
      default:
        return load_as<kFloat64>(to, o.data, e, count, wide);
    }
  }
}

template <int D, int V, class C>
__device__ __forceinline__ void store(const C (&from)[V], const Operand& o, int64_t e, int count, bool wide) {
  if constexpr (D != kAny) {
    store_as<D>(from, o.data, e, count, wide);
  } else {
    switch (o.dtype) {
      case kFloat32:
        return store_as<kFloat32>(from, o.data, e, count, wide);
      case kBFloat16:
        return store_as<kBFloat16>(from, o.data, e, count, wide);
      case kFloat16:
        return store_as<kFloat16>(from, o.data, e, count, wide);
      default:
        return store_as<kFloat64>(from, o.data, e, count, wide);
    }
  }
}

inline int64_t size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Whether every run of `vector` elements that starts at a multiple of `vector` within a sample may be one Pack.
inline bool is_aligned(const Operand& o, int vector, int64_t batch) {
  if (!o.data) return true;
  const int64_t bytes = size_of(o.dtype) * vector, width = bytes < 16 ? bytes : 16;
  return reinterpret_cast<uintptr_t>(o.data) % width == 0 &&
         (batch == 1 || o.batch_stride * size_of(o.dtype) % width == 0);
}

// --- pieces of the step that the reductions recompute ---

// The row of a sample in the table, or null if it does not exist.
__device__ __forceinline__ const double* table_row(const StepArgs& a, int64_t sample, int64_t& index) {
  index = (a.step ? a.step[sample * a.row_stride] : a.row + sample * a.row_stride);
  return index >= 0 && index < a.rows ? a.table + index * (2 * a.inputs + 8) : nullptr;
}

template <class C>
__device__ __forceinline__ C coefficient(const double* row, int column) {
  return row ? (C)row[column] : (C)__longlong_as_double(0x7FF8000000000000LL);
}

template <class C>
__device__ __forceinline__ C guidance_scale(const StepArgs& a, int64_t sample) {
  return (C)(a.guidances ? a.guidances[sample * a.guidance_stride] : a.guidance);
}

template <class C>
__device__ __forceinline__ C guided(C cond, C uncond, C scale) {
  return add(uncond, mul(scale, add(cond, -uncond)));
}

template <class C>
__device__ __forceinline__ C estimate_x0(C x_t, C output, C k_x, C k_m) {
  return add(mul(k_x, x_t), mul(k_m, output));
}

}  // namespace genfast
