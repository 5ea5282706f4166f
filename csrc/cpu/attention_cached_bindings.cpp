// Python bindings of `attention_cached`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/attention_cached.h"
#include "cpu/attention_heads.h"
#include "cpu/bindings.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyRotation = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, bool>;

Rotation rotation(const PyRotation& rope) {
  Rotation r;
  r.cos = reinterpret_cast<const float*>(std::get<0>(rope));
  r.sin = reinterpret_cast<const float*>(std::get<1>(rope));
  r.first = reinterpret_cast<const int64_t*>(std::get<2>(rope));
  r.positions = std::get<3>(rope), r.interleaved = std::get<4>(rope);
  return r;
}

}  // namespace

void register_attention_cached(py::module_& module) {
  module.def(
      "attention_cached",
      [](const PyHeads& q, const PyHeads& block_k, const PyHeads& block_v, const PyHeads& keys, const PyHeads& values,
         const PyHeads& out, uintptr_t lse, uintptr_t lengths, const std::tuple<uintptr_t, int64_t, int64_t>& table,
         const PyRotation& rope, const std::tuple<int64_t, int64_t, int64_t>& batch_heads,
         const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, float scale) {
        CachedArgs a;
        a.q = heads(q), a.block_k = heads(block_k), a.block_v = heads(block_v);
        a.keys = heads(keys), a.values = heads(values), a.out = heads(out);
        a.lse = reinterpret_cast<float*>(lse);
        a.lengths = reinterpret_cast<const int64_t*>(lengths);
        a.table = reinterpret_cast<const int32_t*>(std::get<0>(table));
        a.table_stride = std::get<1>(table), a.page_size = std::get<2>(table);
        a.rotation = rotation(rope);
        std::tie(a.batch, a.heads, a.kv_heads) = batch_heads;
        std::tie(a.q_len, a.block, a.capacity, a.dim, a.value_dim) = sizes;
        a.scale = scale;
        py::gil_scoped_release release;
        attention_cached(a);
      },
      py::arg("q"), py::arg("block_k"), py::arg("block_v"), py::arg("keys"), py::arg("values"), py::arg("out"),
      py::arg("lse"), py::kw_only(), py::arg("lengths"), py::arg("table"), py::arg("rope"), py::arg("batch_heads"),
      py::arg("sizes"), py::arg("scale"));
  module.def(
      "cache_write",
      [](const PyHeads& k, const PyHeads& v, const PyHeads& keys, const PyHeads& values, uintptr_t first, uintptr_t end,
         const std::tuple<uintptr_t, int64_t, int64_t>& table, const PyRotation& rope,
         const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes) {
        CacheWriteArgs a;
        a.k = heads(k), a.v = heads(v), a.keys = heads(keys), a.values = heads(values);
        a.first = reinterpret_cast<const int64_t*>(first), a.end = reinterpret_cast<const int64_t*>(end);
        a.table = reinterpret_cast<const int32_t*>(std::get<0>(table));
        a.table_stride = std::get<1>(table), a.page_size = std::get<2>(table);
        a.rotation = rotation(rope);
        std::tie(a.batch, a.kv_heads, a.length, a.dim, a.value_dim) = sizes;
        py::gil_scoped_release release;
        cache_write(a);
      },
      py::arg("k"), py::arg("v"), py::arg("keys"), py::arg("values"), py::kw_only(), py::arg("first"), py::arg("end"),
      py::arg("table"), py::arg("rope"), py::arg("sizes"));
}

}  // namespace genfast
