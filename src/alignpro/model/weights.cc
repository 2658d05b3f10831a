#include "alignpro/model/weights.h"

#include <array>
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

// sqrt(hidden_size), as a number of the type that the embedding is stored in: transformers' in a
// model of that type, with which it was trained. Of quantised tables a float32, as in llama.cpp.
float scale_of_embedding(const ModelConfig& config, DType stored) {
  if (!config.scaled_embedding) return 1.0f;
  auto scale = static_cast<float>(std::sqrt(static_cast<double>(config.hidden_size)));
  if (stored != DType::kBF16 && stored != DType::kF16) return scale;
  std::array<std::byte, 2> rounded;
  round_values(stored, &scale, 1, rounded.data());
  dequantize(stored, rounded.data(), 1, &scale);
  return scale;
}

std::unique_ptr<const ops::Rope> load_rope(const RopeConfig& config, ops::Device& device,
                                           int64_t context_length) {
  const RopeAngles angles(config, context_length);
  return device.make_rope(context_length, angles.half(),
                          [angles](std::span<const int32_t> positions, float* cos, float* sin) {
                            angles.compute(positions, cos, sin);
                          });
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
  const std::vector<ops::QuantizedRow> embedding = checkpoint.embedding_rows();
  weights.embedding = device.upload("embedding", embedding, config.hidden_size,
                                    config.tied_head ? Use::kProduct : Use::kTable);
  weights.embedding_scale = scale_of_embedding(config, embedding.front().dtype);
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
    if (config.output_norms) {
      layer.attention_output_norm =
          device.upload(checkpoint.read_norm(l, NormSite::kAttentionOutput));
      layer.mlp_output_norm = device.upload(checkpoint.read_norm(l, NormSite::kMlpOutput));
    }
    const std::vector<float> bias = checkpoint.read_qkv_bias(l);
    if (!bias.empty()) layer.qkv_bias = device.upload(bias);
    if (config.qk_norm) {
      layer.q_norm = device.upload(checkpoint.read_norm(l, NormSite::kQ));
      layer.k_norm = device.upload(checkpoint.read_norm(l, NormSite::kK));
    }
  }
  weights.rope = load_rope(config.rope, device, context_length);
  if (!config.local_layers.empty()) {
    weights.local_rope = load_rope(config.local_rope, device, context_length);
  }
  device.finish_uploads();
  return weights;
}

std::vector<ops::AttentionKind> attention_kinds(const Weights& weights) {
  const ModelConfig& c = weights.config;
  const double scalar = c.query_scalar > 0.0 ? c.query_scalar : static_cast<double>(c.head_dim);
  ops::AttentionShape shape{c.num_heads, c.num_kv_heads, c.head_dim, c.sliding_window,
                            static_cast<float>(1.0 / std::sqrt(scalar))};
  const bool local = !c.local_layers.empty();
  if (!local && c.unrotated_layers.empty()) return {{shape, weights.rope.get()}};
  ops::AttentionShape global = shape;
  if (local) global.sliding_window = 0;
  return {{global, weights.rope.get()}, {shape, weights.local_rope.get()}};
}

}  // namespace alignpro::model
