#include "bind_model.h"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/facts.h"
#include "alignpro/model/model.h"
#include "alignpro/model/score_bytes.h"
#include "alignpro/model/scorer.h"
#include "array.h"
#include "bind_files.h"
#include "bind_score.h"
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

DType kv_dtype_from(const std::string& name) {
  if (name == "float32") return DType::kF32;
  require(name == "float16", "kv_dtype: expected \"float32\" or \"float16\", got \"", name, "\"");
  return DType::kF16;
}

}  // namespace

namespace alignpro::bindings {

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

py::dict lora_shapes(const model::ModelConfig& config) {
  py::dict shapes;
  for (const model::LoraModule& module : model::lora_modules(config)) {
    shapes[py::str(module.path)] = py::make_tuple(module.outputs, module.inputs);
  }
  return shapes;
}

std::shared_ptr<model::Adapter> make_adapter(const model::ModelConfig& config,
                                             const py::dict& matrices, float scale) {
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
  const GilRelease release;
  return std::make_shared<model::Adapter>(config, views, scale);
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
  return result;
}

}  // namespace alignpro::bindings

namespace {

py::dict describe_model(const model::Model& model) {
  py::dict d = describe(model.config(), model.context_length());
  d["device"] = "cpu";
  d["threads"] = model.pool().size();
  d["weight_bytes"] = model.weights().bytes();
  d["compute"] = model.weights().head().arithmetic() == ops::Arithmetic::kInt8 ? "int8" : "float32";
  d["kv_dtype"] = model.kv_dtype() == DType::kF16 ? "float16" : "float32";
  d["streamed_bytes"] = model.weights().streamed_bytes();
  return d;
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

// Of a score with gradients, by an adapter of one rank on these modules.
int64_t facts_score_bytes(const model::ModelFacts& facts,
                          const std::vector<std::vector<int32_t>>& sequences,
                          const std::vector<int64_t>& starts,
                          const std::vector<std::string>& modules, int64_t rank,
                          bool with_reference, const std::string& activations, int64_t threads) {
  const GilRelease release;
  require(starts.size() == sequences.size(), "score_bytes: expected a start for each of ",
          sequences.size(), " sequences, got ", starts.size());
  model::ScoreShape shape{.starts = starts,
                          .with_reference = with_reference,
                          .keep_graph = true,
                          .activations = activations_from(activations),
                          .threads = threads};
  shape.sequences.assign(sequences.begin(), sequences.end());
  shape.layer_ranks.resize(static_cast<size_t>(facts.config().num_layers));
  const std::set<std::string> chosen(modules.begin(), modules.end());
  for (const model::LoraModule& module : model::lora_modules(facts.config())) {
    if (chosen.contains(module.path)) shape.layer_ranks[static_cast<size_t>(module.layer)] += rank;
  }
  return model::score_bytes(facts.config(), facts.plan_head(), shape);
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<model::Adapter, std::shared_ptr<model::Adapter>>(m, "Adapter")
      .def_property_readonly("rank", &model::Adapter::max_rank)
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
           py::arg("activations") = "keep", py::arg("threads") = 1);
  m.def(
      "describe",
      [](const py::object& files) {
        const model::ModelFiles opened = files_from(files);
        const GilRelease release;
        return model::ModelFacts(opened);
      },
      py::arg("files"));

  bind_score<model::Score>(m, "Score");

  py::class_<model::Model, std::shared_ptr<model::Model>> of(m, "Model");
  of.def_property_readonly("config", &describe_model)
      .def_static(
          "load",
          [](const py::object& files, int threads, int64_t context_length,
             const std::string& compute, const std::string& kv_dtype) {
            const ops::Arithmetic arithmetic = arithmetic_from(compute);
            const DType kv = kv_dtype_from(kv_dtype);
            const model::ModelFiles opened = files_from(files);
            const GilRelease release;
            return model::Model::load(opened, threads, context_length, arithmetic, kv);
          },
          py::arg("files"), py::arg("threads") = 0, py::arg("context_length") = 0,
          py::arg("compute") = "float32", py::arg("kv_dtype") = "float32")
      .def("lora_modules", [](const model::Model& self) { return lora_shapes(self.config()); })
      .def(
          "make_adapter",
          [](const model::Model& self, const py::dict& matrices, float scale) {
            return make_adapter(self.config(), matrices, scale);
          },
          py::arg("matrices"), py::arg("scale"));
  bind_scoring<model::Score>(of);
}
