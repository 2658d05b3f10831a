#include "bind.h"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/facts.h"
#include "alignpro/model/model.h"
#include "alignpro/model/score.h"
#include "alignpro/ops/cpu_ops.h"
#include "array.h"
#include "cuda/device_ops.h"
#include "gil.h"

namespace py = pybind11;
using namespace alignpro;
using namespace alignpro::bindings;

namespace {

ops::Arithmetic arithmetic_from(const std::string& name) {
  if (name == "float32") return ops::Arithmetic::kFloat32;
  require(name == "int8", "compute: expected \"float32\" or \"int8\", got \"", name, "\"");
  return ops::Arithmetic::kInt8;
}

// Checks what each device takes before it makes one.
std::unique_ptr<ops::Device> device_from(const std::string& name,
                                         const std::optional<std::string>& compute,
                                         const std::optional<std::string>& kv_dtype,
                                         bool deterministic, int threads,
                                         const std::vector<std::string>& library_folders) {
  if (name == "cuda") {
    const std::string wanted = compute.value_or("bfloat16");
    require(wanted == "bfloat16" || wanted == "float32",
            "compute: expected \"bfloat16\" or \"float32\" on device cuda, got \"", wanted, "\"");
    require(!kv_dtype || *kv_dtype == wanted, "kv_dtype: on device cuda it is compute's, \"",
            wanted, "\", got \"", kv_dtype.value_or(""), "\"");
    return cuda::make_device(wanted == "bfloat16" ? DType::kBF16 : DType::kF32, deterministic,
                             threads, library_folders);
  }
  require(name == "cpu", "device: expected \"cpu\" or \"cuda\", got \"", name, "\"");
  const std::string wanted = compute.value_or("float32"), kv = kv_dtype.value_or("float32");
  const ops::Arithmetic arithmetic = arithmetic_from(wanted);
  require(kv == "float32" || kv == "float16",
          "kv_dtype: expected \"float32\" or \"float16\", got \"", kv, "\"");
  require(deterministic, "deterministic: device cpu always is, got false");
  return ops::make_cpu_device(threads, arithmetic, kv == "float16" ? DType::kF16 : DType::kF32);
}

const char* kv_dtype_name(DType dtype) {
  if (dtype == DType::kBF16) return "bfloat16";
  return dtype == DType::kF16 ? "float16" : "float32";
}

py::dict describe(const model::ModelConfig& c, int64_t context_length) {
  py::dict d;
  d["family"] = std::string(model::family_name(c.family));
  d["vocab_size"] = c.vocab_size;
  d["hidden_size"] = c.hidden_size;
  d["intermediate_size"] = c.intermediate_size;
  d["num_layers"] = c.num_layers;
  d["num_heads"] = c.num_heads;
  d["num_kv_heads"] = c.num_kv_heads;
  d["head_dim"] = c.head_dim;
  d["context_length"] = context_length;
  d["bos_id"] = c.bos_id >= 0 ? py::object(py::int_(c.bos_id)) : py::object(py::none());
  d["eos_ids"] = c.eos_ids;
  d["tied_head"] = c.tied_head;
  return d;
}

py::dict describe_model(const model::Model& model) {
  const ops::Device& device = model.device();
  py::dict d = describe(model.config(), model.context_length());
  d["device"] = device.name();
  d["threads"] = device.threads();
  d["compute"] = device.compute();
  d["kv_dtype"] = kv_dtype_name(device.kv_dtype());
  d["deterministic"] = device.deterministic();
  d["weight_bytes"] = model.weights().bytes();
  d["streamed_bytes"] = model.weights().streamed_bytes();
  d["embedding_scale"] = model.weights().embedding_scale;
  return d;
}

py::dict lora_shapes(const model::ModelConfig& config) {
  py::dict shapes;
  for (const model::LoraModule& module : model::lora_modules(config)) {
    shapes[py::str(module.path)] = py::make_tuple(module.outputs, module.inputs);
  }
  return shapes;
}

std::shared_ptr<model::Adapter> make_adapter(const model::ModelConfig& config,
                                             const py::dict& matrices, float scale,
                                             const py::object& rows) {
  std::map<std::string, model::LoraMatrices> views;
  std::vector<py::array> alive;
  std::map<std::string, const model::LoraModule*> known;
  const std::vector<model::LoraModule> modules = model::lora_modules(config);
  for (const model::LoraModule& m : modules) known[m.path] = &m;
  for (const auto& [key, value] : matrices) {
    const auto path = key.cast<std::string>();
    require(py::isinstance<py::tuple>(value) && py::len(value) == 2, "adapter: '", path,
            "' expects a pair (A, B)");
    const auto pair = py::reinterpret_borrow<py::tuple>(value);
    const py::array a = float_array(pair[0], path + ".A", 2);
    const py::array b = float_array(pair[1], path + ".B", 2);
    if (const auto found = known.find(path); found != known.end()) {
      const model::LoraModule& m = *found->second;
      require(a.shape(1) == m.inputs && b.shape(0) == m.outputs && a.shape(0) == b.shape(1),
              "adapter: '", path, "' expects A [r, ", m.inputs, "] and B [", m.outputs,
              ", r], got [", a.shape(0), ", ", a.shape(1), "] and [", b.shape(0), ", ", b.shape(1),
              "]");
    }
    views[path] = {a.shape(0), static_cast<const float*>(a.data()),
                   static_cast<const float*>(b.data())};
    alive.push_back(a);
    alive.push_back(b);
  }
  std::span<const float> soft_rows;
  if (!rows.is_none()) {
    const py::array given = alive.emplace_back(float_array(rows, "adapter: rows", 2));
    require(given.shape(0) >= 1 && given.shape(1) == config.hidden_size,
            "adapter: rows: expected shape [1 or more, ", config.hidden_size, "], got [",
            given.shape(0), ", ", given.shape(1), "]");
    soft_rows = {static_cast<const float*>(given.data()), static_cast<size_t>(given.size())};
  }
  const GilRelease release;
  return std::make_shared<model::Adapter>(config, views, scale, soft_rows);
}

model::Activations activations_from(const std::string& name) {
  if (name == "keep") return model::Activations::kKeep;
  require(name == "recompute", "activations: expected \"keep\" or \"recompute\", got \"", name,
          "\"");
  return model::Activations::kRecompute;
}

py::dict gradients_to_dict(const model::Adapter& adapter,
                           const model::AdapterGradients& gradients) {
  py::dict result;
  for (size_t i = 0; i < gradients.modules.size(); ++i) {
    const model::Adapter::Module& m = adapter.modules()[i];
    result[py::str(m.where.path)] =
        py::make_tuple(to_array(gradients.modules[i].a, m.rank, m.where.inputs),
                       to_array(gradients.modules[i].b, m.where.outputs, m.rank));
  }
  if (const int64_t rows = adapter.num_rows(); rows > 0) {
    result["rows"] = to_array(gradients.soft_rows, rows, std::ssize(gradients.soft_rows) / rows);
  }
  return result;
}

py::dict matrix_bytes(const model::ModelFacts& facts, const std::string& device,
                      const std::string& compute) {
  require(device == "cpu" || device == "cuda", "device: expected \"cpu\" or \"cuda\", got \"",
          device, "\"");
  const auto bytes = [&] {
    if (device == "cpu") return facts.bytes(arithmetic_from(compute));
    require(compute == "bfloat16" || compute == "float32",
            "compute: expected \"bfloat16\" or \"float32\" on device cuda, got \"", compute, "\"");
    return facts.bytes(compute == "bfloat16" ? DType::kBF16 : DType::kF32);
  }();
  py::dict d;
  d["layers"] = bytes.layers;
  d["head"] = bytes.head;
  d["embedding"] = bytes.embedding;
  return d;
}

// Of a score with gradients, by an adapter of one rank on these modules and of soft rows.
int64_t facts_score_bytes(const model::ModelFacts& facts,
                          std::vector<std::vector<int32_t>> sequences, std::vector<int64_t> starts,
                          const std::vector<std::string>& modules, int64_t rank,
                          bool with_reference, const std::string& activations, int threads,
                          int64_t num_rows) {
  const GilRelease release;
  require(starts.size() == sequences.size(), "score_bytes: expected a start for each of ",
          sequences.size(), " sequences, got ", starts.size());
  return facts.score_bytes({.sequences = std::move(sequences),
                            .starts = std::move(starts),
                            .with_reference = with_reference,
                            .keep_graph = true,
                            .activations = activations_from(activations)},
                           modules, rank, num_rows, threads);
}

void bind_score(py::module_& m) {
  const auto or_none = [](const std::vector<float>& values, bool there) {
    return there ? py::object(to_array(values)) : py::object(py::none());
  };
  py::class_<model::Score>(m, "Score")
      .def_property_readonly("logprob", [](const model::Score& s) { return to_array(s.logprob()); })
      .def_property_readonly("entropy", [](const model::Score& s) { return to_array(s.entropy()); })
      .def_property_readonly(
          "kl", [or_none](const model::Score& s) { return or_none(s.kl(), s.has_reference()); })
      .def_property_readonly("reference_logprob",
                             [or_none](const model::Score& s) {
                               return or_none(s.reference_logprob(), s.has_reference());
                             })
      .def_property_readonly("hidden",
                             [](const model::Score& s) -> py::object {
                               if (!s.has_hidden()) return py::none();
                               const auto values = static_cast<int64_t>(s.logprob().size());
                               return to_array(s.hidden(), values, s.hidden_size());
                             })
      .def(
          "backward",
          [](model::Score& s, const py::object& d_logprob, const py::object& d_entropy,
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

// score and score_bytes.
void bind_scoring(py::class_<model::Model, std::shared_ptr<model::Model>>& of) {
  of.def(
        "score",
        [](std::shared_ptr<model::Model> self, std::vector<std::vector<int32_t>> sequences,
           std::vector<int64_t> starts, std::shared_ptr<model::Adapter> adapter, float temperature,
           std::shared_ptr<model::Adapter> reference, bool with_reference, bool keep_graph,
           const std::string& activations, bool with_hidden, const py::object& reference_hidden,
           const py::object& given_hidden) {
          const auto states_of = [](const py::object& given, const char* name) {
            if (given.is_none()) return std::vector<float>();
            const py::array rows = float_array(given, name, 2);
            const auto* first = static_cast<const float*>(rows.data());
            return std::vector<float>(first, first + rows.size());
          };
          std::vector<float> states = states_of(reference_hidden, "reference_hidden");
          std::vector<float> own = states_of(given_hidden, "given_hidden");
          const GilRelease release;
          model::ScoreRequest request{.sequences = std::move(sequences),
                                      .starts = std::move(starts),
                                      .adapter = std::move(adapter),
                                      .temperature = temperature,
                                      .with_reference = with_reference,
                                      .reference = std::move(reference),
                                      .reference_hidden = std::move(states),
                                      .given_hidden = std::move(own),
                                      .with_hidden = with_hidden,
                                      .keep_graph = keep_graph,
                                      .activations = activations_from(activations)};
          return std::make_unique<model::Score>(std::move(self), std::move(request));
        },
        py::arg("sequences"), py::arg("starts"), py::arg("adapter") = nullptr,
        py::arg("temperature") = 1.0f, py::arg("reference") = nullptr,
        py::arg("with_reference") = false, py::arg("keep_graph") = false,
        py::arg("activations") = "keep", py::arg("with_hidden") = false,
        py::arg("reference_hidden") = py::none(), py::arg("given_hidden") = py::none())
      .def(
          "score_bytes",
          [](const model::Model& self, std::vector<std::vector<int32_t>> sequences,
             std::vector<int64_t> starts, std::shared_ptr<model::Adapter> adapter,
             bool with_reference, bool keep_graph, const std::string& activations,
             bool with_hidden) {
            const GilRelease release;
            return model::Score::bytes(self, {.sequences = std::move(sequences),
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

}  // namespace

void bind_model(py::module_& m) {
  py::class_<model::Adapter, std::shared_ptr<model::Adapter>>(m, "Adapter")
      .def_property_readonly("rank", &model::Adapter::max_rank)
      .def_property_readonly("num_rows", &model::Adapter::num_rows)
      .def_property_readonly("modules", [](const model::Adapter& adapter) {
        std::vector<std::string> paths;
        for (const auto& module : adapter.modules()) paths.push_back(module.where.path);
        return paths;
      });

  py::class_<model::ModelFacts>(m, "ModelFacts")
      .def_property_readonly("config",
                             [](const model::ModelFacts& f) {
                               return describe(f.config(), model::choose_context(f.config(), 0));
                             })
      .def_property_readonly("has_weights", &model::ModelFacts::has_weights)
      .def_property_readonly("lora_modules",
                             [](const model::ModelFacts& f) { return lora_shapes(f.config()); })
      .def_property_readonly("layer_parameters", &model::ModelFacts::layer_parameters)
      .def_property_readonly("head_parameters", &model::ModelFacts::head_parameters)
      .def_property_readonly("kv_elements", &model::ModelFacts::kv_elements)
      .def("matrix_bytes", &matrix_bytes, py::arg("device") = "cpu", py::arg("compute") = "float32")
      .def("score_bytes", &facts_score_bytes, py::arg("sequences"), py::arg("starts"),
           py::arg("modules"), py::arg("rank"), py::arg("with_reference") = false,
           py::arg("activations") = "keep", py::arg("threads") = 1, py::arg("num_rows") = 0);
  m.def(
      "describe",
      [](const py::object& files) {
        const model::ModelFiles opened = files_from(files);
        const GilRelease release;
        return model::ModelFacts(opened);
      },
      py::arg("files"));

  bind_score(m);

  py::class_<model::Model, std::shared_ptr<model::Model>> of(m, "Model");
  of.def_property_readonly("config", &describe_model)
      .def_static(
          "load",
          [](const py::object& files, const std::string& device,
             const std::optional<std::string>& compute, const std::optional<std::string>& kv_dtype,
             bool deterministic, int threads, int64_t context_length,
             const std::vector<std::string>& library_folders) {
            const auto open = [&] {
              const GilRelease release;
              return device_from(device, compute, kv_dtype, deterministic, threads,
                                 library_folders);
            };
            auto made = open();
            const model::ModelFiles opened = files_from(files);
            const GilRelease release;
            return model::Model::load(opened, std::move(made), context_length);
          },
          py::arg("files"), py::kw_only(), py::arg("device") = "cpu",
          py::arg("compute") = py::none(), py::arg("kv_dtype") = py::none(),
          py::arg("deterministic") = true, py::arg("threads") = 0, py::arg("context_length") = 0,
          py::arg("library_folders") = std::vector<std::string>())
      .def("lora_modules", [](const model::Model& self) { return lora_shapes(self.config()); })
      .def(
          "make_adapter",
          [](const model::Model& self, const py::dict& matrices, float scale,
             const py::object& rows) { return make_adapter(self.config(), matrices, scale, rows); },
          py::arg("matrices"), py::arg("scale"), py::arg("rows") = py::none());
  bind_scoring(of);
}
