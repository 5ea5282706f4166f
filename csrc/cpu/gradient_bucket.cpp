// Packing, reducing and unpacking buckets of gradients, each in one pass over memory (formulas:
// genfast/reference/gradient_bucket.py).
//
// The values of all tensors, one after the other, are cut into groups of 16 blocks of 256 values; a thread takes a run
// of groups. A block that lies inside one float32 tensor is read and written there; others are gathered into the
// first-level cache first. Everything is done to a block while it is there: scale, residual, finiteness, codes; or
// codes, sum over the ranks, scale, squares, finiteness. Squares are added in float64, block by block and tensor by
// tensor, in an order that no thread and no stride changes.
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

// Whether any of n values is not finite on the wire.
bool any_odd(const float* v, int64_t n, uint32_t limit) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= (to_bits(v[i]) & 0x7FFFFFFFu) >= limit;
  return bad;
}

// Threads write the same value, if any.
void mark(uint8_t* flag) { __atomic_store_n(flag, (uint8_t)0, __ATOMIC_RELAXED); }

// The float32 values of a block, where they lie if they are neighbours in memory, else nullptr.
float* in_place(const GradientTensor& t, int64_t offset, const Segment& segment, int64_t at) {
  const bool plain = t.dtype == kFloat32 && t.sizes.empty();
  return plain && segment.begin <= at && at + kGradientBlock <= segment.end
             ? reinterpret_cast<float*>(t.data) + (at - offset)
             : nullptr;
}

// A block that lies in several tensors, or not as float32: body(segment, first value in the block, values).
template <class Body>
void pieces(const Segments& segments, int64_t s, int64_t at, const Body& body) {
  for (; s < (int64_t)segments.all.size() && segments.all[s].begin < at + kGradientBlock; s++) {
    const int64_t begin = std::max(segments.all[s].begin, at);
    const int64_t end = std::min(segments.all[s].end, at + kGradientBlock);
    body(s, begin - at, end - begin);
  }
}

}  // namespace

void pack_gradients(const std::vector<GradientTensor>& tensors, const WireShape& shape, const BucketScale& scale,
                    float* residual, uint8_t* out, uint8_t* finite) {
  std::fill(finite, finite + tensors.size(), (uint8_t)1);
  const Segments segments(tensors);
  const Place place{shape};
  const int64_t total = shape.ranks * shape.chunk, groups = (total + kGroup - 1) / kGroup;
  const float factor = scale.get();
  const uint32_t limit = limit_of(shape.wire);
  const WriteBlock write = residual ? writer<true>(shape.wire) : writer<false>(shape.wire);
  parallel_for(threads_for(total, kGrain), groups, [&](int64_t first, int64_t last) {
    alignas(64) float v[kGradientBlock], sum[kGradientBlock], left[kGradientBlock];
    for (int64_t group = first; group < last; group++) {
      int64_t s = group < segments.groups() ? segments.first[group] : (int64_t)segments.all.size();
      const int64_t end = std::min((group + 1) * kGroup, total);
      for (int64_t at = group * kGroup; at < end; at += kGradientBlock) {
        while (s < (int64_t)segments.all.size() && segments.all[s].end <= at) s++;
        const bool any = s < (int64_t)segments.all.size();
        const int64_t block = at / kGradientBlock, tensor = any ? segments.all[s].tensor : 0;
        const int64_t n = std::clamp<int64_t>(shape.numel - at, 0, kGradientBlock);
        const float* there = any ? in_place(tensors[tensor], segments.offsets[tensor], segments.all[s], at) : nullptr;
        if (!there) {
          std::fill(v + n, v + kGradientBlock, 0.0f);
          pieces(segments, s, at, [&](int64_t piece, int64_t from, int64_t count) {
            const int64_t t = segments.all[piece].tensor;
            gather(tensors[t], at + from - segments.offsets[t], count, v + from);
          });
        }
        float* kept = residual ? residual + at : nullptr;
        if (residual && n < kGradientBlock) {
          std::fill(std::copy(kept, kept + n, left), left + kGradientBlock, 0.0f);
          kept = left;
        }
        // Whether a tensor is sound is seen in its block, or, in one that it shares, before residuals are overwritten.
        if (!there && n) {
          for (int64_t i = 0; i < n; i++) v[i] *= factor;
          for (int64_t i = 0; i < n; i++) sum[i] = kept ? v[i] + kept[i] : v[i];
          pieces(segments, s, at, [&](int64_t piece, int64_t from, int64_t count) {
            if (any_odd(sum + from, count, limit)) mark(finite + segments.all[piece].tensor);
          });
        }
        float* scales = reinterpret_cast<float*>(out + place.scale(block));
        const uint32_t most = write(there ? there : v, there ? factor : 1.0f, kept, out + place.codes(block), scales);
        if (there && most >= limit) mark(finite + tensor);
        if (kept == left && n) std::copy(left, left + n, residual + at);
      }
    }
  });
  for (int64_t r = 0; r < shape.ranks; r++) place.finish(out + r * shape.chunk_bytes);
}

