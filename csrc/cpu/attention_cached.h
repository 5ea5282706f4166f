// Arguments of the CPU kernel of `attention_cached`. Strides count elements.
#pragma once
#include "cpu/attention.h"

namespace genfast {

struct CachedArgs {
  Heads q, out;                      // [B, H, n, D], [B, H, n, Dv]
  Heads block_k, block_v;            // [B, Hkv, block, .]: keys after the cached ones
  Heads keys, values;                // [B, Hkv, capacity, .], or [pages, Hkv, page_size, .]
  float* lse = nullptr;              // [B, H, n]
  const int64_t* lengths = nullptr;  // [B]
  const int32_t* table =
      nullptr;  // [B, pages of a row]: the page of positions [i page_size, (i + 1) page_size); or null
  int64_t table_stride = 0, page_size = 0;
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, block = 0, capacity = 0, dim = 0, value_dim = 0;
  float scale = 1;

  // Rotation of q and block_k: row i of sequence b is at position first[b] + i of the tables.
  const float *cos = nullptr, *sin = nullptr;  // [positions, D / 2], or null
  const int64_t* first = nullptr;              // [B]
  int64_t positions = 0;
  bool interleaved = false;
};

void attention_cached(const CachedArgs& args);

// `attention` without a mask where a key head has so few rows of queries that packing all keys first does not pay.
bool few_rows(const AttentionArgs& args);
void attention_of_few_rows(const AttentionArgs& args);

}  // namespace genfast
