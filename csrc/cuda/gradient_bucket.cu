// Packing, reducing and unpacking buckets of gradients, each in one pass over memory (formulas:
// genfast/reference/gradient_bucket.py).
//
// Here CUDA C++ has something that Triton has not: a list of up to 256 tensors fits into the arguments of a kernel, so
// that there is no table to send first, whichever tensors come. A bucket of more tensors takes several launches, cut
// between blocks of 256 values: a block never has more tensors than a list. A warp takes a tile of four blocks, lanes
// 8 neighbouring values of each, with the reads of all four in flight together. A block in the midst of an aligned
// tensor is read and written 16 bytes at a time.
//
// The squares of a tensor are added in float64, tile by tile, and then over its tiles by a block of threads of its own
// in a fixed order.
#include "cuda/gradient_bucket.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/gradient_wire.cuh"

namespace genfast {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kListed = 256;
constexpr int kTileBlocks = 4, kTile = kTileBlocks * kBlock;
constexpr int64_t kMostValues = int64_t{1} << 31;  // of a launch: positions in it have 32 bits

// The tensors of one launch, none of them empty: values [base, base + values) of the bucket. Passed to kernels by
// value, in at most 4 KB together with their other arguments.
struct TensorList {
  char* data[kListed];      // of the value at `base`, were it this tensor's
  uint32_t end[kListed];    // from `base` on
  uint16_t index[kListed];  // in the bucket, from `first` on
  uint8_t dtype[kListed];
  int count;
  uint32_t values;
  int64_t base, first, slot;
};

__device__ __forceinline__ float number(const Scale& scale) { return scale.address ? *scale.address : scale.value; }

__device__ __forceinline__ uint32_t begin_of(const TensorList& list, int i) { return i ? list.end[i - 1] : 0; }

// The first tensor that ends after a position.
__device__ __forceinline__ int find(const TensorList& list, uint32_t position) {
  int low = 0, high = list.count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list.end[middle] <= position)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__device__ __forceinline__ Operand operand_of(const TensorList& list, int i) {
  return {list.data[i], 0, list.dtype[i]};
}

__device__ __forceinline__ bool is_wide(const Operand& o, uint32_t position) {
  return (reinterpret_cast<uintptr_t>(o.data) + (uintptr_t)position * (o.dtype == kFloat32 ? 4 : 2)) % 16 == 0;
}

// Reads V neighbours of a gradient, or writes them.
template <bool WRITE, int D, int V>
__device__ __forceinline__ void move_as(float (&v)[V], const Operand& o, int64_t at, bool wide) {
  if constexpr (WRITE)
    store_as<D>(v, o.data, at, V, wide);
  else
    load_as<D>(v, o.data, at, V, wide);
}

template <bool WRITE, int V>
__device__ __forceinline__ void move(float (&v)[V], const Operand& o, int64_t at, bool wide) {
  if (o.dtype == kFloat32)
    move_as<WRITE, kFloat32>(v, o, at, wide);
  else if (o.dtype == kBFloat16)
    move_as<WRITE, kBFloat16>(v, o, at, wide);
  else
    move_as<WRITE, kFloat16>(v, o, at, wide);
}

// The lane's 8 values of the block at `start`, read or written; after the last tensor they stay as they are. `i` is the
// first tensor of the block.
template <bool WRITE>
__device__ __forceinline__ void move_block(float (&v)[kPerLane], const TensorList& list, int i, uint32_t start) {
  const uint32_t mine = start + threadIdx.x % 32 * kPerLane;
  if (i < list.count && list.end[i] >= start + kBlock) {
    const Operand o = operand_of(list, i);
    move<WRITE>(v, o, mine, is_wide(o, start));
    return;
  }
#pragma unroll
  for (int k = 0; k < kPerLane; k++) {
    while (i < list.count && list.end[i] <= mine + k) i++;
    float one[1] = {v[k]};
    if (i < list.count) move<WRITE>(one, operand_of(list, i), mine + k, false);
    v[k] = one[0];
  }
}

__device__ __forceinline__ bool is_aligned(const float* residual) {
  return reinterpret_cast<uintptr_t>(residual) % 16 == 0;
}

// residual = value - what the wire says, where that is a number. `left`: how many of the lane's values have one.
__device__ __forceinline__ void keep(float* residual, const float (&v)[kPerLane], const float (&read)[kPerLane],
                                     const float (&before)[kPerLane], int left) {
  float kept[kPerLane];
#pragma unroll
  for (int k = 0; k < kPerLane; k++) kept[k] = magnitude(read[k]) >= kOdd ? before[k] : add(v[k], -read[k]);
  store_as<kFloat32>(kept, reinterpret_cast<char*>(residual), 0, left, is_aligned(residual));
}

// The warp's tile, and its number of blocks; 0 past the end.
__device__ __forceinline__ int blocks_of(uint32_t tile, uint32_t values) {
  const int64_t left = (int64_t)values - (int64_t)tile * kTile;
  return left <= 0 ? 0 : left >= kTile ? kTileBlocks : (int)((left + kBlock - 1) / kBlock);
}

__device__ __forceinline__ int limited(int64_t n) { return n < 0 ? 0 : n < kPerLane ? (int)n : kPerLane; }

template <int CODE>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ TensorList list, const __grid_constant__ Wire wire, Scale scale,
                float* residual, char* out, uint8_t* finite) {
  const uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const int blocks = blocks_of(tile, list.values), first = find(list, tile * kTile), lane = threadIdx.x % 32;
  if (blocks == 0) return;
  float v[kTileBlocks][kPerLane] = {};
  int owner = first;
#pragma unroll
  for (int b = 0; b < kTileBlocks; b++) {
    const uint32_t start = tile * kTile + b * kBlock;
    while (owner < list.count && list.end[owner] <= start) owner++;
    if (b < blocks) move_block<false>(v[b], list, owner, start);
  }
  const float factor = number(scale);
  unsigned odd = 0;  // a bit for each of the lane's values
#pragma unroll
  for (int b = 0; b < kTileBlocks; b++) {
    if (b >= blocks) continue;
    const int64_t at = list.base + (int64_t)tile * kTile + b * kBlock + lane * kPerLane;
    const int left = limited(wire.numel - at);
    float before[kPerLane], read[kPerLane];
    if (residual) load_as<kFloat32>(before, reinterpret_cast<char*>(residual), at, left, is_aligned(residual));
#pragma unroll
    for (int k = 0; k < kPerLane; k++) {
      v[b][k] = k < left ? mul(v[b][k], factor) : 0.0f;
      if (residual) v[b][k] = add(v[b][k], before[k]);
    }
    const int64_t block = at / kBlock, per_chunk = wire.chunk / kBlock;
    write_block<CODE>(v[b], wire, out + block / per_chunk * wire.chunk_bytes, block % per_chunk, read);
    if (residual) keep(residual + at, v[b], read, before, left);
#pragma unroll
    for (int k = 0; k < kPerLane; k++) {
      const float x = CODE < kWireInt8 ? read[k] : v[b][k];  // a cast keeps NaN and infinity
      odd |= (unsigned)(magnitude(x) >= kOdd) << (b * kPerLane + k);
    }
  }
  for (int b = 0, i = first; b < blocks && odd; b++) {
    for (int k = 0; k < kPerLane; k++) {
      const uint32_t position = tile * kTile + b * kBlock + lane * kPerLane + k;
      while (i < list.count && list.end[i] <= position) i++;
      if (i < list.count && odd >> (b * kPerLane + k) & 1) finite[list.first + list.index[i]] = 0;
    }
  }
}

