// Packing, reducing and unpacking buckets of gradients, each in one pass over memory (formulas:
// genfast/reference/gradient_bucket.py).
//
// The values of all tensors, one after the other, are cut into groups of 16 blocks of 256 values; a thread takes a run
// of groups. A block is gathered into the first-level cache, wherever its values lie, and everything is done to it
// there: scale, residual, finiteness, codes; or codes, scale, squares, finiteness. Squares are added in float64, block
// by block and tensor by tensor, in an order that no thread changes.
#include "cpu/gradient_bucket.h"

#include <algorithm>

#include "cpu/gradient_wire.h"
#include "cpu/parallel.h"

namespace genfast {
namespace {

constexpr int64_t kGroupBlocks = 16, kGroup = kGroupBlocks * kGradientBlock;
constexpr int64_t kGrain = 1 << 15;  // values that are worth a thread

// A run of a tensor's values inside one group.
struct Segment {
  int64_t tensor, begin, end;  // of the flat bucket
};

struct Segments {
  std::vector<int64_t> first;  // of each group
  std::vector<Segment> all;
  std::vector<int64_t> offsets;  // of each tensor

  explicit Segments(const std::vector<GradientTensor>& tensors) {
    int64_t begin = 0;
    for (size_t t = 0; t < tensors.size(); t++) {
      offsets.push_back(begin);
      const int64_t end = begin + tensors[t].numel;
      while (begin < end) {
        while ((int64_t)first.size() <= begin / kGroup) first.push_back((int64_t)all.size());
        const int64_t stop = std::min(end, (begin / kGroup + 1) * kGroup);
        all.push_back({(int64_t)t, begin, stop});
        begin = stop;
      }
    }
    first.push_back((int64_t)all.size());
  }
  int64_t groups() const { return (int64_t)first.size() - 1; }
};

// Calls body(index of the value, address) for values [from, from + n) of a tensor with any strides.
template <class Body>
void walk(const GradientTensor& t, int64_t from, int64_t n, const Body& body) {
  const int dims = (int)t.sizes.size();
  std::vector<int64_t> at(dims);
  int64_t rest = from, place = 0;
  for (int d = dims - 1; d >= 0; d--) {
    at[d] = rest % t.sizes[d], rest /= t.sizes[d];
    place += at[d] * t.strides[d];
  }
  const int64_t size = size_of(t.dtype);
  for (int64_t i = 0; i < n; i++) {
    body(i, t.data + place * size);
    for (int d = dims - 1; d >= 0; d--) {
      place += t.strides[d];
      if (++at[d] < t.sizes[d]) break;
      place -= at[d] * t.strides[d], at[d] = 0;
    }
  }
}

void gather(const GradientTensor& t, int64_t from, int64_t n, float* to) {
  if (t.sizes.empty()) return load_run(t.data + from * size_of(t.dtype), t.dtype, n, to);
  walk(t, from, n, [&](int64_t i, const char* p) { load_run(p, t.dtype, 1, to + i); });
}

void scatter(const GradientTensor& t, int64_t from, int64_t n, const float* v) {
  if (t.sizes.empty()) return store_run(v, n, t.data + from * size_of(t.dtype), t.dtype);
  walk(t, from, n, [&](int64_t i, char* p) { store_run(v + i, 1, p, t.dtype); });
}

// Whether any of n values is not finite, also as a cast value of the wire.
bool any_odd(const float* v, int64_t n, int wire) {
  // What rounds to infinity: from 65520 on in float16, from 2^128 - 2^119 on in bfloat16.
  const uint32_t limit = wire == kFloat16 ? 0x477FF000u : wire == kBFloat16 ? 0x7F7F8000u : 0x7F800000u;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= (to_bits(v[i]) & 0x7FFFFFFFu) >= limit;
  return bad;
}

double sum_of_squares(const float* v, int64_t n) {
  constexpr int kSums = 16;  // side by side, for the vectors and their latency
  double sum[kSums] = {}, total = 0;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; k++) sum[k] += (double)v[i + k] * v[i + k];
  for (; i < n; i++) total += (double)v[i] * v[i];
  for (int k = 0; k < kSums; k++) total += sum[k];
  return total;
}

// Threads write the same value, if any.
void mark(uint8_t* flag) { __atomic_store_n(flag, (uint8_t)0, __ATOMIC_RELAXED); }

}  // namespace

