// Python bindings of the part `code_update`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/bindings.h"
#include "cpu/code_update.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyVectors = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;  // address or 0, dtype code, strides
using PySizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;           // B, S, G, D, K
using PyCodes = std::tuple<uintptr_t, int>;                                        // address or 0, dtype code
using PyDraw = std::tuple<uint64_t, int64_t, int64_t, int64_t, int64_t>;           // seed, stream, offset, world, rank
using PyNumbers = std::tuple<double, double, double, double>;                      // decay, eps, threshold, reset

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Vectors vectors(const PyVectors& given) {
  Vectors v;
  v.data = at<char>(std::get<0>(given));
  std::tie(std::ignore, v.dtype, v.batch_stride, v.position_stride, v.group_stride, v.entry_stride) = given;
  return v;
}

CodeSizes sizes(const PySizes& given) {
  CodeSizes n;
  std::tie(n.batch, n.length, n.groups, n.size, n.codes) = given;
  return n;
}

SlotDraw slot_draw(const PyDraw& given) {
  SlotDraw d;
  d.seed = std::get<0>(given);
  d.stream = (uint32_t)std::get<1>(given);
  d.offset = (uint32_t)std::get<2>(given);
  d.world = std::get<3>(given);
  d.rank = std::get<4>(given);
  return d;
}

void set_state(AverageArgs& a, uintptr_t codebook, uintptr_t cluster_size, uintptr_t embed_avg,
               const PyNumbers& numbers) {
  a.codebook = at<float>(codebook);
  a.cluster_size = at<float>(cluster_size);
  a.embed_avg = at<float>(embed_avg);
  const double weight = 1 - std::get<0>(numbers);
  a.weight = (float)weight;
  a.rest = 1 - a.weight;
  a.eps = (float)std::get<1>(numbers);
  a.threshold = (float)std::get<2>(numbers);
  a.reset = (float)std::get<3>(numbers);
}

}  // namespace

void register_code_update(py::module_& module) {
  module.def(
      "quantize",
      [](const PySizes& n, const PyVectors& z, const PyCodes& codebook, uintptr_t indices, bool zeros,
         const PyVectors& z_q, uintptr_t losses, uintptr_t valid, uintptr_t counts, uintptr_t perplexity) {
        QuantizeArgs a;
        a.n = sizes(n);
        a.z = vectors(z), a.z_q = vectors(z_q);
        a.codebook = at<const char>(std::get<0>(codebook)), a.codebook_dtype = std::get<1>(codebook);
        a.indices = at<const int64_t>(indices);
        a.zeros = zeros;
        a.losses = at<float>(losses);
        a.valid = at<int64_t>(valid);
        a.counts = at<int64_t>(counts);
        a.perplexity = at<float>(perplexity);
        py::gil_scoped_release release;
        quantize(a);
      },
      py::arg("sizes"), py::arg("z"), py::arg("codebook"), py::arg("indices"), py::kw_only(), py::arg("zeros"),
      py::arg("z_q"), py::arg("losses"), py::arg("valid"), py::arg("counts"), py::arg("perplexity"));
  module.def(
      "quantize_backward",
      [](const PySizes& n, const PyVectors& grad_z_q, uintptr_t grad_losses, const PyVectors& z, const PyVectors& z_q,
         uintptr_t indices, uintptr_t valid, int gradient, bool zeros, const PyVectors& grad_z,
         const PyCodes& grad_codebook) {
        QuantizeBackwardArgs a;
        a.n = sizes(n);
        a.grad_z_q = vectors(grad_z_q), a.z = vectors(z), a.z_q = vectors(z_q), a.grad_z = vectors(grad_z);
        a.grad_losses = at<const float>(grad_losses);
        a.indices = at<const int64_t>(indices);
        a.valid = at<const int64_t>(valid);
        a.gradient = gradient;
        a.zeros = zeros;
        a.grad_codebook = at<char>(std::get<0>(grad_codebook)), a.codebook_dtype = std::get<1>(grad_codebook);
        py::gil_scoped_release release;
        quantize_backward(a);
      },
      py::arg("sizes"), py::arg("grad_z_q"), py::arg("grad_losses"), py::arg("z"), py::arg("z_q"), py::arg("indices"),
      py::arg("valid"), py::kw_only(), py::arg("gradient"), py::arg("zeros"), py::arg("grad_z"),
      py::arg("grad_codebook"));
  module.def(
      "ema_update",
      [](const PySizes& n, uintptr_t codebook, uintptr_t cluster_size, uintptr_t embed_avg, const PyVectors& z,
         uintptr_t indices, bool cosine, const PyNumbers& numbers, const PyDraw& draw) {
        AverageArgs a;
        a.n = sizes(n);
        a.z = vectors(z);
        a.indices = at<const int64_t>(indices);
        a.cosine = cosine;
        a.draw = slot_draw(draw);
        set_state(a, codebook, cluster_size, embed_avg, numbers);
        py::gil_scoped_release release;
        ema_update(a);
      },
      py::arg("sizes"), py::arg("codebook"), py::arg("cluster_size"), py::arg("embed_avg"), py::arg("z"),
      py::arg("indices"), py::kw_only(), py::arg("cosine"), py::arg("numbers"), py::arg("draw"));
  module.def(
      "code_sums",
      [](const PySizes& n, const PyVectors& z, uintptr_t indices, bool cosine, uintptr_t sums, uintptr_t slots,
         const PyDraw& draw) {
        AverageArgs a;
        a.n = sizes(n);
        a.z = vectors(z);
        a.indices = at<const int64_t>(indices);
        a.cosine = cosine;
        a.sums = at<float>(sums), a.slots = at<float>(slots);
        a.draw = slot_draw(draw);
        py::gil_scoped_release release;
        code_sums(a);
      },
      py::arg("sizes"), py::arg("z"), py::arg("indices"), py::kw_only(), py::arg("cosine"), py::arg("sums"),
      py::arg("slots"), py::arg("draw"));
  module.def(
      "ema_apply",
      [](const PySizes& n, uintptr_t codebook, uintptr_t cluster_size, uintptr_t embed_avg, uintptr_t sums,
         uintptr_t slots, bool cosine, const PyNumbers& numbers) {
        AverageArgs a;
        a.n = sizes(n);
        a.cosine = cosine;
        a.sums = at<float>(sums), a.slots = at<float>(slots);
        set_state(a, codebook, cluster_size, embed_avg, numbers);
        py::gil_scoped_release release;
        ema_apply(a);
      },
      py::arg("sizes"), py::arg("codebook"), py::arg("cluster_size"), py::arg("embed_avg"), py::arg("sums"),
      py::arg("slots"), py::kw_only(), py::arg("cosine"), py::arg("numbers"));
  module.def(
      "min_distance_update",
      [](uintptr_t z, uintptr_t centre, uintptr_t distance, int64_t count, int64_t size) {
        py::gil_scoped_release release;
        min_distance_update(at<const float>(z), at<const float>(centre), at<float>(distance), count, size);
      },
      py::arg("z"), py::arg("centre"), py::arg("distance"), py::arg("count"), py::arg("size"));
}

}  // namespace genfast
