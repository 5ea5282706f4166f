// Arguments of the CPU kernels of `attention_cached` and `cache_write`. Strides count elements.
#pragma once
#include "cpu/attention.h"

namespace genfast {

// Row i of sequence b is at position first[b] + i of the tables.
struct Rotation {
  const float *cos = nullptr, *sin = nullptr;  // [positions, D / 2], or null
  const int64_t* first = nullptr;              // [B]
  int64_t positions = 0;
  bool interleaved = false;
};

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
  Rotation rotation;  // of q and block_k

  // Of `attention`: what each row sees of the keys, as in AttentionArgs.
  const int32_t* ranges = nullptr;
  int64_t ranges_stride = 0;
};

void attention_cached(const CachedArgs& args);

// `attention` where a key head has so few rows of queries that packing all keys first does not pay.
bool few_rows(const AttentionArgs& args);
void attention_of_few_rows(const AttentionArgs& args);

struct CacheWriteArgs {
  Heads k, v;                                      // [B, Hkv, n, .], read
  Heads keys, values;                              // as in CachedArgs, written
  const int64_t *first = nullptr, *end = nullptr;  // [B]: row i goes to position first[b] + i if that is in [0, end[b])
  const int32_t* table = nullptr;
  int64_t table_stride = 0, page_size = 0;
  int64_t batch = 0, kv_heads = 0, length = 0, dim = 0, value_dim = 0;
  Rotation rotation;  // of k
};

void cache_write(const CacheWriteArgs& args);

}  // namespace genfast
