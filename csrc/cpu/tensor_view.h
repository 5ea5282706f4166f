// Tensors as Python objects: what a native call asks of them, and new ones in memory of the pool. No torch header: a
// tensor is read through the DLPack exchange protocol, or through its attributes with a torch that does not offer it.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/dlpack.h"

namespace genfast {

// An attribute or a method without arguments of torch.Tensor. Calling the C function behind the descriptor skips the
// look-up along the type's bases, which is half of the price of `t.dtype`.
class Reader {
 public:
  // `name` must be found on the type; anything but a C descriptor is read in the ordinary way.
  void bind(PyObject* type, const char* name, bool method) {
    name_ = PyUnicode_InternFromString(name);
    method_ = method;
    PyObject* found = PyObject_GetAttr(type, name_);
    if (!found) throw pybind11::error_already_set();
    if (!method && Py_TYPE(found) == &PyGetSetDescr_Type) {
      getset_ = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
    } else if (method && Py_TYPE(found) == &PyMethodDescr_Type) {
      PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(found)->d_method;
      if (def->ml_flags == METH_NOARGS) plain_ = def->ml_meth;
      if (def->ml_flags == (METH_VARARGS | METH_KEYWORDS)) {
        keywords_ = reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void (*)()>(def->ml_meth));
        no_arguments_ = PyTuple_New(0);
      }
    }
  }
  // A new reference, or null with an exception set.
  PyObject* operator()(PyObject* t) const {
    if (getset_) return getset_->get(t, getset_->closure);
    if (plain_) return plain_(t, nullptr);
    if (keywords_) return keywords_(t, no_arguments_, nullptr);
    return method_ ? PyObject_CallMethodNoArgs(t, name_) : PyObject_GetAttr(t, name_);
  }

 private:
  PyObject *name_ = nullptr, *no_arguments_ = nullptr;
  bool method_ = false;
  PyGetSetDef* getset_ = nullptr;
  PyCFunction plain_ = nullptr;
  PyCFunctionWithKeywords keywords_ = nullptr;
};

// Beyond the codes of dtype.h.
constexpr int kInt64 = 4, kBool = 5, kTensorDTypes = 6;

// Set once by `direct_setup` from Python; kept for the life of the process.
struct Types {
  PyObject* tensor = nullptr;
  PyObject* table = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* backend = nullptr;  // context variable: None, or the backend that was ordered
  PyObject* dtypes[kTensorDTypes] = {};
  PyObject* host = nullptr;
  Reader dtype, shape, requires_grad, is_cpu, is_contiguous, data_ptr;
  const DLPackExchangeAPI* dlpack = nullptr;  // null with a torch that does not offer it
};
extern Types types;

struct View {
  char* data = nullptr;
  int dtype = -1, dims = 0;
  bool contiguous = false;  // with the usual strides, those of dimensions of size 1 included
  int64_t shape[kMaxDims], batch_stride = 0;
  int64_t batch() const { return dims ? shape[0] : 1; }
  int64_t inner() const {
    int64_t n = 1;
    for (int d = 1; d < dims; d++) n *= shape[d];
    return n;
  }
};

// A new reference that is dropped at the end of the scope.
struct Ref {
  PyObject* p;
  explicit Ref(PyObject* object) : p(object) {}
  ~Ref() { Py_XDECREF(p); }
  Ref(const Ref&) = delete;
};

inline int64_t element_size(int dtype) { return dtype == kBool ? 1 : dtype >= 3 ? 8 : dtype == 0 ? 4 : 2; }

// A CPU tensor that no gradient is asked of, contiguous within each entry of its first dimension: of floating numbers;
// of any dtype that has a code.
bool view(PyObject* t, View& v);
bool view_any(PyObject* t, View& v);

// A new tensor in memory of the pool, with the shape of `like`, which must have the usual strides, or null if torch
// cannot take it. A new reference.
PyObject* new_like(const View& like, int dtype, char*& data);

// False if the object is not such a number.
bool take_index(PyObject* value, int64_t low, int64_t high, int64_t& to);
bool take_number(PyObject* value, double& to);

// Whether `with genfast.backend(...)` is in force.
bool backend_is_ordered();

void register_tensor_view(pybind11::module_& module);

}  // namespace genfast
