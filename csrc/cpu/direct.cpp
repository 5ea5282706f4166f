#include "cpu/direct.h"

#include <algorithm>
#include <cmath>

#include "cpu/sampler_step.h"

namespace genfast {
namespace {

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

// Set once by `direct_setup` from Python; kept for the life of the process.
struct Types {
  PyObject* tensor = nullptr;
  PyObject* table = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* dtypes[4] = {};
  PyObject* host = nullptr;
  Reader dtype, shape, requires_grad, is_cpu, is_contiguous, data_ptr;
};
Types types;

// A new reference that is dropped at the end of the scope.
struct Ref {
  PyObject* p;
  explicit Ref(PyObject* object) : p(object) {}
  ~Ref() { Py_XDECREF(p); }
  Ref(const Ref&) = delete;
};

struct Call {
  StepArgs args;
  PyObject* shape = nullptr;  // borrowed from `shape_ref`
  int64_t numel = 1;
  const char* spans[kMaxInputs + 3][2];
  int readers = 0;
};

int dtype_code(PyObject* dtype) {
  for (int i = 0; i < 4; i++) {
    if (dtype == types.dtypes[i]) return i;
  }
  return -1;
}

bool is_true(PyObject* t, const Reader& read) {
  Ref value(read(t));
  return value.p == Py_True;
}

int64_t element_size(int dtype) { return dtype == 3 ? 8 : dtype == 0 ? 4 : 2; }

// Reads a plain contiguous CPU tensor of the call's shape into `o`; false if it is anything else.
bool take_tensor(PyObject* t, Call& call, Operand& o) {
  if ((PyObject*)Py_TYPE(t) != types.tensor) return false;
  {
    Ref dtype(types.dtype(t));
    o.dtype = dtype_code(dtype.p);
    if (o.dtype < 0) return false;
  }
  {
    Ref shape(types.shape(t));
    if (!shape.p || PyObject_RichCompareBool(shape.p, call.shape, Py_EQ) != 1) return false;
  }
  if (is_true(t, types.requires_grad) || !is_true(t, types.is_cpu) || !is_true(t, types.is_contiguous)) return false;
  Ref address(types.data_ptr(t));
  if (!address.p) return false;
  o.data = static_cast<char*>(PyLong_AsVoidPtr(address.p));
  o.batch_stride = call.args.inner;
  return o.data != nullptr;
}

bool take_reader(PyObject* t, Call& call, Operand& o) {
  if (t == Py_None) return true;
  if (!take_tensor(t, call, o)) return false;
  call.spans[call.readers][0] = o.data;
  call.spans[call.readers++][1] = o.data + call.numel * element_size(o.dtype);
  return true;
}

// An output given by the caller may be a reader exactly, or be apart from all of them.
bool clear_of_readers(const Operand& o, const Call& call) {
  const char *low = o.data, *high = o.data + call.numel * element_size(o.dtype);
  for (int i = 0; i < call.readers; i++) {
    const char *a = call.spans[i][0], *b = call.spans[i][1];
    if (b <= low || high <= a || (a == low && b == high)) continue;
    return false;
  }
  return true;
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

bool take_shape(PyObject* first, Call& call, PyObject*& held) {
  held = types.shape(first);
  if (!held || !PyTuple_Check(held)) return false;
  call.shape = held;
  const Py_ssize_t dims = PyTuple_GET_SIZE(held);
  for (Py_ssize_t d = 0; d < dims; d++) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(held, d));
    call.numel *= size;
    if (d == 0) {
      call.args.batch = size;
    } else {
      call.args.inner *= size;
    }
  }
  return call.numel > 0;
}

enum Argument {
  kInputs, kTable, kStep, kUncond, kGuidance, kRescale, kClip, kThresholdArg, kLogVariance, kNoise, kGenerator, kSeed,
  kStream, kOffset, kDtype, kOut, kSecondOut, kArguments
};

// Everything but the outputs; false leaves the call to the checked path.
bool read_arguments(PyObject* const* v, Call& call, PyObject*& shape, int& flags) {
  StepArgs& a = call.args;
  if (v[kThresholdArg] != Py_None || v[kGenerator] != Py_None) return false;
  PyObject* inputs = v[kInputs];
  if (!PyList_CheckExact(inputs) && !PyTuple_CheckExact(inputs)) return false;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(inputs);
  if (n < 1 || n > kMaxInputs) return false;
  PyObject** tensors = PySequence_Fast_ITEMS(inputs);
  if ((PyObject*)Py_TYPE(tensors[0]) != types.tensor || !take_shape(tensors[0], call, shape)) return false;
  a.inputs = (int)n;
  for (Py_ssize_t i = 0; i < n; i++) {
    if (!take_reader(tensors[i], call, a.x[i]) || !a.x[i].data) return false;
    a.float64 |= a.x[i].dtype == 3;
  }

  if ((PyObject*)Py_TYPE(v[kTable]) != types.table) return false;
  Ref host(PyObject_GetAttr(v[kTable], types.host));
  if (!host.p || !PyTuple_CheckExact(host.p)) return false;
  a.table = static_cast<const double*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(host.p, 0)));
  a.rows = PyLong_AsLongLong(PyTuple_GET_ITEM(host.p, 1));
  if (PyLong_AsLong(PyTuple_GET_ITEM(host.p, 2)) != n) return false;
  flags = (int)PyLong_AsLong(PyTuple_GET_ITEM(host.p, 3));
  const char* noisy = PyBytes_AS_STRING(PyTuple_GET_ITEM(host.p, 4));
  const bool has_noise = flags & 2, has_second = flags & 4;
  a.has_x0 = flags & 1;
  a.has_log_std = flags & 8;

  if (v[kStep] == Py_None) {
    if (a.rows != 1 && a.rows != a.batch) return false;
  } else if (!take_index(v[kStep], 0, a.rows, a.row)) {
    return false;
  }

  if (v[kUncond] != Py_None) {
    if (n < 2 || !take_reader(v[kUncond], call, a.uncond) || !take_number(v[kGuidance], a.guidance)) return false;
    if (!take_number(v[kRescale], a.rescale) || a.rescale < 0 || a.rescale > 1) return false;
  } else {
    double rescale;
    if (v[kGuidance] != Py_None || !take_number(v[kRescale], rescale) || rescale != 0) return false;
  }
  if (v[kClip] != Py_None) {
    if (!a.has_x0) return false;
    if (PyTuple_CheckExact(v[kClip]) && PyTuple_GET_SIZE(v[kClip]) == 2) {
      if (!take_number(PyTuple_GET_ITEM(v[kClip], 0), a.low)) return false;
      if (!take_number(PyTuple_GET_ITEM(v[kClip], 1), a.high)) return false;
    } else {
      if (!take_number(v[kClip], a.high)) return false;
      a.low = -a.high;
    }
    if (!(a.low <= a.high)) return false;
    a.limit = kClip;
  }

  if ((v[kLogVariance] != Py_None) != a.has_log_std || !take_reader(v[kLogVariance], call, a.log_variance)) return false;
  if (!take_reader(v[kNoise], call, a.noise)) return false;
  if (v[kSeed] != Py_None) {
    int64_t stream, offset;
    if (a.noise.data || !take_index(v[kSeed], 0, INT64_MAX, a.seed)) return false;
    if (!take_index(v[kStream], 0, int64_t(1) << 32, stream)) return false;
    if (!take_index(v[kOffset], 0, int64_t(1) << 32, offset)) return false;
    a.stream = (uint32_t)stream;
    a.offset = (uint32_t)offset;
    a.philox = true;
  }
  if (a.philox || a.noise.data) {
    if (!has_noise) return false;
  } else if (has_noise) {
    // Without a source the checked path draws, unless no row in question has any noise.
    const int64_t first = a.row < 0 ? 0 : a.row, last = a.row < 0 ? a.rows : a.row + 1;
    for (int64_t r = first; r < last; r++) {
      if (noisy[r]) return false;
    }
    a.log_variance = Operand();
  }
  return has_second || v[kSecondOut] == Py_None;
}

