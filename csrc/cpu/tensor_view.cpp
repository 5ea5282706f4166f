#include "cpu/tensor_view.h"

#include <cmath>

#include "cpu/pool.h"

namespace genfast {

Types types;

namespace {

int dtype_code(PyObject* dtype) {
  for (int i = 0; i < kTensorDTypes; i++) {
    if (dtype == types.dtypes[i]) return i;
  }
  return -1;
}

bool is_true(PyObject* t, const Reader& read) {
  Ref value(read(t));
  return value.p == Py_True;
}

bool view_by_dlpack(PyObject* t, View& v) {
  DLTensor d;
  if (types.dlpack->show(t, &d) != 0) return false;
  if (d.device_type != kDLCpu || d.lanes != 1 || d.ndim > kMaxDims || !d.data) return false;
  if (d.type_code == kDLFloat) {
    v.dtype = d.bits == 32 ? 0 : d.bits == 16 ? 2 : d.bits == 64 ? 3 : -1;
  } else if (d.type_code == kDLBfloat && d.bits == 16) {
    v.dtype = 1;
  } else if (d.type_code == kDLInt && d.bits == 64) {
    v.dtype = kInt64;
  } else if (d.type_code == kDLBool && d.bits == 8) {
    v.dtype = kBool;
  }
  if (v.dtype < 0) return false;
  v.data = static_cast<char*>(d.data) + d.byte_offset;
  v.dims = d.ndim;
  int64_t dense = 1;
  bool usual = true;
  for (int k = d.ndim - 1; k > 0; k--) {
    v.shape[k] = d.shape[k];
    if (d.strides && d.strides[k] != dense) {
      if (d.shape[k] != 1) return false;
      usual = false;
    }
    dense *= d.shape[k];
  }
  if (d.ndim > 0) v.shape[0] = d.shape[0];
  v.contiguous = usual && (d.ndim == 0 || !d.strides || d.strides[0] == dense);
  v.batch_stride = d.ndim > 0 && d.shape[0] > 1 && d.strides ? d.strides[0] : dense;
  // Views of complex tensors may negate what they show; the last stride gives them away even at size 1.
  return d.ndim == 0 || !d.strides || d.strides[d.ndim - 1] == 1;
}

bool view_by_attributes(PyObject* t, View& v) {
  {
    Ref dtype(types.dtype(t));
    v.dtype = dtype_code(dtype.p);
  }
  if (v.dtype < 0 || !is_true(t, types.is_cpu) || !is_true(t, types.is_contiguous)) return false;
  Ref shape(types.shape(t));
  if (!shape.p || !PyTuple_Check(shape.p) || PyTuple_GET_SIZE(shape.p) > kMaxDims) return false;
  v.dims = (int)PyTuple_GET_SIZE(shape.p);
  for (int d = 0; d < v.dims; d++) v.shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.p, d));
  v.batch_stride = v.inner();
  Ref address(types.data_ptr(t));
  if (!address.p) return false;
  v.data = static_cast<char*>(PyLong_AsVoidPtr(address.p));
  return v.data != nullptr;
}

}  // namespace

bool view_any(PyObject* t, View& v) {
  if ((PyObject*)Py_TYPE(t) != types.tensor || is_true(t, types.requires_grad)) return false;
  return types.dlpack ? view_by_dlpack(t, v) : view_by_attributes(t, v);
}

bool view(PyObject* t, View& v) { return view_any(t, v) && v.dtype < kInt64; }

PyObject* new_like(const View& like, int dtype, char*& data) {
  if (!types.dlpack || !types.dlpack->to_object || !like.contiguous) return nullptr;
  constexpr uint8_t codes[kTensorDTypes] = {kDLFloat, kDLBfloat, kDLFloat, kDLFloat, kDLInt, kDLBool};
  DLManagedTensor* memory = pool_take(like.dims, like.shape, codes[dtype], (uint8_t)(8 * element_size(dtype)));
  if (!memory) return nullptr;
  data = static_cast<char*>(memory->tensor.data);
  void* object = nullptr;
  return types.dlpack->to_object(memory, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

bool take_index(PyObject* value, int64_t low, int64_t high, int64_t& to) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  const long long v = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow || v < low || v >= high) return false;
  to = v;
  return true;
}

bool take_number(PyObject* value, double& to) {
  if (PyFloat_CheckExact(value)) {
    to = PyFloat_AS_DOUBLE(value);
  } else if (PyLong_CheckExact(value)) {
    to = PyLong_AsDouble(value);
  } else {
    return false;
  }
  return std::isfinite(to);
}

bool backend_is_ordered() {
  PyObject* ordered = nullptr;
  if (PyContextVar_Get(types.backend, nullptr, &ordered) < 0) return true;
  Py_XDECREF(ordered);
  return ordered != Py_None;
}

void register_tensor_view(pybind11::module_& module) {
  module.def(
      "direct_setup",
      [](pybind11::object tensor, pybind11::object table, pybind11::object empty_like, pybind11::object backend,
         pybind11::list dtypes) {
        types.table = table.release().ptr();
        types.empty_like = empty_like.release().ptr();
        types.backend = backend.release().ptr();
        for (int i = 0; i < kTensorDTypes; i++) types.dtypes[i] = pybind11::object(dtypes[i]).release().ptr();
        types.host = PyUnicode_InternFromString("_host");
        types.dtype.bind(tensor.ptr(), "dtype", false);
        types.shape.bind(tensor.ptr(), "shape", false);
        types.requires_grad.bind(tensor.ptr(), "requires_grad", false);
        types.is_cpu.bind(tensor.ptr(), "is_cpu", false);
        types.is_contiguous.bind(tensor.ptr(), "is_contiguous", true);
        types.data_ptr.bind(tensor.ptr(), "data_ptr", true);
        if (pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) {
          PyObject* capsule = tensor.attr("__dlpack_c_exchange_api__").ptr();
          const void* found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
          if (!found) PyErr_Clear();
          types.dlpack = static_cast<const DLPackExchangeAPI*>(found);
          if (types.dlpack && (types.dlpack->major != 1 || !types.dlpack->show)) types.dlpack = nullptr;
        }
        types.tensor = tensor.release().ptr();
      },
      "Tell the module torch.Tensor, StepTable, torch.empty_like, the context variable of the backend and [float32, "
      "bfloat16, float16, float64, int64, bool].");
}

}  // namespace genfast
