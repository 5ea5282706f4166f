#include "cpu/direct.h"

#include <algorithm>
#include <cmath>

#include "cpu/pool.h"
#include "cpu/sampler_step.h"
#include "cpu/tensor_view.h"

namespace genfast {
namespace {

struct Call {
  StepArgs args;
  View like;  // the first input: every other tensor has its shape
  const char* spans[kMaxInputs + 3][2];
  int readers = 0;
  int64_t numel() const { return args.batch * args.inner; }
};

void to_operand(const View& v, Operand& o) {
  o.data = v.data;
  o.dtype = v.dtype;
  o.batch_stride = v.batch_stride;
}

bool same_shape(const View& v, const View& w) {
  return v.dims == w.dims && std::equal(v.shape, v.shape + v.dims, w.shape);
}

void add_reader(const View& v, Call& call, Operand& o) {
  to_operand(v, o);
  call.spans[call.readers][0] = v.data;
  call.spans[call.readers++][1] =
      v.data + ((call.args.batch - 1) * v.batch_stride + call.args.inner) * element_size(v.dtype);
}

bool take_reader(PyObject* t, Call& call, Operand& o) {
  if (t == Py_None) return true;
  View v;
  if (!view(t, v) || !same_shape(v, call.like)) return false;
  add_reader(v, call, o);
  return true;
}

// An output given by the caller may be a reader exactly, or be apart from all of them.
bool clear_of_readers(const Operand& o, const Call& call) {
  const char *low = o.data, *high = o.data + call.numel() * element_size(o.dtype);
  for (int i = 0; i < call.readers; i++) {
    const char *a = call.spans[i][0], *b = call.spans[i][1];
    if (b <= low || high <= a || (a == low && b == high)) continue;
    return false;
  }
  return true;
}

enum Argument {
  kInputs,
  kTable,
  kStep,
  kUncond,
  kGuidance,
  kRescale,
  kClip,
  kThresholdArg,
  kLogVariance,
  kNoise,
  kGenerator,
  kSeed,
  kStream,
  kOffset,
  kDtype,
  kOut,
  kSecondOut,
  kArguments
};

// Everything that a table tells; `noisy` then says per row whether its noise weights are not zero.
bool read_table(PyObject* table, Call& call, int& flags, const char*& noisy) {
  StepArgs& a = call.args;
  if ((PyObject*)Py_TYPE(table) != types.table) return false;
  Ref host(PyObject_GetAttr(table, types.host));
  if (!host.p || !PyTuple_CheckExact(host.p)) return false;
  View data;
  if (!view(PyTuple_GET_ITEM(host.p, 0), data) || data.dtype != 3) return false;
  a.table = reinterpret_cast<const double*>(data.data);
  a.rows = PyLong_AsLongLong(PyTuple_GET_ITEM(host.p, 1));
  if (PyLong_AsLong(PyTuple_GET_ITEM(host.p, 2)) != a.inputs) return false;
  flags = (int)PyLong_AsLong(PyTuple_GET_ITEM(host.p, 3));
  noisy = PyBytes_AS_STRING(PyTuple_GET_ITEM(host.p, 4));  // lives as long as the table, which the caller holds
  a.has_x0 = flags & 1;
  a.has_log_std = flags & 8;
  return true;
}

bool read_inputs(PyObject* const* tensors, Py_ssize_t n, Call& call) {
  StepArgs& a = call.args;
  if (n < 1 || n > kMaxInputs || !view(tensors[0], call.like)) return false;
  a.batch = call.like.batch();
  a.inner = call.like.inner();
  if (call.numel() <= 0) return false;
  a.inputs = (int)n;
  add_reader(call.like, call, a.x[0]);
  for (Py_ssize_t i = 1; i < n; i++) {
    if (tensors[i] == Py_None || !take_reader(tensors[i], call, a.x[i])) return false;
  }
  for (Py_ssize_t i = 0; i < n; i++) a.float64 |= a.x[i].dtype == 3;
  return true;
}

bool read_clip(PyObject* clip, StepArgs& a) {
  if (clip == Py_None) return true;
  if (!a.has_x0) return false;
  if (PyTuple_CheckExact(clip) && PyTuple_GET_SIZE(clip) == 2) {
    if (!take_number(PyTuple_GET_ITEM(clip, 0), a.low)) return false;
    if (!take_number(PyTuple_GET_ITEM(clip, 1), a.high)) return false;
  } else {
    if (!take_number(clip, a.high)) return false;
    a.low = -a.high;
  }
  a.limit = kClip;
  return a.low <= a.high;
}

// Everything but the outputs; false leaves the call to the checked path.
bool read_arguments(PyObject* const* v, Call& call, int& flags) {
  StepArgs& a = call.args;
  if (v[kThresholdArg] != Py_None || v[kGenerator] != Py_None) return false;
  PyObject* inputs = v[kInputs];
  if (!PyList_CheckExact(inputs) && !PyTuple_CheckExact(inputs)) return false;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(inputs);
  if (!read_inputs(PySequence_Fast_ITEMS(inputs), n, call)) return false;
  const char* noisy = nullptr;
  if (!read_table(v[kTable], call, flags, noisy)) return false;
  const bool has_noise = flags & 2, has_second = flags & 4;

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
  if (!read_clip(v[kClip], a)) return false;

  if ((v[kLogVariance] != Py_None) != a.has_log_std || !take_reader(v[kLogVariance], call, a.log_variance))
    return false;
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
PyObject* take_output(PyObject* given, PyObject* first, Call& call, Operand& o) {
  PyObject* output = given;
  if (given != Py_None) {
    Py_INCREF(given);
  } else if (types.dlpack && types.dlpack->to_object && call.like.contiguous) {
    o.dtype = call.like.dtype;
    o.batch_stride = call.args.inner;
    return new_like(call.like, o.dtype, o.data);
  } else if (!(output = PyObject_CallOneArg(types.empty_like, first))) {
    return nullptr;
  }
  View v;
  bool good = view(output, v) && same_shape(v, call.like) && v.batch_stride == call.args.inner;
  if (good) {
    to_operand(v, o);
    good = given == Py_None || clear_of_readers(o, call);
  }
  if (good) return output;
  Py_DECREF(output);
  return nullptr;
}

void launch(Call& call) {
  // Giving up the interpreter lock costs as much as a very small step.
  if (call.numel() > 32 * 1024) {
    Py_BEGIN_ALLOW_THREADS;
    sampler_step(call.args);
    Py_END_ALLOW_THREADS;
  } else {
    sampler_step(call.args);
  }
}

PyObject* run(PyObject* const* v, Call& call) {
  int flags = 0;
  if (!read_arguments(v, call, flags)) return nullptr;
  StepArgs& a = call.args;
  PyObject* first = PySequence_Fast_ITEMS(v[kInputs])[0];
  if (v[kDtype] != Py_None && v[kDtype] != types.dtypes[a.x[0].dtype]) return nullptr;
  if (v[kOut] != Py_None && v[kDtype] != Py_None) return nullptr;
  Ref out(take_output(v[kOut], first, call, a.out));
  if (!out.p) return nullptr;
  Ref second((flags & 4) ? take_output(v[kSecondOut], first, call, a.second) : nullptr);
  if (flags & 4) {
    if (!second.p || (v[kSecondOut] == Py_None && a.out.dtype != a.x[0].dtype)) return nullptr;
    const char *low = a.out.data, *high = low + call.numel() * element_size(a.out.dtype);
    const char *low2 = a.second.data, *high2 = low2 + call.numel() * element_size(a.second.dtype);
    if (low < high2 && low2 < high) return nullptr;
  }
  launch(call);
  if (second.p) return PyTuple_Pack(2, out.p, second.p);
  Py_INCREF(out.p);
  return out.p;
}

PyObject* sampler_step_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  if (count != kArguments || !types.tensor) Py_RETURN_NOTIMPLEMENTED;
  if (!backend_is_ordered()) {
    Call call;
    if (PyObject* result = run(v, call)) return result;
  }
  // A failed look-up is an unusual argument, which the checked path names.
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

// What a scheduler asks for at every step: (table, row, clip, input, ...), inputs of one dtype, no noise on the row.
bool plain_step(PyObject* const* v, Py_ssize_t inputs, PyObject*& out, PyObject*& second) {
  Call call;
  StepArgs& a = call.args;
  int flags = 0;
  const char* noisy = nullptr;
  if (!read_inputs(v + 3, inputs, call) || !read_table(v[0], call, flags, noisy)) return false;
  for (int i = 1; i < a.inputs; i++) {
    if (a.x[i].dtype != a.x[0].dtype) return false;
  }
  if (!take_index(v[1], 0, a.rows, a.row) || noisy[a.row] || a.has_log_std || !read_clip(v[2], a)) return false;
  if (!(out = take_output(Py_None, v[3], call, a.out))) return false;
  if ((flags & 4) && !(second = take_output(Py_None, v[3], call, a.second))) {
    Py_CLEAR(out);
    return false;
  }
  launch(call);
  return true;
}

PyObject* plain_step_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  PyObject *out = nullptr, *second = nullptr;
  if (count > 3 && types.tensor && !backend_is_ordered() && plain_step(v, count - 3, out, second)) {
    if (!second) return out;
    Ref first(out), other(second);
    return PyTuple_Pack(2, out, second);
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

// The same, in an object of a class derived from OrderedDict that holds every item as an attribute too, as diffusers
// returns it. The first argument is (class, name of the output[, name of the second output]).
PyObject* plain_object_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  PyObject *out = nullptr, *second = nullptr;
  if (count > 4 && types.tensor && !backend_is_ordered() && plain_step(v + 1, count - 4, out, second)) {
    Ref first(out), other(second);
    PyTypeObject* type = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(v[0], 0));
    Ref nothing(PyTuple_New(0));
    PyObject* object = nothing.p ? type->tp_new(type, nothing.p, nullptr) : nullptr;
    PyObject* values[2] = {out, second};
    for (int k = 0; object && k < (second ? 2 : 1); k++) {
      PyObject* name = PyTuple_GET_ITEM(v[0], k + 1);
      // The attribute is set below the class's own __setattr__, which would set the item once more.
      if (PyODict_SetItem(object, name, values[k]) < 0 || PyObject_GenericSetAttr(object, name, values[k]) < 0)
        Py_CLEAR(object);
    }
    return object;
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

PyMethodDef direct_method = {"sampler_step_direct", (PyCFunction)(void (*)(void))sampler_step_direct, METH_FASTCALL,
                             "sampler_step(inputs, table, step, uncond, guidance, guidance_rescale, clip, threshold, "
                             "log_variance, noise, generator, seed, stream, offset, dtype, out, second_out), all by "
                             "position; NotImplemented for anything but the plain case."};
PyMethodDef plain_method = {"plain_step_direct", (PyCFunction)(void (*)(void))plain_step_direct, METH_FASTCALL,
                            "plain_step(table, row, clip, input, ...): a step of inputs of one dtype on a row without "
                            "noise; NotImplemented for anything else."};
PyMethodDef object_method = {"plain_object_direct", (PyCFunction)(void (*)(void))plain_object_direct, METH_FASTCALL,
                             "plain_object((class, name, ...), table, row, clip, input, ...): plain_step whose outputs "
                             "are the named items and attributes of a new object of the class."};

}  // namespace

void register_direct(pybind11::module_& module) {
  module.def("release_memory", &pool_release,
             "Give the memory that is kept for the next results back to the system; the number of bytes.");
  for (PyMethodDef* method : {&direct_method, &plain_method, &object_method}) add_direct(module, *method);
}

void add_direct(pybind11::module_& module, PyMethodDef& method) {
  PyObject* function = PyCFunction_NewEx(&method, nullptr, nullptr);
  module.add_object(method.ml_name, pybind11::reinterpret_steal<pybind11::object>(function));
}

}  // namespace genfast
