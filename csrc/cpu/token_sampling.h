// Arguments of the CPU kernel `sample_tokens`. Strides count elements; a null address means "not given".
#pragma once
#include <cstdint>

namespace genfast {

enum Confidence : int { kNone = 0, kProbability = 1, kTempered = 2, kMargin = 3, kNegativeEntropy = 4, kRandom = 5 };

struct Logits {
  const char* data = nullptr;
  int dtype = 0;
  int64_t sequence_stride = 0, position_stride = 0;  // the entries of a row are neighbours
};

struct TokenArgs {
  Logits logits, uncond;
  float guidance = 1.0f;
  int64_t length = 1, size = 0;   // positions of a sequence, entries of a row
  const int64_t* rows = nullptr;  // which rows, or all
  int64_t count = 0;              // how many
  bool shift = false;

  const float* scales = nullptr;  // log2(e) / temperature of each row asked for, 0: take the largest
  float scale = 0.0f;             // the same for all
  const double* temperatures = nullptr;
  double temperature = 0.0;
  int64_t top_k = 0;   // 0: all
  uint64_t share = 0;  // top_p 2^64, 0: all
  bool keep_crossing = true;
  const int64_t *suppress = nullptr, *suppress_confidence = nullptr;  // sorted
  int64_t suppress_count = 0, suppress_confidence_count = 0;

  const char* noise = nullptr;  // uniform in [0, 1), [sequences, length, size]
  bool noise_is_float64 = false;
  bool philox = false;
  int64_t seed = 0;
  const int64_t* seeds = nullptr;  // one, or one per sequence
  bool seed_per_sequence = false;
  uint32_t stream = 0, offset = 0;
  const int64_t* ids = nullptr;  // sample 2^32 + position of each row asked for

  int confidence = kNone;
  int64_t* tokens = nullptr;
  float *confidences = nullptr, *logsumexp = nullptr, *entropy = nullptr, *margin = nullptr;
};

void sample_tokens(const TokenArgs& args);

enum Strategy : int { kTop, kThreshold, kFactor, kEntropyBound, kHierarchy, kSequential, kRandomOrder };

// A number for all rows, or one for each.
struct PerRow {
  const int64_t* values = nullptr;
  int64_t value = 0;
  int64_t operator[](int64_t row) const { return values ? values[row] : value; }
};

struct SelectArgs {
  const float* confidence = nullptr;  // rows of `length` neighbours, as the next two
  const uint8_t* mask = nullptr;
  uint8_t* out = nullptr;
  int64_t confidence_stride = 0, mask_stride = 0;
  int64_t batch = 0, length = 0;
  PerRow n, start, end;
  int strategy = kTop;
  float threshold = 0, low_threshold = 0;
  float slack = -1;  // below 0: none
  bool strict = false;
  double factor = 0;
  bool accept_last = false;
  double bound = 0;
  bool inclusive = false;
  double temperature = 0;
  int64_t seed = 0;
  const int64_t* seeds = nullptr;
  bool seed_per_sequence = false;
  uint32_t stream = 0, offset = 0;
};

void select_transfer(const SelectArgs& args);

struct CommitArgs {
  int64_t* x = nullptr;
  const int64_t* tokens = nullptr;
  const uint8_t* selected = nullptr;
  int64_t x_stride = 0, tokens_stride = 0, selected_stride = 0;
  int64_t batch = 0, length = 0;
  int64_t mask_id = 0, eos_id = -1;
  bool has_eos = false;
  int64_t* left = nullptr;
  uint8_t* finished = nullptr;
};

void commit(const CommitArgs& args);

enum Law : int { kJump, kUniform, kPosterior };

// A float64 for all sequences, or one for each.
struct PerSequence {
  const double* values = nullptr;
  double value = 0;
  double operator[](int64_t sequence) const { return values ? values[sequence] : value; }
};

// int64 or bool [batch, length] of any strides.
template <class T>
struct States {
  T* data = nullptr;
  int64_t sequence_stride = 0, position_stride = 0;
  T& at(int64_t sequence, int64_t position) const {
    return data[sequence * sequence_stride + position * position_stride];
  }
};

struct TransitionArgs {
  States<const int64_t> x;
  States<int64_t> out;           // may be x
  States<const uint8_t> active;  // null: all
  Logits output;
  int64_t batch = 0, length = 0, size = 0;
  int law = kJump;
  PerSequence a, b;
  bool masked_only = false;
  int64_t mask_id = 0;
  float scale = 0.0f;  // log2(e) / temperature, 0: take the largest
  uint64_t share = 0;  // top_p 2^64, 0: all
  bool keep_crossing = true;

  const char* noise = nullptr;  // uniform in [0, 1), [batch, length, noise_width]
  bool noise_is_float64 = false;
  int64_t noise_width = 0;
  int64_t seed = 0;
  const int64_t* seeds = nullptr;  // one, or one per sequence
  bool seed_per_sequence = false;
  uint32_t stream = 0, offset = 0;
  const int64_t* ids = nullptr;  // sample 2^32 + position of each row

  uint8_t* changed = nullptr;  // [batch], 0
};

void discrete_transition(const TransitionArgs& args);

}  // namespace genfast
