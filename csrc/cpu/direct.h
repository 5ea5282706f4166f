// The eager hot path of an op: validation and launch in one C call.
//
// A small step is a few microseconds of memory traffic, and the same checks written in Python cost more than that. So
// this one entry takes the tensors themselves, duck-typed: it asks each for `dtype`, `shape`, `is_contiguous()` and
// `data_ptr()` through Python, and knows no torch header. Whatever is not the plain case (an unusual argument, a
// strided tensor, anything wrong) returns NotImplemented with nothing done, and the checked path in Python takes over.
#pragma once
#include <pybind11/pybind11.h>

namespace genfast {

void register_direct(pybind11::module_& module);
void register_transfer_direct(pybind11::module_& module);

// Adds a function that pybind11 does not wrap: its checks of arguments alone cost as much as a small step.
void add_direct(pybind11::module_& module, PyMethodDef& method);

}  // namespace genfast
