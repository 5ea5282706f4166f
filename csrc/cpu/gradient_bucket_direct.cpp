// The ops of `gradient_bucket` on lists of tensors: with hundreds of tensors, to read each in Python costs as much as
// the pass over memory. As in direct.cpp, whatever is not the plain case returns NotImplemented with nothing done.
#include <pybind11/stl.h>

#include <cmath>

#include "cpu/bindings.h"
#include "cpu/direct.h"
#include "cpu/gradient_bucket.h"
#include "cpu/tensor_view.h"

namespace py = pybind11;

namespace genfast {
namespace {

// Of Python: (data, dtype, numel, sizes or [], strides or []) of each tensor, the layout, (address or 0, value).
using PyTensors = std::vector<std::tuple<uintptr_t, int, int64_t, std::vector<int64_t>, std::vector<int64_t>>>;
using PyLayout = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;
using PyScale = std::tuple<uintptr_t, float>;

std::vector<GradientTensor> tensors_of(const PyTensors& given) {
  std::vector<GradientTensor> found;
  for (const auto& [data, dtype, numel, sizes, strides] : given)
    found.push_back({reinterpret_cast<char*>(data), dtype, numel, sizes, strides});
  return found;
}

WireShape shape_of(const PyLayout& given) {
  WireShape s;
  std::tie(s.ranks, s.chunk, s.chunk_bytes, s.code_bytes, s.numel, s.wire) = given;
  return s;
}

BucketScale scale_of(const PyScale& given) {
  return {reinterpret_cast<const float*>(std::get<0>(given)), std::get<1>(given)};
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Floating tensors of a list, all contiguous on the CPU, with the sizes of the layout.
bool read_list(PyObject* list, PyObject* numels, std::vector<GradientTensor>& to) {
  if (!PyList_CheckExact(list) || !PyTuple_CheckExact(numels)) return false;
  const Py_ssize_t n = PyList_GET_SIZE(list);
  if (n != PyTuple_GET_SIZE(numels)) return false;
  to.resize(n);
  for (Py_ssize_t k = 0; k < n; k++) {
    View v;
    if (!view(PyList_GET_ITEM(list, k), v) || v.dtype > 2 || !v.contiguous) return false;
    int64_t numel = v.batch() * v.inner(), expected;
    if (!take_index(PyTuple_GET_ITEM(numels, k), 0, INT64_MAX, expected) || numel != expected) return false;
    to[k].data = v.data, to[k].dtype = v.dtype, to[k].numel = numel;
  }
  return true;
}

enum Argument { kTensors, kNumels, kLayout, kFactor, kResidual, kWire, kSquares, kFinite, kArguments };

// (list of tensors, numels, (ranks, chunk, ...), factor, residual address or 0, wire address, squares or 0, finite); to
// unpack, the number of buckets in place of the residual.
bool read_arguments(PyObject* const* v, std::vector<GradientTensor>& tensors, WireShape& shape, BucketScale& scale,
                    int64_t (&addresses)[4]) {
  double factor;
  if (!read_list(v[kTensors], v[kNumels], tensors) || !take_number(v[kFactor], factor)) return false;
  scale.value = (float)factor;
  if (!std::isfinite(scale.value)) return false;
  int64_t fields[6];
  if (!PyTuple_CheckExact(v[kLayout]) || PyTuple_GET_SIZE(v[kLayout]) != 6) return false;
  for (int k = 0; k < 6; k++)
    if (!take_index(PyTuple_GET_ITEM(v[kLayout], k), 0, INT64_MAX, fields[k])) return false;
  shape = shape_of({fields[0], fields[1], fields[2], fields[3], fields[4], (int)fields[5]});
  for (int k = 0; k < 4; k++)
    if (!take_index(v[kResidual + k], 0, INT64_MAX, addresses[k])) return false;
  return true;
}

template <bool PACK>
PyObject* bucket_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  std::vector<GradientTensor> tensors;
  WireShape shape;
  BucketScale scale;
  int64_t where[4];
  if (count == kArguments && types.tensor && !backend_is_ordered() && read_arguments(v, tensors, shape, scale, where)) {
    Py_BEGIN_ALLOW_THREADS;
    if (PACK)
      pack_gradients(tensors, shape, scale, at<float>(where[0]), at<uint8_t>(where[1]), at<uint8_t>(where[3]));
    else
      unpack_gradients(at<uint8_t>(where[1]), where[0], shape, tensors, scale, at<double>(where[2]),
                       at<uint8_t>(where[3]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

PyMethodDef pack_method = {"pack_gradients_direct", (PyCFunction)(void (*)(void))bucket_direct<true>, METH_FASTCALL,
                           "pack_gradients_direct(tensors, numels, layout, factor, residual, wire, 0, finite), all by "
                           "position; NotImplemented for anything but the plain case."};
PyMethodDef unpack_method = {"unpack_gradients_direct", (PyCFunction)(void (*)(void))bucket_direct<false>,
                             METH_FASTCALL,
                             "unpack_gradients_direct(tensors, numels, layout, factor, count of buckets, buckets, "
                             "squares, finite), all by position; NotImplemented for anything but the plain case."};

}  // namespace

void register_gradient_bucket(py::module_& module) {
  module.def(
      "pack_gradients",
      [](const PyTensors& tensors, const PyLayout& layout, const PyScale& scale, uintptr_t residual, uintptr_t out,
         uintptr_t finite) {
        const auto given = tensors_of(tensors);
        py::gil_scoped_release release;
        pack_gradients(given, shape_of(layout), scale_of(scale), at<float>(residual), at<uint8_t>(out),
                       at<uint8_t>(finite));
      },
      py::arg("tensors"), py::arg("layout"), py::kw_only(), py::arg("scale"), py::arg("residual"), py::arg("out"),
      py::arg("finite"));
  module.def(
      "reduce_chunks",
      [](uintptr_t received, const PyLayout& layout, const PyScale& scale, uintptr_t residual, uintptr_t out) {
        py::gil_scoped_release release;
        reduce_chunks(at<uint8_t>(received), shape_of(layout), scale_of(scale), at<float>(residual), at<uint8_t>(out));
      },
      py::arg("received"), py::arg("layout"), py::kw_only(), py::arg("scale"), py::arg("residual"), py::arg("out"));
  module.def(
      "unpack_gradients",
      [](uintptr_t reduced, const PyLayout& layout, const PyTensors& tensors, const PyScale& scale,
         uintptr_t square_norm, uintptr_t finite, int64_t count) {
        const auto given = tensors_of(tensors);
        py::gil_scoped_release release;
        unpack_gradients(at<uint8_t>(reduced), count, shape_of(layout), given, scale_of(scale), at<double>(square_norm),
                         at<uint8_t>(finite));
      },
      py::arg("reduced"), py::arg("layout"), py::arg("tensors"), py::kw_only(), py::arg("scale"),
      py::arg("square_norm"), py::arg("finite"), py::arg("count") = 1);
  add_direct(module, pack_method);
  add_direct(module, unpack_method);
}

}  // namespace genfast
