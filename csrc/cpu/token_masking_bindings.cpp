// Python binding of `forward_mask`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/bindings.h"
#include "cpu/token_masking.h"

namespace py = pybind11;

namespace genfast {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void forward(uintptr_t x0, uintptr_t maskable, int64_t x0_stride, int64_t maskable_stride, int64_t batch,
             int64_t length, uintptr_t times, bool drawn, float low, float spread, float slope, float floor,
             bool by_time, int64_t block_size, int64_t blocks, int64_t strata, std::optional<int64_t> count,
             uintptr_t counts, uintptr_t noise, uintptr_t tokens, int64_t mask_id, uint32_t vocab_size, int64_t seed,
             uintptr_t seeds, bool seed_per_sequence, int64_t stream, int64_t offset, uintptr_t x, uintptr_t mask,
             uintptr_t weight, uintptr_t times_out) {
  MaskArgs a;
  a.x0 = at<const int64_t>(x0);
  a.maskable = at<const uint8_t>(maskable);
  a.x0_stride = x0_stride;
  a.maskable_stride = maskable_stride;
  a.batch = batch;
  a.length = length;
  a.times = at<const float>(times);
  a.drawn = drawn;
  a.low = low;
  a.spread = spread;
  a.slope = slope;
  a.floor = floor;
  a.by_time = by_time;
  a.block_size = block_size;
  a.blocks = blocks;
  a.strata = strata;
  a.exact = count.has_value() || counts != 0;
  a.counts = at<const int64_t>(counts);
  a.count = count.value_or(0);
  a.noise = at<const float>(noise);
  a.tokens = at<const int64_t>(tokens);
  a.mask_id = mask_id;
  a.vocab_size = vocab_size;
  a.seed = seed;
  a.seeds = at<const int64_t>(seeds);
  a.seed_per_sequence = seed_per_sequence;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  a.x = at<int64_t>(x);
  a.mask = at<uint8_t>(mask);
  a.weight = at<float>(weight);
  a.times_out = at<float>(times_out);
  py::gil_scoped_release release;
  forward_mask(a);
}

}  // namespace

void register_token_masking(py::module_& module) {
  module.def("forward_mask", &forward, py::kw_only(), py::arg("x0"), py::arg("maskable"), py::arg("x0_stride"),
             py::arg("maskable_stride"), py::arg("batch"), py::arg("length"), py::arg("times"), py::arg("drawn"),
             py::arg("low"), py::arg("spread"), py::arg("slope"), py::arg("floor"), py::arg("by_time"),
             py::arg("block_size"), py::arg("blocks"), py::arg("strata"), py::arg("count"), py::arg("counts"),
             py::arg("noise"), py::arg("tokens"), py::arg("mask_id"), py::arg("vocab_size"), py::arg("seed"),
             py::arg("seeds"), py::arg("seed_per_sequence"), py::arg("stream"), py::arg("offset"), py::arg("x"),
             py::arg("mask"), py::arg("weight"), py::arg("times_out"));
}

}  // namespace genfast
