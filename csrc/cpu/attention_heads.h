// How Python describes a tensor of heads to the kernels of the family `attention`.
#pragma once
#include <tuple>

#include "cpu/attention.h"

namespace genfast {
namespace {

using PyHeads = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address, dtype code, strides of B, H, L

inline Heads heads(const PyHeads& given) {
  Heads t;
  uintptr_t address;
  std::tie(address, t.dtype, t.batch_stride, t.head_stride, t.row_stride) = given;
  t.data = reinterpret_cast<char*>(address);
  return t;
}

}  // namespace
}  // namespace genfast
