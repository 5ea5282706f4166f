// Gradients to and from buckets on the wire, and the sum of the ranks' chunks.
#pragma once
#include <cstdint>
#include <vector>

namespace genfast {

constexpr int64_t kGradientBlock = 256;

// The first three are the dtype codes of dtype.h.
enum WireFormat : int { kInt8 = 3, kE4M3 = 4, kE5M2 = 5 };

// See BucketLayout in genfast/gradient_wire.py.
struct WireShape {
  int64_t ranks = 1, chunk = 0, chunk_bytes = 0, code_bytes = 0, numel = 0;
  int wire = 0;
  int64_t code_size() const { return wire == 0 ? 4 : wire < kInt8 ? 2 : 1; }
};

// A tensor of the bucket: its `numel` values in order of its shape. Without `sizes` they are neighbours in memory.
struct GradientTensor {
  char* data = nullptr;
  int dtype = 0;
  int64_t numel = 0;
  std::vector<int64_t> sizes, strides;
};

struct BucketScale {
  const float* address = nullptr;
  float value = 1;
  float get() const { return address ? *address : value; }
};

void pack_gradients(const std::vector<GradientTensor>& tensors, const WireShape& shape, const BucketScale& scale,
                    float* residual, uint8_t* out, uint8_t* finite);
void reduce_chunks(const uint8_t* received, const WireShape& shape, const BucketScale& scale, float* residual,
                   uint8_t* out);
// Of the sum of `count` buckets, one after the other in memory.
void unpack_gradients(const uint8_t* buckets, int64_t count, const WireShape& shape,
                      const std::vector<GradientTensor>& tensors, const BucketScale& scale, double* square_norm,
                      uint8_t* finite);

}  // namespace genfast
