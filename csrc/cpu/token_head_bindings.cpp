// Python bindings of `lm_head_partials` and `merge_head_partials`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cpu/bindings.h"
#include "cpu/token_head.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyMatrix = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, dtype code, strides of the rows
using PyIds = std::tuple<uintptr_t, int64_t>;                   // address, count

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void partials(const PyMatrix& hidden, const PyMatrix& weight, const std::tuple<uintptr_t, int>& bias, int64_t length,
              int64_t depth, int64_t size, int64_t first, int64_t tiles, uintptr_t rows, int64_t count, float softcap,
              const PyIds& suppress, const PyIds& suppress_confidence, uintptr_t scale, uintptr_t judged_scale,
              std::optional<int64_t> seed, uintptr_t seeds, bool seed_per_sequence, int64_t stream, int64_t offset,
              uintptr_t ids, uintptr_t workspace, int threads, uintptr_t largest, uintptr_t index,
              uintptr_t exponentials, uintptr_t judged_largest, uintptr_t judged_sum, uintptr_t judged_logit,
              uintptr_t mass, uintptr_t candidate, uintptr_t uniform) {
  HeadArgs a;
  a.hidden = at<const char>(std::get<0>(hidden));
  std::tie(std::ignore, a.dtype, a.sequence_stride, a.position_stride) = hidden;
  a.weight = at<const char>(std::get<0>(weight));
  a.weight_stride = std::get<2>(weight);
  a.bias = at<const char>(std::get<0>(bias));
  a.bias_dtype = std::get<1>(bias);
  a.length = length;
  a.depth = depth;
  a.size = size;
  a.first = first;
  a.tiles = tiles;
  a.rows = at<const int64_t>(rows);
  a.count = count;
  a.softcap = softcap;
  a.suppress = at<const int64_t>(std::get<0>(suppress));
  a.suppress_count = std::get<1>(suppress);
  a.suppress_confidence = at<const int64_t>(std::get<0>(suppress_confidence));
  a.suppress_confidence_count = std::get<1>(suppress_confidence);
  a.scale = at<const float>(scale);
  a.judged_scale = at<const float>(judged_scale);
  a.seed = seed.value_or(0);
  a.seeds = at<const int64_t>(seeds);
  a.seed_per_sequence = seed_per_sequence;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  a.ids = at<const int64_t>(ids);
  a.workspace = at<char>(workspace);
  a.threads = threads;
  a.largest = at<float>(largest);
  a.index = at<int32_t>(index);
  a.exponentials = at<float>(exponentials);
  a.judged_largest = at<float>(judged_largest);
  a.judged_sum = at<float>(judged_sum);
  a.judged_logit = at<float>(judged_logit);
  a.mass = at<int64_t>(mass);
  a.candidate = at<int32_t>(candidate);
  a.uniform = at<int64_t>(uniform);
  py::gil_scoped_release release;
  head_partials(a);
}

void merge(uintptr_t largest, uintptr_t index, int64_t count, int64_t tiles, uintptr_t exponentials,
           uintptr_t judged_largest, uintptr_t judged_sum, uintptr_t judged_logit, uintptr_t mass, uintptr_t candidate,
           uintptr_t uniform, uintptr_t scale, uintptr_t judged_scale, uintptr_t tokens, uintptr_t confidences,
           uintptr_t logsumexp) {
  MergeArgs a;
  a.count = count;
  a.tiles = tiles;
  a.largest = at<const float>(largest);
  a.index = at<const int32_t>(index);
  a.exponentials = at<const float>(exponentials);
  a.judged_largest = at<const float>(judged_largest);
  a.judged_sum = at<const float>(judged_sum);
  a.judged_logit = at<const float>(judged_logit);
  a.mass = at<const int64_t>(mass);
  a.candidate = at<const int32_t>(candidate);
  a.uniform = at<const int64_t>(uniform);
  a.scale = at<const float>(scale);
  a.judged_scale = at<const float>(judged_scale);
  a.tokens = at<int64_t>(tokens);
  a.confidences = at<float>(confidences);
  a.logsumexp = at<float>(logsumexp);
  py::gil_scoped_release release;
  merge_partials(a);
}

}  // namespace

void register_token_head(py::module_& module) {
  module.def("head_workspace", &head_workspace, py::arg("count"), "Bytes that a thread works in.");
  module.def("head_threads", &head_threads, py::arg("count"), py::arg("size"), py::arg("depth"));
  module.def("head_partials", &partials, py::arg("hidden"), py::arg("weight"), py::kw_only(), py::arg("bias"),
             py::arg("length"), py::arg("depth"), py::arg("size"), py::arg("first"), py::arg("tiles"), py::arg("rows"),
             py::arg("count"), py::arg("softcap"), py::arg("suppress"), py::arg("suppress_confidence"),
             py::arg("scale"), py::arg("judged_scale"), py::arg("seed"), py::arg("seeds"), py::arg("seed_per_sequence"),
             py::arg("stream"), py::arg("offset"), py::arg("ids"), py::arg("workspace"), py::arg("threads"),
             py::arg("largest"), py::arg("index"), py::arg("exponentials"), py::arg("judged_largest"),
             py::arg("judged_sum"), py::arg("judged_logit"), py::arg("mass"), py::arg("candidate"), py::arg("uniform"));
  module.def("merge_partials", &merge, py::arg("largest"), py::arg("index"), py::kw_only(), py::arg("count"),
             py::arg("tiles"), py::arg("exponentials"), py::arg("judged_largest"), py::arg("judged_sum"),
             py::arg("judged_logit"), py::arg("mass"), py::arg("candidate"), py::arg("uniform"), py::arg("scale"),
             py::arg("judged_scale"), py::arg("tokens"), py::arg("confidences"), py::arg("logsumexp"));
}

}  // namespace genfast
