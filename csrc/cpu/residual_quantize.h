// Arguments of the CPU kernel of `residual_quantize`. Strides count elements.
#pragma once
#include <vector>

#include "cpu/vector_quantize.h"

namespace genfast {

// As in NearestArgs.
struct StageCodes {
  const char* codes;
  int dtype;
  int64_t group_stride, code_stride, count;
};

struct ResidualArgs {
  NearestArgs stage;  // without codes; `indices` and `errors` are [stages, batch, length, groups]
  std::vector<StageCodes> stages;
};

void residual_quantize(const ResidualArgs& a);

}  // namespace genfast