template <int CODE>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Wire wire, const char* received, Scale scale, float* residual, char* out) {
  const int64_t block = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
  if (block >= wire.chunk / kBlock) return;
  constexpr int kGroup = 4;  // ranks whose reads are in flight together
  float total[kPerLane], before[kPerLane], read[kPerLane];
#pragma unroll
  for (int k = 0; k < kPerLane; k++) total[k] = -0.0f;  // which leaves every number as it is, and 0.0 would not
#pragma unroll 1
  for (int64_t base = 0; base < wire.ranks; base += kGroup) {
    float v[kGroup][kPerLane];
#pragma unroll
    for (int g = 0; g < kGroup; g++)
      if (base + g < wire.ranks) read_block<CODE>(v[g], wire, received + (base + g) * wire.chunk_bytes, block);
#pragma unroll
    for (int g = 0; g < kGroup; g++)
      if (base + g < wire.ranks) {
#pragma unroll
        for (int k = 0; k < kPerLane; k++) total[k] = add(total[k], v[g][k]);
      }
  }
  const float factor = number(scale);
  const int64_t at = block * kBlock + threadIdx.x % 32 * kPerLane;
  if (residual) load_as<kFloat32>(before, reinterpret_cast<char*>(residual), at, kPerLane, is_aligned(residual));
#pragma unroll
  for (int k = 0; k < kPerLane; k++) {
    total[k] = mul(total[k], factor);
    if (residual) total[k] = add(total[k], before[k]);
  }
  write_block<CODE>(total, wire, out, block, read);
  if (residual) keep(residual + at, total, read, before, kPerLane);
}

