// `select_transfer` and `commit_` on plain CPU tensors in one C call each: their checks in Python cost four times what
// the kernels do. As in direct.cpp, whatever is not the plain case returns NotImplemented with nothing done.
#include "cpu/direct.h"
#include "cpu/tensor_view.h"
#include "cpu/token_sampling.h"

namespace genfast {
namespace {

constexpr const char* kStrategies[] = {"top",       "threshold",  "factor", "entropy_bound",
                                       "hierarchy", "sequential", "random"};

enum SelectArgument {
  kConfidence,
  kMask,
  kN,
  kStrategyArg,
  kThresholdValue,
  kLowThreshold,
  kStrict,
  kFactorValue,
  kAcceptLast,
  kBound,
  kInclusive,
  kStart,
  kEnd,
  kTemperature,
  kSeed,
  kStream,
  kOffset,
  kSelectArguments
};

bool take_bool(PyObject* value, bool& to) {
  to = value == Py_True;
  return to || value == Py_False;
}

// int64 [rows], or a number.
bool take_per_row(PyObject* value, int64_t rows, PerRow& to) {
  if (PyLong_CheckExact(value)) return take_index(value, INT64_MIN, INT64_MAX, to.value);
  View v;
  if (!view_any(value, v) || v.dtype != kInt64 || v.dims != 1 || v.shape[0] != rows || v.batch_stride != 1)
    return false;
  to.values = reinterpret_cast<const int64_t*>(v.data);
  return true;
}

// A number that the strategy needs, or None for one that it does not take.
bool take_option(PyObject* value, bool needed, double& to) {
  return needed ? take_number(value, to) : value == Py_None;
}

bool take_strategy(PyObject* name, int& to) {
  if (!PyUnicode_CheckExact(name)) return false;
  for (int k = 0; k < 7; k++) {
    if (PyUnicode_CompareWithASCIIString(name, kStrategies[k]) == 0) {
      to = k;
      return true;
    }
  }
  return false;
}

bool is_matrix(const View& v, int dtype) { return v.dtype == dtype && v.dims == 2; }

bool same_matrix(const View& v, const View& w) { return v.shape[0] == w.shape[0] && v.shape[1] == w.shape[1]; }

// `like` is the confidence: the result has its shape.
bool read_select(PyObject* const* v, SelectArgs& a, View& like) {
  View mask;
  if (!view_any(v[kConfidence], like) || !is_matrix(like, 0)) return false;
  if (!view_any(v[kMask], mask) || !is_matrix(mask, kBool) || !same_matrix(mask, like)) return false;
  a.batch = like.shape[0];
  a.length = like.shape[1];
  if (a.batch == 0 || a.length == 0) return false;
  a.confidence = reinterpret_cast<const float*>(like.data);
  a.confidence_stride = like.batch_stride;
  a.mask = reinterpret_cast<const uint8_t*>(mask.data);
  a.mask_stride = mask.batch_stride;
  a.end.value = a.length;
  double threshold = 0, low = 0;
  if (!take_strategy(v[kStrategyArg], a.strategy)) return false;
  if (!take_option(v[kThresholdValue], a.strategy == kThreshold || a.strategy == kHierarchy, threshold)) return false;
  if (!take_option(v[kLowThreshold], a.strategy == kHierarchy, low)) return false;
  if (!take_option(v[kFactorValue], a.strategy == kFactor, a.factor)) return false;
  if (!take_option(v[kBound], a.strategy == kEntropyBound, a.bound)) return false;
  a.threshold = (float)threshold;
  a.low_threshold = (float)low;
  if (!take_bool(v[kStrict], a.strict) || !take_bool(v[kAcceptLast], a.accept_last)) return false;
  if (!take_bool(v[kInclusive], a.inclusive) || !take_per_row(v[kN], a.batch, a.n)) return false;
  if (!take_per_row(v[kStart], a.batch, a.start)) return false;
  if (v[kEnd] != Py_None && !take_per_row(v[kEnd], a.batch, a.end)) return false;
  // Positions drawn at random need a seed or are left to the checked path.
  double temperature = 0;
  if (!take_number(v[kTemperature], temperature) || temperature != 0 || a.strategy == kRandomOrder) return false;
  int64_t stream, offset;
  if (!take_index(v[kStream], 0, int64_t(1) << 32, stream) || !take_index(v[kOffset], 0, int64_t(1) << 32, offset))
    return false;
  return v[kSeed] == Py_None;
}

PyObject* select_transfer_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  if (count == kSelectArguments && types.tensor && !backend_is_ordered()) {
    SelectArgs a;
    View like;
    char* out = nullptr;
    if (read_select(v, a, like)) {
      if (PyObject* result = new_like(like, kBool, out)) {
        a.out = reinterpret_cast<uint8_t*>(out);
        select_transfer(a);
        return result;
      }
    }
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

enum CommitArgument { kX, kTokens, kSelected, kMaskId, kEosId, kCommitArguments };

bool read_commit(PyObject* const* v, CommitArgs& a, View& x) {
  View tokens, selected;
  if (!view_any(v[kX], x) || !is_matrix(x, kInt64)) return false;
  if (!view_any(v[kTokens], tokens) || !is_matrix(tokens, kInt64) || !same_matrix(tokens, x)) return false;
  if (!view_any(v[kSelected], selected) || !is_matrix(selected, kBool) || !same_matrix(selected, x)) return false;
  a.batch = x.shape[0];
  a.length = x.shape[1];
  if (a.batch == 0 || a.length == 0 || x.batch_stride < a.length) return false;
  a.x = reinterpret_cast<int64_t*>(x.data);
  a.x_stride = x.batch_stride;
  a.tokens = reinterpret_cast<const int64_t*>(tokens.data);
  a.tokens_stride = tokens.batch_stride;
  a.selected = reinterpret_cast<const uint8_t*>(selected.data);
  a.selected_stride = selected.batch_stride;
  a.has_eos = v[kEosId] != Py_None;
  if (a.has_eos && !take_index(v[kEosId], INT64_MIN, INT64_MAX, a.eos_id)) return false;
  return take_index(v[kMaskId], INT64_MIN, INT64_MAX, a.mask_id);
}

PyObject* commit_direct(PyObject*, PyObject* const* v, Py_ssize_t count) {
  if (count == kCommitArguments && types.tensor && !backend_is_ordered()) {
    CommitArgs a;
    View x;
    if (read_commit(v, a, x)) {
      View rows;
      rows.dims = 1;
      rows.contiguous = true;
      rows.shape[0] = a.batch;
      char *left = nullptr, *finished = nullptr;
      Ref first(new_like(rows, kInt64, left)), second(first.p ? new_like(rows, kBool, finished) : nullptr);
      if (second.p) {
        a.left = reinterpret_cast<int64_t*>(left);
        a.finished = reinterpret_cast<uint8_t*>(finished);
        commit(a);
        return PyTuple_Pack(2, first.p, second.p);
      }
    }
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

PyMethodDef select_method = {"select_transfer_direct", (PyCFunction)(void (*)(void))select_transfer_direct,
                             METH_FASTCALL,
                             "select_transfer(confidence, mask, n, strategy, threshold, low_threshold, strict, factor, "
                             "accept_last, bound, inclusive, start, end, temperature, seed, stream, offset), all by "
                             "position; NotImplemented for anything but the plain case."};
PyMethodDef commit_method = {"commit_direct", (PyCFunction)(void (*)(void))commit_direct, METH_FASTCALL,
                             "commit_(x, tokens, selected, mask_id, eos_id), all by position; NotImplemented for "
                             "anything but the plain case."};

}  // namespace

void register_transfer_direct(pybind11::module_& module) {
  add_direct(module, select_method);
  add_direct(module, commit_method);
}

}  // namespace genfast
