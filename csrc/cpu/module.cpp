// Python bindings of the CPU kernels: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <optional>
#include <tuple>

#include "cpu/bindings.h"
#include "cpu/direct.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/sampler_step.h"
#include "cpu/tensor_view.h"

namespace py = pybind11;

namespace genfast {
namespace {

// (address, dtype code, batch stride, inner strides or [] if contiguous)
using PyOperand = std::tuple<uintptr_t, int, int64_t, std::vector<int64_t>>;

Operand operand(const std::optional<PyOperand>& given) {
  Operand o;
  if (!given) return o;
  o.data = reinterpret_cast<char*>(std::get<0>(*given));
  o.dtype = std::get<1>(*given);
  o.batch_stride = std::get<2>(*given);
  o.strides = std::get<3>(*given);
  return o;
}

void step(const std::vector<PyOperand>& inputs, const std::optional<PyOperand>& uncond,
          const std::optional<PyOperand>& log_variance, const std::optional<PyOperand>& noise,
          const std::optional<PyOperand>& out, const std::optional<PyOperand>& second, int64_t batch, int64_t inner,
          std::vector<int64_t> sizes, bool float64, uintptr_t table, int64_t rows, int64_t row, uintptr_t steps,
          int64_t step_count, bool has_x0, bool has_log_std, double guidance, uintptr_t guidances,
          int64_t guidance_count, double rescale, std::optional<std::tuple<double, double>> clip,
          std::optional<std::tuple<int64_t, double, double>> threshold, std::optional<int64_t> seed, uintptr_t seeds,
          bool seed_per_sample, int64_t stream, int64_t offset) {
  if (inputs.size() > (size_t)kMaxInputs) throw py::value_error("at most 8 inputs");
  StepArgs a;
  a.inputs = (int)inputs.size();
  for (int i = 0; i < a.inputs; i++) a.x[i] = operand(inputs[i]);
  a.uncond = operand(uncond);
  a.log_variance = operand(log_variance);
  a.noise = operand(noise);
  a.out = operand(out);
  a.second = operand(second);
  a.batch = batch;
  a.inner = inner;
  a.sizes = std::move(sizes);
  a.float64 = float64;
  a.table = reinterpret_cast<const double*>(table);
  a.rows = rows;
  a.row = row;
  a.step = reinterpret_cast<const int64_t*>(steps);
  a.step_count = step_count;
  a.has_x0 = has_x0;
  a.has_log_std = has_log_std;
  a.guidance = guidance;
  a.guidances = reinterpret_cast<const double*>(guidances);
  a.guidance_count = guidance_count;
  a.rescale = rescale;
  if (clip) {
    a.limit = kClip;
    std::tie(a.low, a.high) = *clip;
  }
  if (threshold) {
    a.limit = kThreshold;
    std::tie(a.below, a.weight, a.most) = *threshold;
  }
  a.philox = seed.has_value() || seeds != 0;
  a.seed = seed.value_or(0);
  a.seeds = reinterpret_cast<const int64_t*>(seeds);
  a.seed_per_sample = seed_per_sample;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  py::gil_scoped_release release;
  sampler_step(a);
}

void words(uint64_t seed, uint64_t block, uint32_t sample, uint32_t stream, uintptr_t out) {
  vu w[4];
  for (int j = 0; j < 16; j += kLanes) {
    philox_words(PhiloxKey{seed, sample, stream}, block + j, w);
    for (int k = 0; k < 4; k++) store(reinterpret_cast<uint32_t*>(out) + 16 * k + j, w[k]);
  }
}

// Whether the CPU multiplies tiles of bfloat16, and Linux lets this process keep tiles.
bool tile_unit() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return bf16 && tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> found{"base"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) found.push_back("avx2");
  if (avx512) found.push_back("avx512");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (bf16) found.push_back("avx512bf16");
  if (bf16 && tile_unit()) found.push_back("amx");
#endif
  return found;
}

}  // namespace
}  // namespace genfast

PYBIND11_MODULE(GENFAST_MODULE, module) {
  using namespace genfast;
  module.doc() = "CPU kernels of genfast for one instruction set.";
  module.attr("lanes") = kLanes;
  module.def("supported_isas", &supported_isas, "Instruction sets of this machine that genfast has modules for.");
  module.def(
      "openmp", [] { return OpenMP::get().found() ? OpenMP::get().max_threads() : 0; },
      "Threads of the OpenMP runtime that torch loaded, or 0 if none was found.");
  module.def("sampler_step", &step, py::arg("inputs"), py::kw_only(), py::arg("uncond"), py::arg("log_variance"),
             py::arg("noise"), py::arg("out"), py::arg("second"), py::arg("batch"), py::arg("inner"), py::arg("sizes"),
             py::arg("float64"), py::arg("table"), py::arg("rows"), py::arg("row"), py::arg("steps"),
             py::arg("step_count"), py::arg("has_x0"), py::arg("has_log_std"), py::arg("guidance"),
             py::arg("guidances"), py::arg("guidance_count"), py::arg("rescale"), py::arg("clip"), py::arg("threshold"),
             py::arg("seed"), py::arg("seeds"), py::arg("seed_per_sample"), py::arg("stream"), py::arg("offset"));
  module.def("philox_words", &words, py::arg("seed"), py::arg("block"), py::arg("sample"), py::arg("stream"),
             py::arg("out"), "The words of blocks [block, block + 16) as uint32 [4, 16] at address `out`.");
  register_tensor_view(module);
  register_direct(module);
  register_transfer_direct(module);
  register_token_sampling(module);
  register_token_masking(module);
  register_attention(module);
  register_attention_cached(module);
  register_gradient_bucket(module);
  register_token_head(module);
  register_code_update(module);
  register_scalar_quantize(module);
  register_vector_quantize(module);
  register_residual_quantize(module);
}