template <int CODE>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ TensorList list, const __grid_constant__ Wire wire, const char* reduced,
                  Scale scale, double* squares) {
  const uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const int blocks = blocks_of(tile, list.values), first = find(list, tile * kTile), lane = threadIdx.x % 32;
  if (blocks == 0) return;
  float v[kTileBlocks][kPerLane];
  const int64_t per_chunk = wire.chunk / kBlock, from = list.base / kBlock + (int64_t)tile * kTileBlocks;
#pragma unroll
  for (int b = 0; b < kTileBlocks; b++) {
    const int64_t block = from + b;
    if (b < blocks) read_block<CODE>(v[b], wire, reduced + block / per_chunk * wire.chunk_bytes, block % per_chunk);
  }
  const float factor = number(scale);
  int owner = first;
#pragma unroll
  for (int b = 0; b < kTileBlocks; b++) {
    const uint32_t start = tile * kTile + b * kBlock;
    while (owner < list.count && list.end[owner] <= start) owner++;
#pragma unroll
    for (int k = 0; k < kPerLane; k++) v[b][k] = b < blocks ? mul(v[b][k], factor) : 0.0f;
    if (b < blocks) move_block<true>(v[b], list, owner, start);
  }
  // From one piece of a tensor to the next the tile or the tensor, or both, go up: no two have the same sum.
  const uint32_t end = tile * kTile + blocks * kBlock;
  for (int i = first; i < list.count && begin_of(list, i) < end; i++) {
    const uint32_t low = begin_of(list, i), high = list.end[i];
    double sum = 0;
#pragma unroll
    for (int b = 0; b < kTileBlocks; b++) {
#pragma unroll
      for (int k = 0; k < kPerLane; k++) {
        const uint32_t position = tile * kTile + b * kBlock + lane * kPerLane + k;
        const double x = position >= low && position < high ? (double)v[b][k] : 0.0;
        sum = add(sum, mul(x, x));
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum = add(sum, __shfl_down_sync(kWarp, sum, step));
    if (lane == 0) squares[list.slot + tile + i] = sum;
  }
}

// Where the sums of the squares of some tensors are.
struct Sums {
  int64_t begin[kListed];
  uint32_t count[kListed];
};

// Squares of finite numbers, float32 as they are, cannot overflow float64.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Sums sums, const double* squares, double* square_norm, uint8_t* finite) {
  const double* from = squares + sums.begin[blockIdx.x];
  const uint32_t count = sums.count[blockIdx.x];
  double total = 0;
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) total = add(total, from[i]);
  __shared__ double of[kThreads];
  of[threadIdx.x] = total;
  __syncthreads();
  for (unsigned step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) of[threadIdx.x] = add(of[threadIdx.x], of[threadIdx.x + step]);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    square_norm[blockIdx.x] = of[0];
    finite[blockIdx.x] = add(of[0], -of[0]) == 0.0;
  }
}

void verify(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("gradient_bucket: ") + what + ": " + cudaGetErrorString(error));
}

uint32_t start_of(const TensorList& list, int i) { return i ? list.end[i - 1] : 0; }

// Calls body(list) for launch after launch, until `total` values are covered.
template <class Body>
void in_lists(const std::vector<BucketTensor>& tensors, int64_t total, const Body& body) {
  size_t at = 0;      // the tensor, and
  int64_t begin = 0;  // where it begins
  int64_t slot = 0;
  for (int64_t base = 0; base < total;) {
    TensorList list{};
    list.base = base, list.slot = slot;
    int64_t stop = std::min(total, base + kMostValues);
    while (at < tensors.size() && begin + tensors[at].numel <= base) begin += tensors[at++].numel;
    list.first = (int64_t)at;
    int64_t offset = begin;
    for (size_t t = at; t < tensors.size() && offset < stop; t++) {
      if (tensors[t].numel == 0) continue;
      if (t - at > UINT16_MAX) throw std::runtime_error("gradient_bucket: more than 65000 empty tensors in a row");
      if (list.count == kListed) {
        stop = offset / kBlock * kBlock;
        break;
      }
      const int i = list.count++, size = tensors[t].dtype == kFloat32 ? 4 : 2;
      list.data[i] = tensors[t].data + (base - offset) * size;
      offset += tensors[t].numel;
      list.end[i] = (uint32_t)std::min(offset - base, kMostValues);
      list.index[i] = (uint16_t)(t - at);
      list.dtype[i] = (uint8_t)tensors[t].dtype;
    }
    list.values = (uint32_t)(stop - base);
    // What ends after the launch ends with it; what begins after it is the next one's.
    while (list.count && start_of(list, list.count - 1) >= list.values) list.count--;
    if (list.count) list.end[list.count - 1] = std::min(list.end[list.count - 1], list.values);
    body(static_cast<const TensorList&>(list));
    // The next launch's first sum follows this one's last, so that those of a tensor in both are neighbours.
    if (list.count) slot += (list.end[list.count - 1] - 1) / kTile + list.count;
    base = stop;
  }
}

