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
};

void nearest_code(const NearestArgs& a);

}  // namespace genfast