void reduce_chunks(const uint8_t* received, const WireShape& shape, const BucketScale& scale, float* residual,
                   uint8_t* out) {
  const float factor = scale.get();
  const Place place{shape};
  const ReadBlock read = reader<false>(shape.wire, shape.ranks);
  const WriteBlock write = residual ? writer<true>(shape.wire) : writer<false>(shape.wire);
  parallel_for(threads_for(shape.chunk * shape.ranks, kGrain), shape.chunk / kGradientBlock,
               [&](int64_t first, int64_t last) {
                 alignas(64) float sum[kGradientBlock];
                 for (int64_t block = first; block < last; block++) {
                   const int64_t codes = place.codes(block), scales = place.scale(block);
                   read(received + codes, reinterpret_cast<const float*>(received + scales), shape.ranks,
                        shape.chunk_bytes, factor, sum);
                   write(sum, 1.0f, residual ? residual + block * kGradientBlock : nullptr, out + codes,
                         reinterpret_cast<float*>(out + scales));
                 }
               });
  place.finish(out);
}

void unpack_gradients(const uint8_t* buckets, int64_t count, const WireShape& shape,
                      const std::vector<GradientTensor>& tensors, const BucketScale& scale, double* square_norm,
                      uint8_t* finite) {
  std::fill(finite, finite + tensors.size(), (uint8_t)1);
  const Segments segments(tensors);
  const Place place{shape};
  const float factor = scale.get();
  const ReadBlock read = reader<true>(shape.wire, count);
  const int64_t stride = shape.ranks * shape.chunk_bytes;
  std::vector<double> squares(segments.all.size());
  parallel_for(threads_for(shape.numel * count, kGrain), segments.groups(), [&](int64_t first, int64_t last) {
    alignas(64) float v[kGradientBlock];
    for (int64_t group = first; group < last; group++) {
      int64_t s = segments.first[group];
      const int64_t end = std::min((group + 1) * kGroup, shape.numel);
      for (int64_t at = group * kGroup; at < end; at += kGradientBlock) {
        while (segments.all[s].end <= at) s++;
        const int64_t block = at / kGradientBlock, tensor = segments.all[s].tensor;
        float* there = in_place(tensors[tensor], segments.offsets[tensor], segments.all[s], at);
        const float* scales = reinterpret_cast<const float*>(buckets + place.scale(block));
        const Found found = read(buckets + place.codes(block), scales, count, stride, factor, there ? there : v);
        if (there) {
          squares[s] += found.square;
          if (found.most >= 0x7F800000u) mark(finite + tensor);
          continue;
        }
        pieces(segments, s, at, [&](int64_t piece, int64_t from, int64_t n) {
          const Segment& segment = segments.all[piece];
          const int64_t place_in = at + from - segments.offsets[segment.tensor];
          scatter(tensors[segment.tensor], place_in, n, v + from);
          squares[piece] += sum_of_squares(v + from, n);
          if (found.most >= 0x7F800000u && any_odd(v + from, n, 0x7F800000u)) mark(finite + segment.tensor);
        });
      }
    }
  });
  std::fill(square_norm, square_norm + tensors.size(), 0.0);
  for (size_t s = 0; s < squares.size(); s++) square_norm[segments.all[s].tensor] += squares[s];
}

}  // namespace genfast
