// Arguments of the CPU kernels of `code_update`. Strides count elements.
#pragma once
#include <cstdint>

namespace genfast {

// [B, S, G, D], with neighbours along S or along D.
struct Vectors {
  char* data = nullptr;
  int dtype = 0;
  int64_t batch_stride = 0, position_stride = 0, group_stride = 0, entry_stride = 1;
};

struct CodeSizes {
  int64_t batch = 0, length = 0, groups = 0, size = 0, codes = 0;  // B, S, G, D, K
  int64_t count() const { return batch * length; }
};

struct QuantizeArgs {
  CodeSizes n;
  Vectors z, z_q;
  const char* codebook = nullptr;  // [G, K, D]
  int codebook_dtype = 0;
  const int64_t* indices = nullptr;  // [B, S, G]
  bool zeros = false;
  float* losses = nullptr;
  int64_t* valid = nullptr;
  int64_t* counts = nullptr;  // [G, K], or null
  float* perplexity = nullptr;
};

enum Gradient : int { kStraightThrough = 0, kRotation = 1, kNoGradient = 2 };

struct QuantizeBackwardArgs {
  CodeSizes n;
  Vectors grad_z_q, z, z_q, grad_z;  // without data: not given, not wanted
  const float* grad_losses = nullptr;
  const int64_t* indices = nullptr;
  const int64_t* valid = nullptr;
  int gradient = kStraightThrough;
  bool zeros = false;
  char* grad_codebook = nullptr;  // [G, K, D], or null
  int codebook_dtype = 0;
};

// What draws the vectors for dead codes.
struct SlotDraw {
  uint64_t seed = 0;
  uint32_t stream = 0, offset = 0;
  int64_t world = 1, rank = 0;
};

struct AverageArgs {
  CodeSizes n;
  Vectors z;  // with neighbours along D
  const int64_t* indices = nullptr;
  bool cosine = false;
  SlotDraw draw;
  float* sums = nullptr;   // [G, K, D + 1]: made by code_sums, read by ema_apply
  float* slots = nullptr;  // alike, or null

  float *codebook = nullptr, *cluster_size = nullptr, *embed_avg = nullptr;
  float weight = 0, rest = 1, eps = 0, threshold = 0, reset = 0;  // weight: 1 - decay, rest: 1 - weight
};

void quantize(const QuantizeArgs& args);
void quantize_backward(const QuantizeBackwardArgs& args);
void ema_update(const AverageArgs& args);
void code_sums(const AverageArgs& args);
void ema_apply(const AverageArgs& args);
// distance [N]: the smaller of itself and the squared distance of z [N, D] to centre [D].
void min_distance_update(const float* z, const float* centre, float* distance, int64_t count, int64_t size);

}  // namespace genfast