// A given output, or a new one like the first input. Returns a new reference, or null for the checked path.
PyObject* take_output(PyObject* given, PyObject* first, int first_dtype, Call& call, Operand& o) {
  if (given != Py_None) {
    if (!take_tensor(given, call, o) || !clear_of_readers(o, call)) return nullptr;
    Py_INCREF(given);
    return given;
  }
  PyObject* made = PyObject_CallOneArg(types.empty_like, first);
  if (!made) return nullptr;
  Ref address(types.data_ptr(made));
  if (!address.p) {
    Py_DECREF(made);
    return nullptr;
  }
  o.data = static_cast<char*>(PyLong_AsVoidPtr(address.p));
  o.dtype = first_dtype;
  o.batch_stride = call.args.inner;
  return made;
}

PyObject* run(PyObject* const* v, Call& call, PyObject*& shape) {
  int flags = 0;
  if (!read_arguments(v, call, shape, flags)) return nullptr;
  StepArgs& a = call.args;
  PyObject* first = PySequence_Fast_ITEMS(v[kInputs])[0];
  if (v[kDtype] != Py_None && v[kDtype] != types.dtypes[a.x[0].dtype]) return nullptr;
  if (v[kOut] != Py_None && v[kDtype] != Py_None) return nullptr;
  Ref out(take_output(v[kOut], first, a.x[0].dtype, call, a.out));
  if (!out.p) return nullptr;
  Ref second((flags & 4) ? take_output(v[kSecondOut], first, a.out.dtype, call, a.second) : nullptr);
  if (flags & 4) {
    if (!second.p || (v[kSecondOut] == Py_None && a.out.dtype != a.x[0].dtype)) return nullptr;
    const char *low = a.out.data, *high = low + call.numel * element_size(a.out.dtype);
    const char *low2 = a.second.data, *high2 = low2 + call.numel * element_size(a.second.dtype);
    if (low < high2 && low2 < high) return nullptr;
  }
  // Giving up the interpreter lock costs as much as a very small step.
  if (call.numel > 32 * 1024) {
    Py_BEGIN_ALLOW_THREADS;
    sampler_step(a);
    Py_END_ALLOW_THREADS;
  } else {
    sampler_step(a);
  }
  if (flags & 4) return PyTuple_Pack(2, out.p, second.p);
  Py_INCREF(out.p);
  return out.p;
}

