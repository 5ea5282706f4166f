// Python bindings of `nearest_code`: addresses, sizes and strides come in as integers.
#include "cpu/vector_quantize.h"

#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/bindings.h"

namespace py = pybind11;

namespace genfast {

namespace {

using PyCodes = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, dtype code, strides of groups and codes

void set_codes(NearestArgs& a, const PyCodes& codes, int metric) {
  a.codes = reinterpret_cast<const char*>(std::get<0>(codes));
  std::tie(std::ignore, a.codes_dtype, a.codes_group_stride, a.code_stride) = codes;
  a.metric = static_cast<Metric>(metric);
}

}  // namespace

void register_vector_quantize(py::module_& module) {
  module.def(
      "nearest_code",
      [](const std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>& z, const PyCodes& codes,
         uintptr_t indices, uintptr_t distances,
         const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, int metric, bool exact,
         uintptr_t packed) {
        NearestArgs a;
        a.z = reinterpret_cast<const char*>(std::get<0>(z));
        std::tie(std::ignore, a.z_dtype, a.batch_stride, a.row_stride, a.z_group_stride, a.number_stride) = z;
        set_codes(a, codes, metric);
        std::tie(a.batch, a.length, a.groups, a.size, a.count, a.k) = sizes;
        a.exact = exact;
        a.indices = reinterpret_cast<int64_t*>(indices);
        a.distances = reinterpret_cast<float*>(distances);
        a.packed = reinterpret_cast<const float*>(packed);
        py::gil_scoped_release release;
        nearest_code(a);
      },
      py::arg("z"), py::arg("codes"), py::arg("indices"), py::arg("distances"), py::kw_only(), py::arg("sizes"),
      py::arg("metric"), py::arg("exact"), py::arg("packed"));
  module.def("packed_floats", &packed_floats, py::arg("count"), py::arg("size"));
  module.def(
      "pack_codes",
      [](const PyCodes& codes, int64_t count, int64_t size, int metric, uintptr_t packed) {
        NearestArgs a;
        set_codes(a, codes, metric);
        a.count = count, a.size = size;
        py::gil_scoped_release release;
        pack_codes(a, reinterpret_cast<float*>(packed));
      },
      py::arg("codes"), py::kw_only(), py::arg("count"), py::arg("size"), py::arg("metric"), py::arg("packed"));
}

}  // namespace genfast
