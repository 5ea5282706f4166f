// Arguments of the CPU kernel of `nearest_code`. Strides count elements.
#pragma once
#include <cstdint>

namespace genfast {

enum Metric : int { kL2 = 0, kCosine = 1, kDot = 2 };

struct NearestArgs {
  const char* z = nullptr;  // [batch, length, groups, size]
  int z_dtype = 0;
  int64_t batch_stride = 0, row_stride = 0, z_group_stride = 0, number_stride = 0;
  const char* codes = nullptr;  // [groups, count, size], the numbers of a code adjacent
  int codes_dtype = 0;
  int64_t codes_group_stride = 0, code_stride = 0;
  int64_t batch = 0, length = 0, groups = 0, size = 0, count = 0, k = 1;
  Metric metric = kL2;
  bool exact = true;
  int64_t* indices = nullptr;  // [batch, length, groups, k]
  float* distances = nullptr;  // alike, or null
  // What `pack_codes` made of the same codes (of one group) for the same metric, or null: packed for this call.
  const float* packed = nullptr;

  // What residual quantisation (k = 1) makes of row and code, as float32 [batch, length, groups, size] each: the
  // residual z - e, which may take the place of z, or null; and the sum of the codes so far.
  float *residual = nullptr, *sum = nullptr;
  bool first = false;       // the sum begins with this code
  float* errors = nullptr;  // |z - e|^2, [batch, length, groups], or null
};

void nearest_code(const NearestArgs& a);

// Floats of a packed codebook, and the codebook of `a` (one group) packed.
int64_t packed_floats(int64_t count, int64_t size);
void pack_codes(const NearestArgs& a, float* packed);

}  // namespace genfast
