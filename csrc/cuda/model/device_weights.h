#pragma once

// A checkpoint on the device: every matrix in one dtype, bfloat16 or float32. Stored formats are
// expanded exactly and rounded once where the dtype cannot hold them.

#include <array>
#include <cstdint>
#include <memory>
#include <string>
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

// How the layers multiply. Strict: by linear, a row's bits are its own, and sampled and scored
// log-probabilities are equal. Fast: by cuBLASLt (fast_linear.h), and they are not.
struct Mode {
  bool fast = false;
  std::vector<std::string> library_folders = {};  // where cuBLASLt may lie, beside the loader's
};

class DeviceWeights {
 public:
  // Throws Unavailable without a GPU, the memory or what the mode needs, InvalidArgument for a
  // dtype or a shape that the ops do not take, before anything is copied.
  DeviceWeights(const model::Checkpoint& checkpoint, DType dtype, int64_t context_length,
                ThreadPool& pool, const Mode& mode);

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
  // One of `count` in a pool whose blocks lie in one piece each,
  // [count][kv head][K, V][16][head_dim].
  PagedKv kv_layer(void* pool, int64_t count, int64_t layer) const;

 private:
  MatrixStore store_;
  int64_t bytes_ = 0;  // without the angles
};

}  // namespace alignpro::cuda
