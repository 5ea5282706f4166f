// Python bindings of the family `token_sampling`: addresses, sizes and strides come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cpu/bindings.h"
#include "cpu/token_sampling.h"

namespace py = pybind11;

namespace genfast {
namespace {

using PyLogits = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, dtype code, strides of sequence and position
using PyIds = std::tuple<uintptr_t, int64_t>;                   // address, count

Logits logits(const std::optional<PyLogits>& given) {
  Logits l;
  if (given) {
    l.data = reinterpret_cast<const char*>(std::get<0>(*given));
    std::tie(std::ignore, l.dtype, l.sequence_stride, l.position_stride) = *given;
  }
  return l;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void sample(const PyLogits& cond, const std::optional<PyLogits>& uncond, float guidance, int64_t length, int64_t size,
            uintptr_t rows, int64_t count, bool shift, uintptr_t scales, float scale, uintptr_t temperatures,
            double temperature, int64_t top_k, uint64_t share, bool keep_crossing, const PyIds& suppress,
            const PyIds& suppress_confidence, uintptr_t noise, bool noise_is_float64, std::optional<int64_t> seed,
            uintptr_t seeds, bool seed_per_sequence, int64_t stream, int64_t offset, uintptr_t ids, int confidence,
            uintptr_t tokens, uintptr_t confidences, uintptr_t logsumexp, uintptr_t entropy, uintptr_t margin) {
  TokenArgs a;
  a.logits = logits(cond);
  a.uncond = logits(uncond);
  a.guidance = guidance;
  a.length = length;
  a.size = size;
  a.rows = at<const int64_t>(rows);
  a.count = count;
  a.shift = shift;
  a.scales = at<const float>(scales);
  a.scale = scale;
  a.temperatures = at<const double>(temperatures);
  a.temperature = temperature;
  a.top_k = top_k;
  a.share = share;
  a.keep_crossing = keep_crossing;
  a.suppress = at<const int64_t>(std::get<0>(suppress));
  a.suppress_count = std::get<1>(suppress);
  a.suppress_confidence = at<const int64_t>(std::get<0>(suppress_confidence));
  a.suppress_confidence_count = std::get<1>(suppress_confidence);
  a.noise = at<const char>(noise);
  a.noise_is_float64 = noise_is_float64;
  a.philox = seed.has_value() || seeds != 0;
  a.seed = seed.value_or(0);
  a.seeds = at<const int64_t>(seeds);
  a.seed_per_sequence = seed_per_sequence;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  a.ids = at<const int64_t>(ids);
  a.confidence = confidence;
  a.tokens = at<int64_t>(tokens);
  a.confidences = at<float>(confidences);
  a.logsumexp = at<float>(logsumexp);
  a.entropy = at<float>(entropy);
  a.margin = at<float>(margin);
  py::gil_scoped_release release;
  sample_tokens(a);
}

using PyPerRow = std::tuple<uintptr_t, int64_t>;  // address or 0, the number for all

PerRow per_row(const PyPerRow& given) { return PerRow{at<const int64_t>(std::get<0>(given)), std::get<1>(given)}; }

void select(uintptr_t confidence, uintptr_t mask, uintptr_t out, int64_t confidence_stride, int64_t mask_stride,
            int64_t batch, int64_t length, const PyPerRow& n, const PyPerRow& start, const PyPerRow& end, int strategy,
            float threshold, float low_threshold, float slack, bool strict, double factor, bool accept_last,
            double bound, bool inclusive, double temperature, int64_t seed, uintptr_t seeds, bool seed_per_sequence,
            int64_t stream, int64_t offset) {
  SelectArgs a;
  a.confidence = at<const float>(confidence);
  a.mask = at<const uint8_t>(mask);
  a.out = at<uint8_t>(out);
  a.confidence_stride = confidence_stride;
  a.mask_stride = mask_stride;
  a.batch = batch;
  a.length = length;
  a.n = per_row(n);
  a.start = per_row(start);
  a.end = per_row(end);
  a.strategy = strategy;
  a.threshold = threshold;
  a.low_threshold = low_threshold;
  a.slack = slack;
  a.strict = strict;
  a.factor = factor;
  a.accept_last = accept_last;
  a.bound = bound;
  a.inclusive = inclusive;
  a.temperature = temperature;
  a.seed = seed;
  a.seeds = at<const int64_t>(seeds);
  a.seed_per_sequence = seed_per_sequence;
  a.stream = (uint32_t)stream;
  a.offset = (uint32_t)offset;
  py::gil_scoped_release release;
  select_transfer(a);
}

void write(uintptr_t x, uintptr_t tokens, uintptr_t selected, int64_t x_stride, int64_t tokens_stride,
           int64_t selected_stride, int64_t batch, int64_t length, int64_t mask_id, std::optional<int64_t> eos_id,
           uintptr_t left, uintptr_t finished) {
  CommitArgs a;
  a.x = at<int64_t>(x);
  a.tokens = at<const int64_t>(tokens);
  a.selected = at<const uint8_t>(selected);
  a.x_stride = x_stride;
  a.tokens_stride = tokens_stride;
  a.selected_stride = selected_stride;
  a.batch = batch;
  a.length = length;
  a.mask_id = mask_id;
  a.has_eos = eos_id.has_value();
  a.eos_id = eos_id.value_or(0);
  a.left = at<int64_t>(left);
  a.finished = at<uint8_t>(finished);
  py::gil_scoped_release release;
  commit(a);
}

using PyPerSequence = std::tuple<uintptr_t, double>;       // address or 0, the number for all
using PyStates = std::tuple<uintptr_t, int64_t, int64_t>;  // address, strides of sequence and position

PerSequence per_sequence(const PyPerSequence& given) {
  return PerSequence{at<const double>(std::get<0>(given)), std::get<1>(given)};
}

template <class T>
States<T> states(const PyStates& given) {
  return States<T>{at<T>(std::get<0>(given)), std::get<1>(given), std::get<2>(given)};
}

void transition(const PyStates& x, const PyStates& out, const PyStates& active, const PyLogits& output, int64_t batch,
                int64_t length, int64_t size, int law, const PyPerSequence& a, const PyPerSequence& b,
                std::optional<int64_t> mask_id, float scale, uint64_t share, bool keep_crossing, uintptr_t noise,
                bool noise_is_float64, int64_t noise_width, int64_t seed, uintptr_t seeds, bool seed_per_sequence,
                int64_t stream, int64_t offset, uintptr_t ids, uintptr_t changed) {
  TransitionArgs args;
  args.x = states<const int64_t>(x);
  args.out = states<int64_t>(out);
  args.active = states<const uint8_t>(active);
  args.output = logits(output);
  args.batch = batch;
  args.length = length;
  args.size = size;
  args.law = law;
  args.a = per_sequence(a);
  args.b = per_sequence(b);
  args.masked_only = mask_id.has_value();
  args.mask_id = mask_id.value_or(0);
  args.scale = scale;
  args.share = share;
  args.keep_crossing = keep_crossing;
  args.noise = at<const char>(noise);
  args.noise_is_float64 = noise_is_float64;
  args.noise_width = noise_width;
  args.seed = seed;
  args.seeds = at<const int64_t>(seeds);
  args.seed_per_sequence = seed_per_sequence;
  args.stream = (uint32_t)stream;
  args.offset = (uint32_t)offset;
  args.ids = at<const int64_t>(ids);
  args.changed = at<uint8_t>(changed);
  py::gil_scoped_release release;
  discrete_transition(args);
}

}  // namespace

void register_token_sampling(py::module_& module) {
  module.def("sample_tokens", &sample, py::arg("logits"), py::kw_only(), py::arg("uncond"), py::arg("guidance"),
             py::arg("length"), py::arg("size"), py::arg("rows"), py::arg("count"), py::arg("shift"), py::arg("scales"),
             py::arg("scale"), py::arg("temperatures"), py::arg("temperature"), py::arg("top_k"), py::arg("share"),
             py::arg("keep_crossing"), py::arg("suppress"), py::arg("suppress_confidence"), py::arg("noise"),
             py::arg("noise_is_float64"), py::arg("seed"), py::arg("seeds"), py::arg("seed_per_sequence"),
             py::arg("stream"), py::arg("offset"), py::arg("ids"), py::arg("confidence"), py::arg("tokens"),
             py::arg("confidences"), py::arg("logsumexp"), py::arg("entropy"), py::arg("margin"));
  module.def("select_transfer", &select, py::arg("confidence"), py::arg("mask"), py::arg("out"),
             py::arg("confidence_stride"), py::arg("mask_stride"), py::arg("batch"), py::arg("length"), py::arg("n"),
             py::arg("start"), py::arg("end"), py::arg("strategy"), py::arg("threshold"), py::arg("low_threshold"),
             py::arg("slack"), py::arg("strict"), py::arg("factor"), py::arg("accept_last"), py::arg("bound"),
             py::arg("inclusive"), py::arg("temperature"), py::arg("seed"), py::arg("seeds"),
             py::arg("seed_per_sequence"), py::arg("stream"), py::arg("offset"));
  module.def("commit", &write, py::arg("x"), py::arg("tokens"), py::arg("selected"), py::arg("x_stride"),
             py::arg("tokens_stride"), py::arg("selected_stride"), py::arg("batch"), py::arg("length"),
             py::arg("mask_id"), py::arg("eos_id"), py::arg("left"), py::arg("finished"));
  module.def("discrete_transition", &transition, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("active"),
             py::arg("output"), py::arg("batch"), py::arg("length"), py::arg("size"), py::arg("law"), py::arg("a"),
             py::arg("b"), py::arg("mask_id"), py::arg("scale"), py::arg("share"), py::arg("keep_crossing"),
             py::arg("noise"), py::arg("noise_is_float64"), py::arg("noise_width"), py::arg("seed"), py::arg("seeds"),
             py::arg("seed_per_sequence"), py::arg("stream"), py::arg("offset"), py::arg("ids"), py::arg("changed"));
}

}  // namespace genfast