unsigned grid_of(const TensorList& list) { return (list.values + kTile * kWarps - 1) / (kTile * kWarps); }

// Calls body with the wire's code as a constant.
template <class Body>
void of_code(int code, const Body& body) {
  switch (code) {
    case kWireFloat32:
      return body(std::integral_constant<int, kWireFloat32>());
    case kWireBFloat16:
      return body(std::integral_constant<int, kWireBFloat16>());
    case kWireFloat16:
      return body(std::integral_constant<int, kWireFloat16>());
    case kWireInt8:
      return body(std::integral_constant<int, kWireInt8>());
    case kWireE4M3:
      return body(std::integral_constant<int, kWireE4M3>());
    default:
      return body(std::integral_constant<int, kWireE5M2>());
  }
}

}  // namespace

int64_t bucket_workspace(const std::vector<BucketTensor>& tensors) {
  int64_t values = 0, sums = 0;
  for (const BucketTensor& t : tensors) values += t.numel;
  in_lists(tensors, values, [&](const TensorList& list) { sums += (list.values + kTile - 1) / kTile + list.count; });
  return sums;
}

void pack_gradients(const std::vector<BucketTensor>& tensors, const Wire& wire, const Scale& scale, float* residual,
                    char* out, uint8_t* finite, cudaStream_t stream) {
  if (tensors.empty()) return;
  verify(cudaMemsetAsync(finite, 1, tensors.size(), stream), "setting the flags failed");
  of_code(wire.code, [&](auto code) {
    constexpr int kCode = decltype(code)::value;
    in_lists(tensors, wire.ranks * wire.chunk, [&](const TensorList& list) {
      pack_kernel<kCode><<<grid_of(list), kThreads, 0, stream>>>(list, wire, scale, residual, out, finite);
      verify(cudaGetLastError(), "the launch of the packing kernel failed");
    });
  });
}

void reduce_chunks(const char* received, const Wire& wire, const Scale& scale, float* residual, char* out,
                   cudaStream_t stream) {
  const int64_t grid = (wire.chunk / kBlock + kWarps - 1) / kWarps;
  if (grid == 0) return;
  if (grid > INT32_MAX) throw std::runtime_error("gradient_bucket: the chunk is too large for one CUDA grid");
  of_code(wire.code, [&](auto code) {
    constexpr int kCode = decltype(code)::value;
    reduce_kernel<kCode><<<(unsigned)grid, kThreads, 0, stream>>>(wire, received, scale, residual, out);
    verify(cudaGetLastError(), "the launch of the reducing kernel failed");
  });
}

void unpack_gradients(const char* reduced, const Wire& wire, const std::vector<BucketTensor>& tensors,
                      const Scale& scale, double* workspace, double* square_norm, uint8_t* finite,
                      cudaStream_t stream) {
  std::vector<int64_t> begin(tensors.size(), 0), end(tensors.size(), 0);
  of_code(wire.code, [&](auto code) {
    constexpr int kCode = decltype(code)::value;
    in_lists(tensors, wire.numel, [&](const TensorList& list) {
      unpack_kernel<kCode><<<grid_of(list), kThreads, 0, stream>>>(list, wire, reduced, scale, workspace);
      verify(cudaGetLastError(), "the launch of the unpacking kernel failed");
      for (int i = 0; i < list.count; i++) {
        const size_t t = list.first + list.index[i];
        if (end[t] == 0) begin[t] = list.slot + start_of(list, i) / kTile + i;
        end[t] = list.slot + (list.end[i] - 1) / kTile + i + 1;
      }
    });
  });
  for (size_t first = 0; first < tensors.size(); first += kListed) {
    const unsigned count = (unsigned)std::min(tensors.size() - first, (size_t)kListed);
    Sums sums{};
    for (unsigned i = 0; i < count; i++) {
      sums.begin[i] = begin[first + i];
      sums.count[i] = (uint32_t)(end[first + i] - begin[first + i]);
    }
    finish_kernel<<<count, kThreads, 0, stream>>>(sums, workspace, square_norm + first, finite + first);
    verify(cudaGetLastError(), "the launch of the summing kernel failed");
  }
}

}  // namespace genfast
