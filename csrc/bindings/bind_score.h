#pragma once

// Scores and what makes them, alike on every device: model::Model with model::Score,
// cuda::DeviceModel with cuda::DeviceScore.

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/model/scorer.h"
#include "array.h"
#include "gil.h"

namespace alignpro::bindings {

model::Activations activations_from(const std::string& name);
py::dict gradients_to_dict(const model::Adapter& adapter, const model::AdapterGradients& gradients);

template <typename Score>
void bind_score(py::module_& m, const char* name) {
  const auto or_none = [](const std::vector<float>& values, bool there) {
    return there ? py::object(to_array(values)) : py::object(py::none());
  };
  py::class_<Score>(m, name)
      .def_property_readonly("logprob", [](const Score& s) { return to_array(s.logprob()); })
      .def_property_readonly("entropy", [](const Score& s) { return to_array(s.entropy()); })
      .def_property_readonly(
          "kl", [or_none](const Score& s) { return or_none(s.kl(), s.has_reference()); })
      .def_property_readonly(
          "reference_logprob",
          [or_none](const Score& s) { return or_none(s.reference_logprob(), s.has_reference()); })
      .def_property_readonly("hidden",
                             [](const Score& s) -> py::object {
                               if (!s.has_hidden()) return py::none();
                               const auto values = static_cast<int64_t>(s.logprob().size());
                               return to_array(s.hidden(), values, s.hidden_size());
                             })
      .def(
          "backward",
          [](Score& s, const py::object& d_logprob, const py::object& d_entropy,
             const py::object& d_kl) {
            const auto lp = float_vector(d_logprob, "d_logprob");
            const auto entropy = float_vector(d_entropy, "d_entropy");
            const auto kl = float_vector(d_kl, "d_kl");
            const auto adapter = s.adapter();
            std::optional<model::AdapterGradients> gradients;
            {
              const GilRelease release;
              gradients = s.backward(lp, entropy, kl);
            }
            return gradients_to_dict(*adapter, *gradients);
          },
          py::arg("d_logprob"), py::arg("d_entropy") = py::none(), py::arg("d_kl") = py::none());
}

// score and score_bytes of a model.
template <typename Score, typename Model>
void bind_scoring(py::class_<Model, std::shared_ptr<Model>>& of) {
  of.def(
        "score",
        [](std::shared_ptr<Model> self, std::vector<std::vector<int32_t>> sequences,
           std::vector<int64_t> starts, std::shared_ptr<model::Adapter> adapter, float temperature,
           std::shared_ptr<model::Adapter> reference, bool with_reference, bool keep_graph,
           const std::string& activations, bool with_hidden) {
          const GilRelease release;
          model::ScoreRequest request{.sequences = std::move(sequences),
                                      .starts = std::move(starts),
                                      .adapter = std::move(adapter),
                                      .temperature = temperature,
                                      .with_reference = with_reference,
                                      .reference = std::move(reference),
                                      .with_hidden = with_hidden,
                                      .keep_graph = keep_graph,
                                      .activations = activations_from(activations)};
          return std::make_unique<Score>(std::move(self), std::move(request));
        },
        py::arg("sequences"), py::arg("starts"), py::arg("adapter") = nullptr,
        py::arg("temperature") = 1.0f, py::arg("reference") = nullptr,
        py::arg("with_reference") = false, py::arg("keep_graph") = false,
        py::arg("activations") = "keep", py::arg("with_hidden") = false)
      .def(
          "score_bytes",
          [](const Model& self, std::vector<std::vector<int32_t>> sequences,
             std::vector<int64_t> starts, std::shared_ptr<model::Adapter> adapter,
             bool with_reference, bool keep_graph, const std::string& activations,
             bool with_hidden) {
            const GilRelease release;
            return Score::bytes(self, {.sequences = std::move(sequences),
                                       .starts = std::move(starts),
                                       .adapter = std::move(adapter),
                                       .with_reference = with_reference,
                                       .with_hidden = with_hidden,
                                       .keep_graph = keep_graph,
                                       .activations = activations_from(activations)});
          },
          py::arg("sequences"), py::arg("starts"), py::arg("adapter") = nullptr,
          py::arg("with_reference") = false, py::arg("keep_graph") = false,
          py::arg("activations") = "keep", py::arg("with_hidden") = false);
}

}  // namespace alignpro::bindings
