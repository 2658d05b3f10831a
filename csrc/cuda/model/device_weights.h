#pragma once

// A checkpoint on the device: every matrix in one dtype, bfloat16 or float32. Stored formats are
// expanded exactly and rounded once where the dtype cannot hold them.

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "../fast_linear.h"
#include "alignpro/core/parallel.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/config.h"
#include "matrix_store.h"

namespace alignpro::cuda {

struct DeviceLayer {
  std::array<Matrix, 4> linears;  // by LinearSite
  const void *attention_norm, *mlp_norm;
  const void *qkv_bias, *q_norm, *k_norm;  // null where the family has none
};

class DeviceWeights {
 public:
  // Throws Unavailable without a GPU or the memory, InvalidArgument for a dtype or a shape that the
  // ops do not take, before anything is copied.
  DeviceWeights(const model::Checkpoint& checkpoint, DType dtype, int64_t context_length,
                ThreadTeam& team, std::shared_ptr<const FastLibrary> fast);

  const model::ModelConfig config;
  const int64_t context_length;
  const DType dtype;
  const int device;
  const std::shared_ptr<const FastLibrary> fast;  // what multiplies by them; null: linear

  Matrix embedding, head;  // one where they are tied
  std::vector<DeviceLayer> layers;
  const void* final_norm = nullptr;
  const float *cos = nullptr, *sin = nullptr;  // [context_length, rotary_dim / 2]

  AttentionShape attention() const;
  int64_t bytes() const { return bytes_; }
  // Read once by a step whatever its batch: all but an embedding that is not the head.
  int64_t streamed_bytes() const;
  int64_t kv_block_bytes() const;

 private:
  MatrixStore store_;
  int64_t bytes_ = 0;  // without the angles
};

}  // namespace alignpro::cuda
