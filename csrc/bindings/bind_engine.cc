#include "bind.h"

#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/core/fork.h"
#include "alignpro/engine/client.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/mixture.h"
#include "alignpro/model/model.h"
#include "gil.h"

namespace py = pybind11;
using alignpro::require_not_forked_in_call;
using alignpro::bindings::GilRelease;

using namespace alignpro::engine;
using alignpro::model::Adapter;
using alignpro::model::Mixture;
using alignpro::model::Model;

namespace {

using NoGil = py::call_guard<GilRelease>;

bool on_main_thread() {
  const py::module_ threading = py::module_::import("threading");
  return threading.attr("current_thread")().is(threading.attr("main_thread")());
}

// Ctrl-C between steps: Python runs signal handlers on its main thread only, and only there is the
// GIL taken for it. Called without the GIL.
void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::object finish_reason(const Sequence& sequence) {
  if (!sequence.finished()) return py::none();
  return py::str(std::string(alignpro::engine::finish_reason_name(sequence.finish_reason())));
}

// The lock of a sequence is one that a fork may leave held.
Output read(const Sequence& sequence, size_t begin) {
  require_not_forked_in_call();
  return sequence.read(begin);
}

py::object matched_stop(const Sequence& sequence) {
  const auto match = sequence.stop_match();
  if (!match) return py::none();
  return py::str(sequence.request().params.stop[match->index]);
}

void bind_sampling_params(py::module_& m) {
  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init([](float temperature, int32_t top_k, float top_p, float min_p,
                       int64_t max_new_tokens, int64_t min_new_tokens, uint64_t seed,
                       uint32_t sample, std::vector<std::string> stop,
                       std::vector<int32_t> stop_token_ids, bool ignore_eos,
                       float repetition_penalty, float presence_penalty, float frequency_penalty,
                       double deadline_seconds) {
             SamplingParams params{{temperature, top_k, top_p, min_p},
                                   max_new_tokens,
                                   min_new_tokens,
                                   seed,
                                   sample,
                                   std::move(stop_token_ids),
                                   std::move(stop),
                                   ignore_eos,
                                   repetition_penalty,
                                   presence_penalty,
                                   frequency_penalty,
                                   deadline_seconds};
             validate(params);
             return params;
           }),
           py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
           py::arg("min_p"), py::arg("max_new_tokens"), py::arg("min_new_tokens"), py::arg("seed"),
           py::arg("sample"), py::arg("stop"), py::arg("stop_token_ids"), py::arg("ignore_eos"),
           py::arg("repetition_penalty"), py::arg("presence_penalty"), py::arg("frequency_penalty"),
           py::arg("deadline_seconds"))
      .def_property_readonly("penalises", &alignpro::engine::penalises);
}

void bind_sequence(py::module_& m) {
  py::class_<Sequence, std::shared_ptr<Sequence>>(m, "Sequence")
      .def_property_readonly("tokens", [](const Sequence& s) { return read(s, 0).tokens; })
      .def_property_readonly("logprobs", [](const Sequence& s) { return read(s, 0).logprobs; })
      .def_property_readonly("kept_mass", [](const Sequence& s) { return read(s, 0).kept_mass; })
      .def_property_readonly("prompt_tokens", [](const Sequence& s) { return s.request().prompt; })
      .def_property_readonly("finished", &Sequence::finished)
      .def_property_readonly("finish_reason", &finish_reason)
      .def_property_readonly("matched_stop", &matched_stop)
      .def("cancel", &Sequence::cancel)
      .def("raise_error",
           [](const Sequence& s) {
             if (const auto error = s.error()) std::rethrow_exception(error);
           })
      .def(
          "read",
          [](const Sequence& s, size_t begin) {
            auto output = read(s, begin);
            return std::pair(std::move(output.tokens), std::move(output.logprobs));
          },
          py::arg("begin"));
}

void bind_mixture(py::module_& m) {
  using Member = std::pair<std::shared_ptr<Adapter>, double>;
  py::class_<Mixture, std::shared_ptr<Mixture>>(m, "Mixture")
      .def(py::init([](const std::vector<Member>& pairs) {
             std::vector<Mixture::Member> members;
             for (const auto& [adapter, weight] : pairs) members.push_back({adapter, weight});
             return Mixture(members);
           }),
           py::arg("members"))
      .def_property_readonly("lanes", [](const Mixture& mixture) {
        py::list lanes;  // Python knows no const
        for (const auto& lane : mixture.lanes()) {
          lanes.append(py::make_tuple(std::const_pointer_cast<Adapter>(lane.adapter), lane.weight));
        }
        return lanes;
      });
}

void bind_client(py::module_& m) {
  const auto submit = [](Client& client, std::vector<int32_t> tokens, const SamplingParams& params,
                         Mixture of) {
    require_not_forked_in_call();
    return client.submit(std::move(tokens), params, std::move(of));
  };
  py::class_<Client, std::shared_ptr<Client>>(m, "Client")
      .def(py::init<std::shared_ptr<Engine>>(), py::arg("engine").none(false))
      .def(
          "submit",
          [submit](Client& client, std::vector<int32_t> tokens, const SamplingParams& params,
                   std::shared_ptr<Adapter> adapter) {
            return submit(client, std::move(tokens), params, std::move(adapter));
          },
          py::arg("tokens"), py::arg("params"), py::arg("adapter") = py::none())
      .def("submit", submit, py::arg("tokens"), py::arg("params"), py::arg("adapter"))
      .def("step", &Client::step, NoGil())
      .def("launch", &Client::launch, NoGil())
      .def("run",
           [](Client& client) {
             const std::function<void()> poll =
                 on_main_thread() ? check_signals : std::function<void()>();
             const GilRelease no_gil;
             client.run(poll);
           })
      .def("cancel", &Client::cancel, NoGil())
      .def("idle", &Client::idle);
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_sampling_params(m);
  bind_sequence(m);
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](std::shared_ptr<Model> model, int64_t kv_cache_bytes, int64_t max_batch_rows,
                       bool prefix_cache, bool lookup) {
             const EngineOptions options{kv_cache_bytes, max_batch_rows, prefix_cache, lookup};
             return std::make_shared<Engine>(std::move(model), options);
           }),
           py::arg("model").none(false), py::kw_only(), py::arg("kv_cache_bytes") = 0,
           py::arg("max_batch_rows") = 256, py::arg("prefix_cache") = true,
           py::arg("lookup") = true)
      .def("set_token_bytes", &Engine::set_token_bytes, py::arg("pieces"), NoGil())
      .def(
          "step", [](Engine& engine) { engine.step(); }, NoGil())
      .def("ready", &Engine::ready, NoGil())
      .def("idle", &Engine::idle, NoGil())
      .def("stats", [](const Engine& engine) {
        require_not_forked_in_call();
        const EngineStats stats = engine.stats();
        py::dict out;
        out["prefill_tokens"] = stats.prefill_tokens;
        out["cached_tokens"] = stats.cached_tokens;
        out["decode_tokens"] = stats.decode_tokens;
        out["drafted_tokens"] = stats.drafted_tokens;
        out["accepted_tokens"] = stats.accepted_tokens;
        out["steps"] = stats.steps;
        out["kv_blocks_in_use"] = stats.kv_blocks_in_use;
        out["kv_blocks_cached"] = stats.kv_blocks_cached;
        out["kv_blocks_capacity"] = stats.kv_blocks_capacity;
        return out;
      });
  bind_mixture(m);
  bind_client(m);
}
