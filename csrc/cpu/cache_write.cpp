// New keys and values into a cache, at places of each row's own; keys are rotated on the way if that is asked for. One
// pass over what is written, and nothing else is touched.
#include "cpu/attention_cached.h"
#include "cpu/attention_tiles.h"
#include "cpu/rotation.h"

namespace genfast {

void cache_write(const CacheWriteArgs& a) {
  const int64_t item = size_of(a.k.dtype), rows = a.batch * a.kv_heads * a.length;
  parallel_for(threads_for(rows * (a.dim + a.value_dim), 1 << 16), rows, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
      const int64_t b = row / (a.kv_heads * a.length), h = row / a.length % a.kv_heads, i = row % a.length;
      const int64_t at = a.first[b] + i;
      if (at < 0 || at >= a.end[b]) continue;
      const int64_t page = a.table ? a.table[b * a.table_stride + at / a.page_size] : b;
      const int64_t place = a.table ? at % a.page_size : at;
      char* key = row_of(a.keys, page, h, place);
      const char* k = row_of(a.k, b, h, i);
      if (a.rotation.cos)
        rotate(a.rotation, at, a.k.dtype, a.dim, k, key);
      else
        std::memcpy(key, k, a.dim * item);
      std::memcpy(row_of(a.values, page, h, place), row_of(a.v, b, h, i), a.value_dim * item);
    }
  });
}

}  // namespace genfast
