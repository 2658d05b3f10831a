#include "alignpro/model/facts.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/model/config_readers.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/cpu_ops.h"

namespace alignpro::model {
namespace {

// Anything that ends in .safetensors is the business of the reader of weights.
bool holds_weights(const ModelFiles& files) {
  if (files.gguf() != nullptr) return true;
  std::error_code ignored;
  const std::filesystem::directory_iterator folder(files.path(), ignored);
  return std::ranges::any_of(folder, [](const std::filesystem::directory_entry& entry) {
    return entry.path().extension() == ".safetensors" ||
           entry.path().filename() == "model.safetensors.index.json";
  });
}

std::vector<ops::QuantizedRow> assumed_rows(int64_t count) {
  return std::vector<ops::QuantizedRow>(static_cast<size_t>(count), {nullptr, DType::kBF16});
}

}  // namespace

ModelFacts::ModelFacts(const ModelFiles& files) {
  if (holds_weights(files)) {
    checkpoint_ = Checkpoint::open(files);
    config_ = checkpoint_->config();
  } else {
    config_ = read_config(files);
  }
}

int64_t ModelFacts::layer_parameters() const {
  int64_t layer = 0;
  for (const LinearSite site : kLinearSites) {
    const LinearShape shape = linear_shape(config_, site);
    layer += shape.outputs * shape.inputs;
  }
  return config_.num_layers * layer;
}

ops::PackedMatrix ModelFacts::plan_head(ops::Arithmetic arithmetic) const {
  return ops::PackedMatrix::plan(
      has_weights() ? checkpoint_->head_rows() : assumed_rows(config_.vocab_size),
      config_.hidden_size, arithmetic);
}

int64_t ModelFacts::score_bytes(const ScoreRequest& request,
                                const std::vector<std::string>& modules, int64_t rank, int64_t rows,
                                int threads) const {
  require(rows >= 0, "score_bytes: num_rows: expected 0 or more, got ", rows);
  const auto device = ops::make_cpu_device(threads);
  Weights weights;
  weights.config = config_;
  auto head = ops::planned_weight(plan_head(ops::Arithmetic::kFloat32));
  (config_.tied_head ? weights.embedding : weights.own_head) = std::move(head);
  weights.rope = device->make_rope(0, config_.rope.rotary_dim / 2, nullptr);
  weights.local_rope = device->make_rope(0, config_.local_rope.rotary_dim / 2, nullptr);
  DeviceAdapter::Sites sites(static_cast<size_t>(config_.num_layers));
  std::vector<std::array<int64_t, 4>> ranks(sites.size());
  for (const LoraModule& module : lora_modules(config_)) {
    if (std::ranges::find(modules, module.path) == modules.end()) continue;
    ranks[static_cast<size_t>(module.layer)][static_cast<size_t>(module.site)] += rank;
  }
  for (size_t l = 0; l < sites.size(); ++l) {
    for (size_t s = 0; s < sites[l].size(); ++s) {
      if (ranks[l][s] == 0) continue;
      auto lora = std::make_unique<ops::LoraWeight>();
      lora->ranks = ranks[l][s];
      sites[l][s] = std::move(lora);
    }
  }
  auto soft = rows == 0 ? nullptr : std::make_unique<ops::SoftRows>();
  if (soft != nullptr) soft->matrix = {nullptr, rows, config_.hidden_size, config_.hidden_size};
  ScoreBuffers buffers(*device, weights);
  return Score::bytes(weights, *device, buffers, request,
                      std::make_shared<const DeviceAdapter>(0, std::move(sites), std::move(soft)),
                      nullptr);
}

ModelFacts::Bytes ModelFacts::bytes(ops::Arithmetic arithmetic) const {
  Bytes bytes;
  for (int64_t l = 0; l < config_.num_layers; ++l) {
    for (const LinearSite site : kLinearSites) {
      const LinearShape shape = linear_shape(config_, site);
      const auto rows =
          has_weights() ? checkpoint_->linear_rows(l, site) : assumed_rows(shape.outputs);
      bytes.layers += ops::PackedMatrix::plan(rows, shape.inputs, arithmetic).bytes();
    }
  }
  bytes.head = plan_head(arithmetic).bytes();
  if (!config_.tied_head) {
    const auto rows =
        has_weights() ? checkpoint_->embedding_rows() : assumed_rows(config_.vocab_size);
    bytes.embedding = ops::PackedMatrix::plan(rows, config_.hidden_size).bytes();
  }
  return bytes;
}

ModelFacts::Bytes ModelFacts::bytes(DType dtype) const {
  require(block_values(dtype) == 1, "facts: expected a type of single numbers, got ",
          dtype_name(dtype));
  const int64_t size = block_bytes(dtype);
  return {.layers = size * layer_parameters(),
          .head = size * head_parameters(),
          .embedding = config_.tied_head ? 0 : size * head_parameters()};
}

}  // namespace alignpro::model