void pack_gradients(const std::vector<GradientTensor>& tensors, const WireShape& shape, const BucketScale& scale,
                    float* residual, uint8_t* out, uint8_t* finite) {
  std::fill(finite, finite + tensors.size(), (uint8_t)1);
  const Segments segments(tensors);
  const int64_t total = shape.ranks * shape.chunk, groups = (total + kGroup - 1) / kGroup;
  const int64_t per_chunk = shape.chunk / kGradientBlock;
  const float factor = scale.get();
  parallel_for(threads_for(total, kGrain), groups, [&](int64_t first, int64_t last) {
    alignas(64) float v[kGroup];
    for (int64_t group = first; group < last; group++) {
      const int64_t begin = group * kGroup, end = std::min(begin + kGroup, total);
      const int64_t filled = std::max<int64_t>(std::min(end, shape.numel) - begin, 0);
      std::fill(v + filled, v + (end - begin), 0.0f);
      if (group < segments.groups()) {
        for (int64_t s = segments.first[group]; s < segments.first[group + 1]; s++) {
          const Segment& segment = segments.all[s];
          const int64_t n = segment.end - segment.begin;
          float* x = v + (segment.begin - begin);
          gather(tensors[segment.tensor], segment.begin - segments.offsets[segment.tensor], n, x);
          if (factor != 1)
            for (int64_t i = 0; i < n; i++) x[i] *= factor;
          if (residual)
            for (int64_t i = 0; i < n; i++) x[i] += residual[segment.begin + i];
          if (any_odd(x, n, shape.wire)) mark(finite + segment.tensor);
        }
      }
      for (int64_t at = begin; at < end; at += kGradientBlock) {
        const int64_t block = at / kGradientBlock;
        const Chunk chunk{shape, out + block / per_chunk * shape.chunk_bytes};
        chunk.write(block % per_chunk, v + (at - begin));
        if (residual && at < shape.numel)
          keep_residual(chunk, block % per_chunk, v + (at - begin), std::min(kGradientBlock, shape.numel - at),
                        residual + at);
      }
    }
  });
  for (int64_t r = 0; r < shape.ranks; r++) Chunk{shape, out + r * shape.chunk_bytes}.finish();
}

void reduce_chunks(const uint8_t* received, const WireShape& shape, const BucketScale& scale, float* residual,
                   uint8_t* out) {
  const float factor = scale.get();
  const Chunk to{shape, out};
  parallel_for(threads_for(shape.chunk * shape.ranks, kGrain), shape.chunk / kGradientBlock,
               [&](int64_t first, int64_t last) {
                 alignas(64) float sum[kGradientBlock], v[kGradientBlock];
                 for (int64_t block = first; block < last; block++) {
                   for (int64_t r = 0; r < shape.ranks; r++) {
                     const Chunk from{shape, const_cast<uint8_t*>(received) + r * shape.chunk_bytes};
                     from.read(block, r ? v : sum);
                     if (r)
                       for (int i = 0; i < kGradientBlock; i++) sum[i] += v[i];
                   }
                   float* kept = residual ? residual + block * kGradientBlock : nullptr;
                   for (int i = 0; i < kGradientBlock; i++) sum[i] *= factor;
                   if (kept)
                     for (int i = 0; i < kGradientBlock; i++) sum[i] += kept[i];
                   to.write(block, sum);
                   if (kept) keep_residual(to, block, sum, kGradientBlock, kept);
                 }
               });
  to.finish();
}

void unpack_gradients(const uint8_t* reduced, const WireShape& shape, const std::vector<GradientTensor>& tensors,
                      const BucketScale& scale, double* square_norm, uint8_t* finite) {
  std::fill(finite, finite + tensors.size(), (uint8_t)1);
  const Segments segments(tensors);
  const int64_t per_chunk = shape.chunk / kGradientBlock;
  const float factor = scale.get();
  std::vector<double> squares(segments.all.size());
  parallel_for(threads_for(shape.numel, kGrain), segments.groups(), [&](int64_t first, int64_t last) {
    alignas(64) float v[kGroup];
    for (int64_t group = first; group < last; group++) {
      const int64_t begin = group * kGroup, end = std::min(begin + kGroup, shape.numel);
      for (int64_t at = begin; at < end; at += kGradientBlock) {
        const int64_t block = at / kGradientBlock;
        const Chunk chunk{shape, const_cast<uint8_t*>(reduced) + block / per_chunk * shape.chunk_bytes};
        float* x = v + (at - begin);
        chunk.read(block % per_chunk, x);
        if (factor != 1)
          for (int i = 0; i < kGradientBlock; i++) x[i] *= factor;
      }
      for (int64_t s = segments.first[group]; s < segments.first[group + 1]; s++) {
        const Segment& segment = segments.all[s];
        const int64_t n = segment.end - segment.begin;
        const float* x = v + (segment.begin - begin);
        scatter(tensors[segment.tensor], segment.begin - segments.offsets[segment.tensor], n, x);
        if (any_odd(x, n, kFloat32)) mark(finite + segment.tensor);
        for (int64_t i = 0; i < n; i += kGradientBlock)
          squares[s] += sum_of_squares(x + i, std::min(kGradientBlock, n - i));
      }
    }
  });
  std::fill(square_norm, square_norm + tensors.size(), 0.0);
  for (size_t s = 0; s < squares.size(); s++) square_norm[segments.all[s].tensor] += squares[s];
}

}  // namespace genfast
