// Arguments of the CUDA kernels of `gradient_bucket`.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace genfast {

// Wire.code in genfast/gradient_wire.py; the first three are the dtype codes of sampler_step.h.
enum WireCode : int { kWireFloat32, kWireBFloat16, kWireFloat16, kWireInt8, kWireE4M3, kWireE5M2 };

// See BucketLayout in genfast/gradient_wire.py.
struct Wire {
  int64_t ranks, chunk, chunk_bytes, code_bytes, numel;
  int code;
};

// A number on the device, or, where its address is null, `value`.
struct Scale {
  const float* address;
  float value;
};

// A contiguous tensor.
struct BucketTensor {
  char* data;
  int dtype;
  int64_t numel;
};

// Float64 numbers that unpacking needs as device memory.
int64_t bucket_workspace(const std::vector<BucketTensor>& tensors);

// Buckets and chunks begin at multiples of 16 bytes.
//
// Enqueue; nothing is allocated and nothing synchronises, so it can be captured in a CUDA graph. Addresses travel as
// arguments of the kernels. Throws std::runtime_error with a sentence if a launch fails.
void pack_gradients(const std::vector<BucketTensor>& tensors, const Wire& wire, const Scale& scale, float* residual,
                    char* out, uint8_t* finite, cudaStream_t stream);
void reduce_chunks(const char* received, const Wire& wire, const Scale& scale, float* residual, char* out,
                   cudaStream_t stream);
void unpack_gradients(const char* reduced, const Wire& wire, const std::vector<BucketTensor>& tensors,
                      const Scale& scale, double* workspace, double* square_norm, uint8_t* finite, cudaStream_t stream);

}  // namespace genfast
