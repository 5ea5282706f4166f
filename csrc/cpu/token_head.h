// Arguments of the CPU kernels of `lm_head_partials` and `merge_head_partials`. Strides count elements; a null address
// means "not given".
#pragma once
#include <cstdint>

namespace genfast {

struct HeadArgs {
  const char *hidden = nullptr, *weight = nullptr, *bias = nullptr;
  int dtype = 0, bias_dtype = 0;                     // dtype: of hidden and weight
  int64_t sequence_stride = 0, position_stride = 0;  // of hidden; the elements of a row are neighbours
  int64_t weight_stride = 0;                         // from row to row
  int64_t length = 1, depth = 0, size = 0;           // positions of a sequence, elements of a row, rows of weight
  int64_t first = 0;                                 // place of the first of them in the whole vocabulary
  int64_t tiles = 0;                                 // tiles they are in
  const int64_t* rows = nullptr;                     // which rows of hidden, or all
  int64_t count = 0;                                 // how many
  float softcap = 0.0f;                              // 0: none
  const int64_t *suppress = nullptr, *suppress_confidence = nullptr;  // sorted
  int64_t suppress_count = 0, suppress_confidence_count = 0;

  const float *scale = nullptr, *judged_scale = nullptr;  // [count]
  int64_t seed = 0;
  const int64_t* seeds = nullptr;  // one, or one per sequence
  bool seed_per_sequence = false;
  uint32_t stream = 0, offset = 0;
  const int64_t* ids = nullptr;  // sample 2^32 + position of each row asked for

  char* workspace = nullptr;  // head_workspace() bytes for each thread
  int threads = 1;

  float* largest = nullptr;  // [count, tiles], as all that follow but the last
  int32_t* index = nullptr;
  float *exponentials = nullptr, *judged_largest = nullptr, *judged_sum = nullptr, *judged_logit = nullptr;
  int64_t* mass = nullptr;
  int32_t* candidate = nullptr;
  int64_t* uniform = nullptr;  // [count]
};

// Bytes that a thread works in, when there are `count` rows.
int64_t head_workspace(int64_t count);

// Threads worth starting, at most those that the runtime has.
int head_threads(int64_t count, int64_t size, int64_t depth);

void head_partials(const HeadArgs& args);

struct MergeArgs {
  int64_t count = 0, tiles = 0;
  const float* largest = nullptr;  // [count, tiles], as all that follow up to `candidate`
  const int32_t* index = nullptr;
  const float *exponentials = nullptr, *judged_largest = nullptr, *judged_sum = nullptr, *judged_logit = nullptr;
  const int64_t* mass = nullptr;
  const int32_t* candidate = nullptr;
  const int64_t* uniform = nullptr;  // [count], as all that follow
  const float *scale = nullptr, *judged_scale = nullptr;
  int64_t* tokens = nullptr;
  float *confidences = nullptr, *logsumexp = nullptr;
};

void merge_partials(const MergeArgs& args);

}  // namespace genfast
