// Python bindings of `residual_quantize`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/residual_quantize.h"

namespace py = pybind11;

namespace genfast {

void register_residual_quantize(py::module_& module) {
  module.def(
      "residual_quantize",
      [](const std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>& z,
         const std::vector<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>>& codebooks, uintptr_t indices,
         uintptr_t sum, uintptr_t errors, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, int metric,
         bool exact) {
        ResidualArgs a;
        NearestArgs& s = a.stage;
        s.z = reinterpret_cast<const char*>(std::get<0>(z));
        std::tie(std::ignore, s.z_dtype, s.batch_stride, s.row_stride, s.z_group_stride, s.number_stride) = z;
        for (const auto& [codes, dtype, group_stride, code_stride, count] : codebooks)
          a.stages.push_back({reinterpret_cast<const char*>(codes), dtype, group_stride, code_stride, count});
        std::tie(s.batch, s.length, s.groups, s.size) = sizes;
        s.metric = static_cast<Metric>(metric), s.exact = exact;
        s.indices = reinterpret_cast<int64_t*>(indices);
        s.sum = reinterpret_cast<float*>(sum);
        s.errors = reinterpret_cast<float*>(errors);
        py::gil_scoped_release release;
        residual_quantize(a);
      },
      py::arg("z"), py::arg("codebooks"), py::arg("indices"), py::arg("sum"), py::arg("errors"), py::kw_only(),
      py::arg("sizes"), py::arg("metric"), py::arg("exact"));
}

}  // namespace genfast