PyObject* sampler_step_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  if (count != kArguments || !types.tensor) Py_RETURN_NOTIMPLEMENTED;
  Call call;
  PyObject* shape = nullptr;
  PyObject* result = run(v, call, shape);
  Py_XDECREF(shape);
  if (result) return result;
  // A failed look-up is an unusual argument, which the checked path names.
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

PyMethodDef direct_method = {"sampler_step_direct", (PyCFunction)(void (*)(void))sampler_step_direct, METH_FASTCALL,
                             "sampler_step(inputs, table, step, uncond, guidance, guidance_rescale, clip, threshold, "
                             "log_variance, noise, generator, seed, stream, offset, dtype, out, second_out), all by "
                             "position; NotImplemented for anything but the plain case."};

}  // namespace

void register_direct(pybind11::module_& module) {
  module.def(
      "direct_setup",
      [](pybind11::object tensor, pybind11::object table, pybind11::object empty_like, pybind11::list dtypes) {
        types.table = table.release().ptr();
        types.empty_like = empty_like.release().ptr();
        for (int i = 0; i < 4; i++) types.dtypes[i] = pybind11::object(dtypes[i]).release().ptr();
        types.host = PyUnicode_InternFromString("_host");
        types.dtype.bind(tensor.ptr(), "dtype", false);
        types.shape.bind(tensor.ptr(), "shape", false);
        types.requires_grad.bind(tensor.ptr(), "requires_grad", false);
        types.is_cpu.bind(tensor.ptr(), "is_cpu", false);
        types.is_contiguous.bind(tensor.ptr(), "is_contiguous", true);
        types.data_ptr.bind(tensor.ptr(), "data_ptr", true);
        types.tensor = tensor.release().ptr();
      },
      "Tell the module torch.Tensor, StepTable, torch.empty_like and [float32, bfloat16, float16, float64].");
  PyObject* function = PyCFunction_NewEx(&direct_method, nullptr, nullptr);
  module.add_object("sampler_step_direct", pybind11::reinterpret_steal<pybind11::object>(function));
}

}  // namespace genfast
