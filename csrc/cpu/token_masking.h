// Arguments of the CPU kernel `forward_mask`. Strides count elements; a null address means "not given".
#pragma once
#include <cstdint>

namespace genfast {

struct MaskArgs {
  const int64_t* x0 = nullptr;  // rows of `length` neighbours, as the next one
  const uint8_t* maskable = nullptr;
  int64_t x0_stride = 0, maskable_stride = 0;
  int64_t batch = 0, length = 0;

  const float* times = nullptr;  // [batch, blocks]
  bool drawn = true;             // times are uniform numbers, or to be drawn
  float low = 0, spread = 1, slope = 1, floor = 0;
  bool by_time = false;  // the weight is 1 / t, not 1 / p
  int64_t block_size = 1, blocks = 1;
  int64_t strata = 0;

  bool exact = false;  // so many positions, in place of a time
  const int64_t* counts = nullptr;
  int64_t count = 0;

  const float* noise = nullptr;     // [batch, length], in place of Philox
  const int64_t* tokens = nullptr;  // the same
  int64_t mask_id = 0;
  uint32_t vocab_size = 0;  // 0: mask

  int64_t seed = 0;
  const int64_t* seeds = nullptr;
  bool seed_per_sequence = false;
  uint32_t stream = 0, offset = 0;

  int64_t* x = nullptr;
  uint8_t* mask = nullptr;
  float *weight = nullptr, *times_out = nullptr;
};

void forward_mask(const MaskArgs& args);

}  // namespace genfast
