#include "alignpro/model/weights.h"

#include <cmath>

#include "alignpro/model/rope_angles.h"

namespace alignpro::model {
namespace {

ops::ModelShape shape_of(const ModelConfig& c) {
  int64_t values = c.vocab_size * c.hidden_size * (c.tied_head ? 1 : 2);
  for (const LinearSite site : kLinearSites) {
    const LinearShape shape = linear_shape(c, site);
    values += c.num_layers * shape.outputs * shape.inputs;
  }
  return {c.hidden_size, c.intermediate_size, c.head_dim, c.vocab_size, values};
}

}  // namespace

int64_t Weights::bytes() const {
  int64_t total = embedding->bytes + (own_head == nullptr ? 0 : own_head->bytes);
  for (const LayerWeights& layer : layers) {
    for (const auto& linear : layer.linears) total += linear->bytes;
  }
  return total;
}

int64_t Weights::streamed_bytes() const {
  return bytes() - (config.tied_head ? 0 : embedding->bytes);
}

Weights Weights::load(const Checkpoint& checkpoint, ops::Device& device, int64_t context_length) {
  using Use = ops::Device::Use;
  Weights weights;
  const ModelConfig& config = weights.config = checkpoint.config();
  device.require_runs(shape_of(config));
  weights.embedding = device.upload("embedding", checkpoint.embedding_rows(), config.hidden_size,
                                    config.tied_head ? Use::kProduct : Use::kTable);
  if (!config.tied_head) {
    weights.own_head =
        device.upload("head", checkpoint.head_rows(), config.hidden_size, Use::kProduct);
  }
  weights.final_norm = device.upload(checkpoint.read_final_norm());
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  for (int64_t l = 0; l < config.num_layers; ++l) {
    LayerWeights& layer = weights.layers[static_cast<size_t>(l)];
    for (const LinearSite site : kLinearSites) {
      const auto s = static_cast<size_t>(site);
      layer.linears[s] = device.upload(kLinearNames[s], checkpoint.linear_rows(l, site),
                                       linear_shape(config, site).inputs, Use::kProduct);
    }
    layer.attention_norm = device.upload(checkpoint.read_norm(l, NormSite::kAttention));
    layer.mlp_norm = device.upload(checkpoint.read_norm(l, NormSite::kMlp));
    const std::vector<float> bias = checkpoint.read_qkv_bias(l);
    if (!bias.empty()) layer.qkv_bias = device.upload(bias);
    if (config.qk_norm) {
      layer.q_norm = device.upload(checkpoint.read_norm(l, NormSite::kQ));
      layer.k_norm = device.upload(checkpoint.read_norm(l, NormSite::kK));
    }
  }
  const RopeAngles angles(config.rope, context_length);
  weights.rope = device.make_rope(context_length, angles.half(),
                                  [angles](std::span<const int32_t> positions, float* cos,
                                           float* sin) { angles.compute(positions, cos, sin); });
  device.finish_uploads();
  return weights;
}

ops::AttentionShape attention_shape(const ModelConfig& config) {
  return {config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim)))};
}

}  // namespace alignpro::model
