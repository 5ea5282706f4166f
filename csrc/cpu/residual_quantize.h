// Arguments of the CPU kernel of `residual_quantize`. Strides count elements.
#pragma once
#include "cpu/vector_quantize.h"

namespace genfast {

struct ResidualArgs {
  NearestArgs stage;  // of the first stage; `indices` and `errors` are [stages, batch, length, groups]
  int64_t stages = 0;
  int64_t stage_stride = 0;  // from a stage's codebook to the next one's
};

void residual_quantize(const ResidualArgs& a);

}  // namespace genfast
