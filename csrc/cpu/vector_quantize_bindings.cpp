// Python bindings of `nearest_code`: addresses, sizes and strides come in as integers.
#include "cpu/vector_quantize.h"

#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/bindings.h"

namespace py = pybind11;

namespace genfast {

void register_vector_quantize(py::module_& module) {
  module.def(
      "nearest_code",
      [](const std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>& z,
         const std::tuple<uintptr_t, int, int64_t, int64_t>& codes, uintptr_t indices, uintptr_t distances,
         const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, int metric, bool exact) {
        NearestArgs a;
        a.z = reinterpret_cast<const char*>(std::get<0>(z));
        std::tie(std::ignore, a.z_dtype, a.batch_stride, a.row_stride, a.z_group_stride, a.number_stride) = z;
        a.codes = reinterpret_cast<const char*>(std::get<0>(codes));
        std::tie(std::ignore, a.codes_dtype, a.codes_group_stride, a.code_stride) = codes;
        std::tie(a.batch, a.length, a.groups, a.size, a.count, a.k) = sizes;
        a.metric = static_cast<Metric>(metric), a.exact = exact;
        a.indices = reinterpret_cast<int64_t*>(indices);
        a.distances = reinterpret_cast<float*>(distances);
        py::gil_scoped_release release;
        nearest_code(a);
      },
      py::arg("z"), py::arg("codes"), py::arg("indices"), py::arg("distances"), py::kw_only(), py::arg("sizes"),
      py::arg("metric"), py::arg("exact"));
}

}  // namespace genfast
