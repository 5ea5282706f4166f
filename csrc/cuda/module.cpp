// Python bindings of the CUDA kernels: addresses, sizes, strides and the stream come in as integers. Importing the
// module touches no device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/gradient_bucket.h"
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
  DeviceGuard(const std::string& op, int device) {
    if (cudaGetDevice(&before_) != cudaSuccess)
      throw std::runtime_error(op + " cannot run on CUDA: " + missing_device().value_or("no device is current"));
    if (before_ != device) {
      const cudaError_t error = cudaSetDevice(device);
      if (error != cudaSuccess)
        throw std::runtime_error(op + ": selecting the tensors' device failed: " + cudaGetErrorString(error));
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
  DeviceGuard guard("sampler_step", device);
  sampler_step(a, float64, reinterpret_cast<char*>(workspace), reinterpret_cast<cudaStream_t>(cuda_stream));
}

// --- gradient_bucket ---

// BucketLayout.native
using PyWire = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;
// (address, or 0; value)
using PyScale = std::tuple<uintptr_t, float>;
// (address, dtype code, numel)
using PyTensors = std::vector<std::tuple<uintptr_t, int, int64_t>>;

Wire wire_of(const PyWire& w) {
  return {std::get<0>(w), std::get<1>(w), std::get<2>(w), std::get<3>(w), std::get<4>(w), std::get<5>(w)};
}

Scale scale_of(const PyScale& s) { return {reinterpret_cast<const float*>(std::get<0>(s)), std::get<1>(s)}; }

std::vector<BucketTensor> tensors_of(const PyTensors& given) {
  std::vector<BucketTensor> tensors;
  for (const auto& [address, dtype, numel] : given) tensors.push_back({reinterpret_cast<char*>(address), dtype, numel});
  return tensors;
}

int64_t workspace_numbers(const PyTensors& tensors) { return bucket_workspace(tensors_of(tensors)); }

void pack(const PyTensors& given, const PyWire& wire, const PyScale& scale, uintptr_t residual, uintptr_t out,
          uintptr_t finite, int device, uintptr_t cuda_stream) {
  const std::vector<BucketTensor> tensors = tensors_of(given);
  py::gil_scoped_release release;
  DeviceGuard guard("pack_gradients", device);
  pack_gradients(tensors, wire_of(wire), scale_of(scale), reinterpret_cast<float*>(residual),
                 reinterpret_cast<char*>(out), reinterpret_cast<uint8_t*>(finite),
                 reinterpret_cast<cudaStream_t>(cuda_stream));
}

void reduce(uintptr_t received, const PyWire& wire, const PyScale& scale, uintptr_t residual, uintptr_t out, int device,
            uintptr_t cuda_stream) {
  py::gil_scoped_release release;
  DeviceGuard guard("reduce_chunks", device);
  reduce_chunks(reinterpret_cast<const char*>(received), wire_of(wire), scale_of(scale),
                reinterpret_cast<float*>(residual), reinterpret_cast<char*>(out),
                reinterpret_cast<cudaStream_t>(cuda_stream));
}

void unpack(uintptr_t reduced, const PyWire& wire, const PyTensors& given, const PyScale& scale, uintptr_t workspace,
            uintptr_t square_norm, uintptr_t finite, int device, uintptr_t cuda_stream) {
  const std::vector<BucketTensor> tensors = tensors_of(given);
  py::gil_scoped_release release;
  DeviceGuard guard("unpack_gradients", device);
  unpack_gradients(reinterpret_cast<const char*>(reduced), wire_of(wire), tensors, scale_of(scale),
                   reinterpret_cast<double*>(workspace), reinterpret_cast<double*>(square_norm),
                   reinterpret_cast<uint8_t*>(finite), reinterpret_cast<cudaStream_t>(cuda_stream));
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
  m.def("pack_gradients", &genfast::pack, "tensors"_a, "wire"_a, py::kw_only(), "scale"_a, "residual"_a, "out"_a,
        "finite"_a, "device"_a, "cuda_stream"_a);
  m.def("reduce_chunks", &genfast::reduce, "received"_a, "wire"_a, py::kw_only(), "scale"_a, "residual"_a, "out"_a,
        "device"_a, "cuda_stream"_a);
  m.def("unpack_gradients", &genfast::unpack, "reduced"_a, "wire"_a, "tensors"_a, py::kw_only(), "scale"_a,
        "workspace"_a, "square_norm"_a, "finite"_a, "device"_a, "cuda_stream"_a);
  m.def("bucket_workspace", &genfast::workspace_numbers, "tensors"_a, "Float64 numbers that unpack_gradients needs.");
  m.def("missing_device", &genfast::missing_device, "Why no kernel can run on this machine, or None.");
}
