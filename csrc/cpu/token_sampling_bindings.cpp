// Python binding of `sample_tokens`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cpu/bindings.h"
#include "cpu/token_sampling.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyLogits = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, dtype code, strides of sequence and position
using PyIds = std::tuple<uintptr_t, int64_t>;                   // address, count

Logits logits(const std::optional<PyLogits>& given) {
  Logits l;
  if (given) {
    l.data = reinterpret_cast<const char*>(std::get<0>(*given));
    std::tie(std::ignore, l.dtype, l.sequence_stride, l.position_stride) = *given;
  }
  return l;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void sample(const PyLogits& cond, const std::optional<PyLogits>& uncond, float guidance, int64_t length, int64_t size,
            uintptr_t rows, int64_t count, bool shift, uintptr_t scales, float scale, uintptr_t temperatures,
            double temperature, int64_t top_k, uint64_t share, bool keep_crossing, const PyIds& suppress,
            const PyIds& suppress_confidence, uintptr_t noise, bool noise_is_float64, std::optional<int64_t> seed,
            uintptr_t seeds, bool seed_per_sequence, int64_t stream, int64_t offset, uintptr_t ids, int confidence,
            uintptr_t tokens, uintptr_t confidences, uintptr_t logsumexp, uintptr_t entropy, uintptr_t margin) {
  TokenArgs a;
  a.logits = logits(cond);
  a.uncond = logits(uncond);
  a.guidance = guidance;
  a.length = length;
  a.size = size;
  a.rows = at<const int64_t>(rows);
  a.count = count;
  a.shift = shift;
  a.scales = at<const float>(scales);
  a.scale = scale;
  a.temperatures = at<const double>(temperatures);
  a.temperature = temperature;
  a.top_k = top_k;
  a.share = share;
  a.keep_crossing = keep_crossing;
  a.suppress = at<const int64_t>(std::get<0>(suppress));
  a.suppress_count = std::get<1>(suppress);
  a.suppress_confidence = at<const int64_t>(std::get<0>(suppress_confidence));
  a.suppress_confidence_count = std::get<1>(suppress_confidence);
  a.noise = at<const char>(noise);
  a.noise_is_float64 = noise_is_float64;
  a.philox = seed.has_value() || seeds != 0;
  a.seed = seed.value_or(0);
  a.seeds = at<const int64_t>(seeds);
  a.seed_per_sequence = seed_per_sequence;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  a.ids = at<const int64_t>(ids);
  a.confidence = confidence;
  a.tokens = at<int64_t>(tokens);
  a.confidences = at<float>(confidences);
  a.logsumexp = at<float>(logsumexp);
  a.entropy = at<float>(entropy);
  a.margin = at<float>(margin);
  py::gil_scoped_release release;
  sample_tokens(a);
}

}  // namespace

void register_token_sampling(py::module_& module) {
  module.def("sample_tokens", &sample, py::arg("logits"), py::kw_only(), py::arg("uncond"), py::arg("guidance"),
             py::arg("length"), py::arg("size"), py::arg("rows"), py::arg("count"), py::arg("shift"), py::arg("scales"),
             py::arg("scale"), py::arg("temperatures"), py::arg("temperature"), py::arg("top_k"), py::arg("share"),
             py::arg("keep_crossing"), py::arg("suppress"), py::arg("suppress_confidence"), py::arg("noise"),
             py::arg("noise_is_float64"), py::arg("seed"), py::arg("seeds"), py::arg("seed_per_sequence"),
             py::arg("stream"), py::arg("offset"), py::arg("ids"), py::arg("confidence"), py::arg("tokens"),
             py::arg("confidences"), py::arg("logsumexp"), py::arg("entropy"), py::arg("margin"));
}

}  // namespace genfast
