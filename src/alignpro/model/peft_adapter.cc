#include "alignpro/model/peft_adapter.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/io/json.h"
#include "alignpro/io/safetensors.h"
#include "alignpro/model/model_files.h"

namespace alignpro::model {
namespace {

using io::Json;

constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kTensors = "adapter_model.safetensors";

// Options that change neither what is in the file nor what is computed from it.
constexpr std::array<std::string_view, 19> kHarmless = {
    "auto_mapping",    "base_model_name_or_path", "bias",
    "exclude_modules", "inference_mode",          "init_lora_weights",
    "layers_pattern",  "layers_to_transform",     "lora_alpha",
    "lora_dropout",    "megatron_core",           "peft_type",
    "peft_version",    "qalora_group_size",       "r",
    "revision",        "runtime_config",          "target_modules",
    "task_type"};

bool is_unset(const Json& value) {
  return value.is_null() || (value.boolean() && !*value.boolean()) ||
         (value.array() && value.array()->empty()) || (value.object() && value.object()->empty()) ||
         (value.string() && value.string()->empty());
}

struct Scaled {
  int64_t rank;
  float scale;
};

Scaled read_config(const ModelFiles& files) {
  const std::string name = (files.path() / kConfig).string();
  const Json* config = files.json(kConfig);
  require<FileError>(config != nullptr, name,
                     ": no such file; expected the folder of a PEFT LoRA adapter");
  const auto text = [&](std::string_view key) {
    const Json* value = config->find(key);
    return value != nullptr && value->string() ? *value->string() : std::string();
  };
  require<FileError>(text("peft_type") == "LORA", name, ": peft_type: expected LORA, got ",
                     io::printable(text("peft_type")));
  require<FileError>(text("bias").empty() || text("bias") == "none", name,
                     ": bias: expected none, got ", io::printable(text("bias")));
  require<FileError>(text("init_lora_weights").empty(), name,
                     ": init_lora_weights = ", io::printable(text("init_lora_weights")),
                     " may change the base weights, which is not supported");
  for (const auto& [key, value] : *config->object()) {
    const bool known = key == "use_rslora" ||
                       std::ranges::find(kHarmless, std::string_view(key)) != kHarmless.end();
    require<FileError>(known || is_unset(value), name, ": ", io::printable(key),
                       " is set, which is not supported here; Python reads and saves again what "
                       "has one rank and scale");
  }
  const Json* rank = config->find("r");
  const Json* alpha = config->find("lora_alpha");
  require<FileError>(rank != nullptr && rank->integer() && *rank->integer() >= 1, name,
                     ": r: expected a rank of 1 or more");
  require<FileError>(alpha != nullptr && alpha->number() && *alpha->number() != 0.0, name,
                     ": lora_alpha: expected a number other than 0");
  const Json* rslora = config->find("use_rslora");
  require<FileError>(rslora == nullptr || rslora->is_null() || rslora->boolean(), name,
                     ": use_rslora: expected true or false");
  const auto r = static_cast<double>(*rank->integer());
  const bool root = rslora != nullptr && rslora->boolean() && *rslora->boolean();
  return {*rank->integer(), static_cast<float>(*alpha->number() / (root ? std::sqrt(r) : r))};
}

}  // namespace

void require_no_mixture(const std::filesystem::path& folder) {
  require<FileError>(!std::filesystem::exists(folder / "mixture.json") ||
                         std::filesystem::exists(folder / "adapter_config.json"),
                     folder.string(),
                     ": a mixture of adapters (mixture.json), which Python draws from; expected "
                     "the folder of one PEFT adapter");
}

std::shared_ptr<const Adapter> load_peft_adapter(const ModelConfig& config,
                                                 const std::filesystem::path& folder) {
  require_no_mixture(folder);
  const auto [rank, scale] = read_config(ModelFiles(folder));
  const io::SafetensorsFolder file(folder, {kTensors});
  const std::string name = (folder / kTensors).string();
  std::map<std::string, std::vector<float>> values;
  std::map<std::string, LoraMatrices> matrices;
  const auto take = [&](const std::string& key, std::array<int64_t, 2> shape) -> const float* {
    const auto found = file.tensors().find(key);
    if (found == file.tensors().end()) return nullptr;
    const io::FileTensor& tensor = found->second;
    require<FileError>(std::ranges::equal(tensor.shape, shape), name, ": ", key,
                       ": expected shape ", io::shape_text(shape), ", got ",
                       io::shape_text(tensor.shape));
    std::vector<float>& out = values[key];
    out.resize(static_cast<size_t>(shape[0] * shape[1]));
    dequantize(tensor.dtype, tensor.data.data(), shape[0] * shape[1], out.data());
    require<FileError>(std::ranges::all_of(out, [](float x) { return std::isfinite(x); }), name,
                       ": ", key, " holds NaN or infinity");
    return out.data();
  };
  for (const LoraModule& module : lora_modules(config)) {
    const std::string prefix = "base_model.model." + module.path;
    const float* a = take(prefix + ".lora_A.weight", {rank, module.inputs});
    const float* b = take(prefix + ".lora_B.weight", {module.outputs, rank});
    require<FileError>((a == nullptr) == (b == nullptr), name, ": ", module.path, ": lora_",
                       a == nullptr ? "A" : "B", " is missing");
    if (a != nullptr) matrices[module.path] = {rank, a, b};
  }
  for (const auto& [key, tensor] : file.tensors()) {
    require<FileError>(values.contains(key), name, ": unexpected tensor ", io::printable(key),
                       "; expected base_model.model.MODULE.lora_A.weight and lora_B.weight of "
                       "the model's modules alone");
  }
  require<FileError>(!matrices.empty(), name, ": holds no LoRA matrices");
  return std::make_shared<const Adapter>(config, matrices, scale);
}

}  // namespace alignpro::model
