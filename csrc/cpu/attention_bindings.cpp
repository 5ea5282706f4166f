// Python bindings of the family `attention`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/attention.h"
#include "cpu/attention_heads.h"
#include "cpu/bindings.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyRanges = std::tuple<uintptr_t, int64_t>;  // address or 0, stride of the batch

AttentionArgs arguments(const PyHeads& q, const PyHeads& k, const PyHeads& v, const PyHeads& out, uintptr_t lse,
                        const PyRanges& ranges, const std::tuple<int64_t, int64_t, int64_t>& batch_heads,
                        const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, float scale) {
  AttentionArgs a;
  a.q = heads(q), a.k = heads(k), a.v = heads(v), a.out = heads(out);
  a.lse = reinterpret_cast<float*>(lse);
  a.ranges = reinterpret_cast<const int32_t*>(std::get<0>(ranges));
  a.ranges_stride = std::get<1>(ranges);
  std::tie(a.batch, a.heads, a.kv_heads) = batch_heads;
  std::tie(a.q_len, a.kv_len, a.dim, a.value_dim) = sizes;
  a.scale = scale;
  return a;
}

}  // namespace

void register_attention(py::module_& module) {
  module.def(
      "attention",
      [](const PyHeads& q, const PyHeads& k, const PyHeads& v, const PyHeads& out, uintptr_t lse,
         const PyRanges& ranges, const std::tuple<int64_t, int64_t, int64_t>& batch_heads,
         const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, float scale) {
        const AttentionArgs a = arguments(q, k, v, out, lse, ranges, batch_heads, sizes, scale);
        py::gil_scoped_release release;
        attention(a);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::kw_only(), py::arg("ranges"),
      py::arg("batch_heads"), py::arg("sizes"), py::arg("scale"));
  module.def(
      "attention_backward",
      [](const PyHeads& grad_out, uintptr_t grad_lse, const PyHeads& q, const PyHeads& k, const PyHeads& v,
         const PyHeads& out, uintptr_t lse, const PyHeads& grad_q, const PyHeads& grad_k, const PyHeads& grad_v,
         const PyRanges& ranges, const std::tuple<int64_t, int64_t, int64_t>& batch_heads,
         const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes, float scale) {
        AttentionArgs a = arguments(q, k, v, out, lse, ranges, batch_heads, sizes, scale);
        a.grad_out = heads(grad_out), a.grad_q = heads(grad_q), a.grad_k = heads(grad_k), a.grad_v = heads(grad_v);
        a.grad_lse = reinterpret_cast<const float*>(grad_lse);
        py::gil_scoped_release release;
        attention_backward(a);
      },
      py::arg("grad_out"), py::arg("grad_lse"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
      py::arg("lse"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::kw_only(), py::arg("ranges"),
      py::arg("batch_heads"), py::arg("sizes"), py::arg("scale"));
}

}  // namespace genfast
