#include "bind.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/core/trace.h"

namespace py = pybind11;
namespace trace = alignpro::trace;

namespace {

trace::Level level_of(const std::string& name) {
  if (name == "steps") return trace::Level::kSteps;
  if (name == "ops") return trace::Level::kOps;
  throw alignpro::InvalidArgument(
      alignpro::cat("level: expected \"steps\" or \"ops\", got \"", name, "\""));
}

// One field of every event.
template <typename Field>
auto column(const std::vector<trace::Event>& events, const Field& field) {
  using Value = decltype(field(events.front()));
  py::array_t<Value> out(static_cast<py::ssize_t>(events.size()));
  std::transform(events.begin(), events.end(), out.mutable_data(), field);
  return out;
}

}  // namespace

void bind_trace(py::module_& m) {
  m.def(
      "trace_start",
      [](const std::string& level, int64_t limit) { trace::start(level_of(level), limit); },
      py::arg("level"), py::arg("limit") = trace::kEventLimit);
  m.def("trace_stop", [] {
    const trace::Recording recording = trace::stop();
    const std::vector<trace::Event>& events = recording.events;
    std::vector<std::string> names;
    const auto name_index = [&names](const trace::Event& event) {
      const auto at = std::find(names.begin(), names.end(), event.name) - names.begin();
      if (at == static_cast<std::ptrdiff_t>(names.size())) names.emplace_back(event.name);
      return static_cast<int32_t>(at);
    };
    py::dict out;
    out["name"] = column(events, name_index);
    out["begin_ns"] = column(events, [](const trace::Event& e) { return e.begin_ns; });
    out["end_ns"] = column(events, [](const trace::Event& e) { return e.end_ns; });
    out["thread"] = column(events, [](const trace::Event& e) { return e.thread; });
    out["rows"] = column(events, [](const trace::Event& e) { return e.counts.rows; });
    out["flops"] = column(events, [](const trace::Event& e) { return e.counts.flops; });
    out["bytes"] = column(events, [](const trace::Event& e) { return e.counts.bytes; });
    out["key"] = column(events, [](const trace::Event& e) { return e.counts.key; });
    py::list known;
    for (const std::string& name : names) known.append(name);
    out["names"] = known;
    out["dropped"] = recording.dropped;
    return out;
  });
}
