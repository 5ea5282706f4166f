// The part of the DLPack exchange protocol (version 1.3 on) that is used here: C calls that show a tensor without
// taking it, and that make a tensor of memory lent by us. Layouts are fixed by the protocol's binary interface.
#pragma once
#include <cstdint>

namespace genfast {

struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensor*);
  uint64_t flags;
  DLTensor tensor;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocate, *from_object;
  int (*to_object)(DLManagedTensor* tensor, void** object);
  int (*show)(void* object, DLTensor* out);
};

constexpr int32_t kDLCpu = 1;
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;
constexpr int kMaxDims = 8;

}  // namespace genfast
