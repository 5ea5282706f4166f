// Arguments of the CUDA kernels of `sampler_step`. Strides and sizes count elements; a null address is "not given".
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace genfast {

constexpr int kMaxInputs = 8;

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Noise : int { kNoNoise = 0, kNoiseTensor = 1, kPhilox = 2 };
enum X0 : int { kNoX0 = 0, kPlain = 1, kClip = 2, kThreshold = 3 };

// Within a sample the elements are one dense run, in an order that all operands of a step share.
struct Operand {
  char* data;
  int64_t batch_stride;
  int dtype;
};

// Passed to the kernels by value.
struct StepArgs {
  Operand x[kMaxInputs], uncond, log_variance, noise, out, second;
  int inputs;
  int noise_source, x0;
  int64_t batch, inner;

  const double* table;  // [rows, 2 inputs + 8], see genfast/step_table.py
  int64_t rows;
  const int64_t* step;      // the row of sample b is step[b * row_stride], or,
  int64_t row, row_stride;  // where step is null, row + b * row_stride

  double guidance;          // of every sample, where guidances is null
  const double* guidances;  // [b * guidance_stride]
  int64_t guidance_stride;
  double rescale;  // 0: none

  double low, high;     // clip
  int64_t below;        // threshold: rank of the order statistic below the quantile,
  double weight, most;  // weight of the one above, largest threshold

  const int64_t* seeds;  // [b * seed_stride], or null for `seed`
  int64_t seed, seed_stride;
  uint32_t stream, offset;

  void* factors;  // [batch] in the type of the arithmetic; set by sampler_step from the workspace
  void* limits;
};

// Bytes of device memory that a step needs besides its tensors; 0 without rescaling and thresholding.
int64_t workspace_bytes(int64_t batch, int64_t inner, bool float64, bool rescale, bool threshold);

// Enqueue the step; nothing is allocated and nothing synchronises, so it can be captured in a CUDA graph.
// Throws std::runtime_error with a sentence if a launch fails.
void sampler_step(StepArgs args, bool float64, char* workspace, cudaStream_t stream);

// The reductions that come before the step (reductions.cu).
void rescale_factors(const StepArgs& args, bool float64, double* partials, cudaStream_t stream);
void threshold_limits(const StepArgs& args, bool float64, char* workspace, cudaStream_t stream);
int64_t partials_bytes(int64_t batch, int64_t inner);
int64_t selection_bytes(int64_t batch, int64_t inner, bool float64);

void check(cudaError_t error, const char* what);

}  // namespace genfast
