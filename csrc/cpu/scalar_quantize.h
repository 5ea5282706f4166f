// Arguments of the CPU kernels of `scalar_quantize`. Strides count elements.
#pragma once
#include <cstdint>

namespace genfast {

constexpr int kMostBits = 62;  // numbers of a row: every one takes at least a bit of the index

// [B, S, G, D], or an absent one of null.
struct Vectors {
  char* data = nullptr;
  int dtype = 0;
  int64_t stride[4] = {0, 0, 0, 0};
};

struct RowsOf {
  int64_t batch = 0, rows = 0, groups = 0, size = 0;  // B, S, G, D
};

// How a number becomes one of `count` levels; see genfast/reference/scalar_quantize.py.
struct Levels {
  int64_t count = 0;
  const float* steps = nullptr;  // the least number of levels 1 ... count - 1
  float shift = 0, slope = 0;    // the gradient is slope f'(z + shift)
};

struct FsqArgs {
  RowsOf shape;
  Levels levels[kMostBits];
  bool symmetric = false, clamp = false;
  Vectors z, noise, codes;     // `codes` is written by the forward pass
  int64_t* indices = nullptr;  // [B, S, G]
  Vectors grad, grad_z;        // of the backward pass
};

void fsq_quantize(const FsqArgs& args);
void fsq_backward(const FsqArgs& args);

struct BinaryArgs {
  RowsOf shape;
  bool normalise = false;
  float radius = 0;               // of normalised rows
  float magnitude = 0;            // of a code's numbers
  float chain = 0;                // 4 magnitude / temperature: what makes a number a logit
  int64_t block = 0;              // bits whose codes are enumerated together; 0: none are
  float least = 0;                // no logarithm is of less
  const uint8_t* mask = nullptr;  // [B, S], or null
  int64_t mask_stride[2] = {0, 0};
  Vectors z, codes;
  int64_t* indices = nullptr;
  // Null where no losses are wanted; `grad_*` of the same shapes are read by the backward pass.
  float *entropies = nullptr, *mean = nullptr, *commitment = nullptr;  // scalar, [G, D / block, 2^block], scalar

  Vectors grad, grad_z;
  const float *grad_entropies = nullptr, *grad_mean = nullptr, *grad_commitment = nullptr;
};

void binary_quantize(const BinaryArgs& args);
void binary_backward(const BinaryArgs& args);

}  // namespace genfast
