// Arguments of the CPU kernels of `attention`. Strides count elements.
#pragma once
#include <cstdint>

namespace genfast {

// [B, H, L, D], the numbers of a row being neighbours.
struct Heads {
  char* data = nullptr;
  int dtype = 0;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct AttentionArgs {
  Heads q, k, v, out;
  float* lse = nullptr;             // [B, H, Lq]
  const int32_t* ranges = nullptr;  // [B or 1, Lq, 4]: begin, end, begin, end of the keys that a row sees; null: all
  int64_t ranges_stride = 0;        // from one sequence to the next, 0 if they share them
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, kv_len = 0, dim = 0, value_dim = 0;
  float scale = 1;

  // Of the backward pass; `out` and `lse` are then read.
  Heads grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;  // [B, H, Lq], or null
};

void attention(const AttentionArgs& args);
void attention_backward(const AttentionArgs& args);

}  // namespace genfast
