#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "alignpro/model/checkpoint.h"
#include "alignpro/model/config.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

inline constexpr std::array<LinearSite, 4> kLinearSites = {LinearSite::kQkv, LinearSite::kO,
                                                           LinearSite::kGateUp, LinearSite::kDown};

// By LinearSite.
inline constexpr std::array<const char*, 4> kLinearNames = {"linear qkv", "linear o",
                                                            "linear gate_up", "linear down"};

// Vectors are in the device's dtype; null where the family has none.
struct LayerWeights {
  std::array<std::unique_ptr<const ops::Weight>, 4> linears;                // by LinearSite
  const void* attention_norm = nullptr;                                     // [hidden]
  const void* mlp_norm = nullptr;                                           // [hidden]
  const void *attention_output_norm = nullptr, *mlp_output_norm = nullptr;  // [hidden]
  const void* qkv_bias = nullptr;                                           // [qkv_size]
  const void *q_norm = nullptr, *k_norm = nullptr;                          // [head_dim]

  const ops::Weight& linear(LinearSite site) const { return *linears[static_cast<size_t>(site)]; }
};

// A checkpoint on a device, which keeps its memory. The head is the embedding where they are tied.
struct Weights {
  ModelConfig config;
  std::unique_ptr<const ops::Weight> embedding;  // [vocab, hidden]
  std::unique_ptr<const ops::Weight> own_head;   // [vocab, hidden]; null when tied
  std::vector<LayerWeights> layers;
  const void* final_norm = nullptr;                   // [hidden]
  std::unique_ptr<const ops::Rope> rope, local_rope;  // local_rope: where there are local layers
  float embedding_scale = 1.0f;

  const ops::Weight& head() const { return config.tied_head ? *embedding : *own_head; }
  int64_t bytes() const;
  // Read once by a step whatever its batch: all but an embedding that is not the head.
  int64_t streamed_bytes() const;

  // Throws where the device cannot run such a model, before anything is uploaded.
  static Weights load(const Checkpoint& checkpoint, ops::Device& device, int64_t context_length);
};

// By ModelConfig::attention_kind().
std::vector<ops::AttentionKind> attention_kinds(const Weights& weights);

}  // namespace alignpro::model
