// Arguments of the CPU kernel `sampler_step`. Strides and sizes count elements; a null address means "not given".
#pragma once
#include <cstdint>
#include <vector>

namespace genfast {

constexpr int kMaxInputs = 8;

struct Operand {
  char* data = nullptr;
  int dtype = 0;
  int64_t batch_stride = 0;
  std::vector<int64_t> strides;  // of the inner dimensions; empty when they are contiguous
};

enum Limit : int { kNoLimit = 0, kClip = 1, kThreshold = 2 };

struct StepArgs {
  int inputs = 0;
  Operand x[kMaxInputs], uncond, log_variance, noise, out, second;
  int64_t batch = 1, inner = 1;
  std::vector<int64_t> sizes;  // inner dimensions, read only for strided operands
  bool float64 = false;        // type of the arithmetic

  const double* table = nullptr;  // [rows, 2 inputs + 8]
  int64_t rows = 1, row = -1;     // row: the one of every sample, or -1
  const int64_t* step = nullptr;  // row of each sample (step_count 1 or batch), or null
  int64_t step_count = 0;
  bool has_x0 = false, has_log_std = false;

  double guidance = 1.0, rescale = 0.0;
  const double* guidances = nullptr;
  int64_t guidance_count = 0;

  int limit = kNoLimit;
  double low = 0, high = 0;     // clip
  int64_t below = 0;            // threshold: rank below the quantile,
  double weight = 0, most = 1;  // weight of the one above, and the largest threshold

  bool philox = false;
  int64_t seed = 0;
  const int64_t* seeds = nullptr;  // one, or one per sample
  bool seed_per_sample = false;
  uint32_t stream = 0, offset = 0;
};

void sampler_step(const StepArgs& args);

}  // namespace genfast
