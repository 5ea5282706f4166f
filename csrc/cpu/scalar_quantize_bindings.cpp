// Python bindings of `scalar_quantize`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/scalar_quantize.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyShape = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // B, S, G, D
using PyVectors = std::tuple<uintptr_t, int, PyShape>;           // address or 0, dtype code, strides
using PyMask = std::tuple<uintptr_t, int64_t, int64_t>;          // address or 0, strides

Vectors vectors(const PyVectors& given) {
  Vectors v;
  v.data = reinterpret_cast<char*>(std::get<0>(given));
  v.dtype = std::get<1>(given);
  std::tie(v.stride[0], v.stride[1], v.stride[2], v.stride[3]) = std::get<2>(given);
  return v;
}

RowsOf rows_of(const PyShape& given) {
  RowsOf shape;
  std::tie(shape.batch, shape.rows, shape.groups, shape.size) = given;
  if (shape.size > kMostBits) throw py::value_error("too many numbers in a row");
  return shape;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Steps of all dimensions one after the other; shift and slope of each.
FsqArgs fsq(const PyShape& shape, const std::vector<int64_t>& levels, uintptr_t steps, uintptr_t shapes, bool symmetric,
            bool clamp, const PyVectors& z, const PyVectors& noise) {
  FsqArgs a;
  a.shape = rows_of(shape);
  const float *next = at<const float>(steps), *pair = at<const float>(shapes);
  for (int64_t d = 0; d < a.shape.size; d++, pair += 2) {
    a.levels[d] = {levels.at(d), next, pair[0], pair[1]};
    next += levels[d] - 1;
  }
  a.symmetric = symmetric, a.clamp = clamp;
  a.z = vectors(z), a.noise = vectors(noise);
  return a;
}

BinaryArgs binary(const PyShape& shape, bool normalise, float radius, float magnitude, float chain, int64_t block,
                  float least, const PyMask& mask, const PyVectors& z) {
  BinaryArgs a;
  a.shape = rows_of(shape);
  a.normalise = normalise, a.radius = radius, a.magnitude = magnitude, a.chain = chain;
  a.block = block, a.least = least;
  a.mask = at<const uint8_t>(std::get<0>(mask));
  a.mask_stride[0] = std::get<1>(mask), a.mask_stride[1] = std::get<2>(mask);
  a.z = vectors(z);
  return a;
}

}  // namespace

void register_scalar_quantize(py::module_& module) {
  module.def(
      "fsq_quantize",
      [](const PyShape& shape, const std::vector<int64_t>& levels, uintptr_t steps, uintptr_t shapes, bool symmetric,
         bool clamp, const PyVectors& z, const PyVectors& noise, const PyVectors& codes, uintptr_t indices) {
        FsqArgs a = fsq(shape, levels, steps, shapes, symmetric, clamp, z, noise);
        a.codes = vectors(codes), a.indices = at<int64_t>(indices);
        py::gil_scoped_release release;
        fsq_quantize(a);
      },
      py::arg("shape"), py::arg("levels"), py::arg("steps"), py::arg("shapes"), py::arg("symmetric"), py::arg("clamp"),
      py::arg("z"), py::arg("noise"), py::arg("codes"), py::arg("indices"));
  module.def(
      "fsq_backward",
      [](const PyShape& shape, const std::vector<int64_t>& levels, uintptr_t steps, uintptr_t shapes, bool symmetric,
         bool clamp, const PyVectors& z, const PyVectors& noise, const PyVectors& grad, const PyVectors& grad_z) {
        FsqArgs a = fsq(shape, levels, steps, shapes, symmetric, clamp, z, noise);
        a.grad = vectors(grad), a.grad_z = vectors(grad_z);
        py::gil_scoped_release release;
        fsq_backward(a);
      },
      py::arg("shape"), py::arg("levels"), py::arg("steps"), py::arg("shapes"), py::arg("symmetric"), py::arg("clamp"),
      py::arg("z"), py::arg("noise"), py::arg("grad"), py::arg("grad_z"));
  module.def(
      "binary_quantize",
      [](const PyShape& shape, bool normalise, float radius, float magnitude, float chain, int64_t block, float least,
         const PyMask& mask, const PyVectors& z, const PyVectors& codes, uintptr_t indices, uintptr_t entropies,
         uintptr_t mean, uintptr_t commitment) {
        BinaryArgs a = binary(shape, normalise, radius, magnitude, chain, block, least, mask, z);
        a.codes = vectors(codes), a.indices = at<int64_t>(indices);
        a.entropies = at<float>(entropies), a.mean = at<float>(mean), a.commitment = at<float>(commitment);
        py::gil_scoped_release release;
        binary_quantize(a);
      },
      py::arg("shape"), py::arg("normalise"), py::arg("radius"), py::arg("magnitude"), py::arg("chain"),
      py::arg("block"), py::arg("least"), py::arg("mask"), py::arg("z"), py::arg("codes"), py::arg("indices"),
      py::arg("entropies"), py::arg("mean"), py::arg("commitment"));
  module.def(
      "binary_backward",
      [](const PyShape& shape, bool normalise, float radius, float magnitude, float chain, int64_t block, float least,
         const PyMask& mask, const PyVectors& z, const PyVectors& grad, const PyVectors& grad_z, uintptr_t entropies,
         uintptr_t mean, uintptr_t commitment) {
        BinaryArgs a = binary(shape, normalise, radius, magnitude, chain, block, least, mask, z);
        a.grad = vectors(grad), a.grad_z = vectors(grad_z);
        a.grad_entropies = at<const float>(entropies), a.grad_mean = at<const float>(mean);
        a.grad_commitment = at<const float>(commitment);
        py::gil_scoped_release release;
        binary_backward(a);
      },
      py::arg("shape"), py::arg("normalise"), py::arg("radius"), py::arg("magnitude"), py::arg("chain"),
      py::arg("block"), py::arg("least"), py::arg("mask"), py::arg("z"), py::arg("grad"), py::arg("grad_z"),
      py::arg("entropies"), py::arg("mean"), py::arg("commitment"));
}

}  // namespace genfast
