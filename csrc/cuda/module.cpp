// Python bindings of the CUDA kernels: addresses, sizes, strides and the stream come in as integers. Importing the
// module touches no device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/sampler_step.h"

#ifndef GENFAST_MODULE
#error "GENFAST_MODULE must name the extension module"
#endif

namespace py = pybind11;

namespace genfast {
namespace {

// (address, dtype code, batch stride)
using PyOperand = std::tuple<uintptr_t, int, int64_t>;

Operand operand(const std::optional<PyOperand>& given) {
  if (!given) return {nullptr, 0, 0};
  return {reinterpret_cast<char*>(std::get<0>(*given)), (int64_t)std::get<2>(*given), std::get<1>(*given)};
}

// Why no kernel can run on this machine, or None.
std::optional<std::string> missing_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (error == cudaSuccess && count > 0) return std::nullopt;
  return std::string("there is no usable NVIDIA GPU: ") +
         (error == cudaSuccess ? "the driver reports none" : cudaGetErrorString(error));
}

// The device of the tensors for the length of a call; the caller's device afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess)
      throw std::runtime_error("sampler_step cannot run on CUDA: " + missing_device().value_or("no device is current"));
    if (before_ != device) {
      check(cudaSetDevice(device), "selecting the tensors' device failed");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

void step(const std::vector<PyOperand>& inputs, const std::optional<PyOperand>& uncond,
          const std::optional<PyOperand>& log_variance, const std::optional<PyOperand>& noise, const PyOperand& out,
          const std::optional<PyOperand>& second, int64_t batch, int64_t inner, bool float64, uintptr_t table,
          int64_t rows, int64_t row, int64_t row_stride, uintptr_t steps, bool has_x0, double guidance,
          uintptr_t guidances, int64_t guidance_stride, double rescale,
          const std::optional<std::tuple<double, double>>& clip,
          const std::optional<std::tuple<int64_t, double, double>>& threshold, std::optional<int64_t> seed,
          uintptr_t seeds, int64_t seed_stride, int64_t stream, int64_t offset, uintptr_t workspace, int device,
          uintptr_t cuda_stream) {
  if (inputs.size() > (size_t)kMaxInputs) throw py::value_error("at most 8 inputs");
  StepArgs a{};
  a.inputs = (int)inputs.size();
  for (int i = 0; i < a.inputs; i++) a.x[i] = operand(inputs[i]);
  a.uncond = operand(uncond);
  a.log_variance = operand(log_variance);
  a.noise = operand(noise);
  a.out = operand(out);
  a.second = operand(second);
  a.noise_source = noise ? kNoiseTensor : seed || seeds ? kPhilox : kNoNoise;
  a.batch = batch;
  a.inner = inner;
  a.table = reinterpret_cast<const double*>(table);
  a.rows = rows;
  a.step = reinterpret_cast<const int64_t*>(steps);
  a.row = row;
  a.row_stride = row_stride;
  a.guidance = guidance;
  a.guidances = reinterpret_cast<const double*>(guidances);
  a.guidance_stride = guidance_stride;
  a.rescale = rescale;
  a.x0 = !has_x0 ? kNoX0 : clip ? kClip : threshold ? kThreshold : kPlain;
  if (clip) std::tie(a.low, a.high) = *clip;
  if (threshold) std::tie(a.below, a.weight, a.most) = *threshold;
  a.seeds = reinterpret_cast<const int64_t*>(seeds);
  a.seed = seed.value_or(0);
  a.seed_stride = seed_stride;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  py::gil_scoped_release release;
  DeviceGuard guard(device);
  sampler_step(a, float64, reinterpret_cast<char*>(workspace), reinterpret_cast<cudaStream_t>(cuda_stream));
}

}  // namespace
}  // namespace genfast

PYBIND11_MODULE(GENFAST_MODULE, m) {
  using namespace pybind11::literals;
  m.doc() = "CUDA kernels of genfast, called by genfast.native.";
  m.def("sampler_step", &genfast::step, py::kw_only(), "inputs"_a, "uncond"_a, "log_variance"_a, "noise"_a, "out"_a,
        "second"_a, "batch"_a, "inner"_a, "float64"_a, "table"_a, "rows"_a, "row"_a, "row_stride"_a, "steps"_a,
        "has_x0"_a, "guidance"_a, "guidances"_a, "guidance_stride"_a, "rescale"_a, "clip"_a, "threshold"_a, "seed"_a,
        "seeds"_a, "seed_stride"_a, "stream"_a, "offset"_a, "workspace"_a, "device"_a, "cuda_stream"_a);
  m.def("workspace_bytes", &genfast::workspace_bytes, "batch"_a, "inner"_a, "float64"_a, "rescale"_a, "threshold"_a);
  m.def("missing_device", &genfast::missing_device, "Why no kernel can run on this machine, or None.");
}
