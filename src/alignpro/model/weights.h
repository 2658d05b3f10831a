#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "alignpro/core/parallel.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/config.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::model {

inline constexpr std::array<LinearSite, 4> kLinearSites = {LinearSite::kQkv, LinearSite::kO,
                                                           LinearSite::kGateUp, LinearSite::kDown};

struct LayerWeights {
  std::array<ops::PackedMatrix, 4> linears;  // by LinearSite
  std::vector<float> attention_norm;         // [hidden]
  std::vector<float> mlp_norm;               // [hidden]
  std::vector<float> qkv_bias;               // [qkv_size] or empty
  std::vector<float> q_norm, k_norm;         // [head_dim] or empty

  const ops::PackedMatrix& linear(LinearSite site) const {
    return linears[static_cast<size_t>(site)];
  }
};

// A checkpoint packed once, in the formats it is stored in. The head is the embedding where they
// are tied.
struct Weights {
  ModelConfig config;
  ops::PackedMatrix embedding;  // [vocab, hidden]
  ops::PackedMatrix own_head;   // [vocab, hidden]; empty when tied
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  // [hidden]

  const ops::PackedMatrix& head() const { return config.tied_head ? embedding : own_head; }
  int64_t bytes() const;
  // Read once by a step whatever its batch: all but an embedding that is not the head.
  int64_t streamed_bytes() const;

  static Weights load(const Checkpoint& checkpoint, ThreadPool& pool,
                      ops::Arithmetic arithmetic = ops::Arithmetic::kFloat32);
};

}  // namespace alignpro::model
