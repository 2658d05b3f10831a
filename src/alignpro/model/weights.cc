#include "alignpro/model/weights.h"

namespace alignpro::model {

int64_t Weights::bytes() const {
  int64_t total = embedding.bytes() + own_head.bytes();
  for (const LayerWeights& layer : layers) {
    for (const ops::PackedMatrix& linear : layer.linears) total += linear.bytes();
  }
  return total;
}

int64_t Weights::streamed_bytes() const {
  return bytes() - (config.tied_head ? 0 : embedding.bytes());
}

Weights Weights::load(const Checkpoint& checkpoint, ThreadPool& pool, ops::Arithmetic arithmetic) {
  Weights weights;
  const ModelConfig& config = weights.config = checkpoint.config();
  weights.embedding =
      ops::PackedMatrix::pack(checkpoint.embedding_rows(), config.hidden_size, pool,
                              config.tied_head ? arithmetic : ops::Arithmetic::kFloat32);
  if (!config.tied_head) {
    weights.own_head =
        ops::PackedMatrix::pack(checkpoint.head_rows(), config.hidden_size, pool, arithmetic);
  }
  weights.final_norm = checkpoint.read_final_norm();
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  for (int64_t l = 0; l < config.num_layers; ++l) {
    LayerWeights& layer = weights.layers[static_cast<size_t>(l)];
    for (const LinearSite site : kLinearSites) {
      layer.linears[static_cast<size_t>(site)] = ops::PackedMatrix::pack(
          checkpoint.linear_rows(l, site), linear_shape(config, site).inputs, pool, arithmetic);
    }
    layer.attention_norm = checkpoint.read_norm(l, NormSite::kAttention);
    layer.mlp_norm = checkpoint.read_norm(l, NormSite::kMlp);
    layer.qkv_bias = checkpoint.read_qkv_bias(l);
    if (config.qk_norm) {
      layer.q_norm = checkpoint.read_norm(l, NormSite::kQ);
      layer.k_norm = checkpoint.read_norm(l, NormSite::kK);
    }
  }
  return weights;
}

}  // namespace alignpro::model
