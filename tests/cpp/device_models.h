#pragma once

// Small models on a device that is the CPU (tests/emulated), and texts for them.

#include <cstdint>
#include <memory>
#include <vector>

#include <doctest/doctest.h>
#include "cuda/device_ops.h"
#include "random_checkpoint.h"

// Fibers under the address sanitizer take twenty times as long: some of the tests do there.
#if defined(__SANITIZE_ADDRESS__)
#define SLOW_TEST(name) [[maybe_unused]] static void name()
#else
#define SLOW_TEST(name) TEST_CASE(#name)
#endif

namespace alignpro::model {

using Tokens = std::vector<int32_t>;

inline Tokens text(int64_t size, int32_t start) {
  Tokens tokens;
  for (int64_t i = 0; i < size; ++i) {
    tokens.push_back(static_cast<int32_t>((start + i * 31) % 111));
  }
  return tokens;
}

inline ModelConfig small(bool bias, bool qk_norm, bool fused, int64_t window = 0) {
  model::ModelConfig config = tiny(bias, qk_norm, fused);
  config.num_layers = 2;
  config.sliding_window = window;
  return config;
}

// Shapes whose rows are whole 16 bytes in bfloat16.
inline ModelConfig wide(ModelConfig config) {
  config.intermediate_size = 56;
  config.head_dim = config.rope.rotary_dim = 16;
  return config;
}

inline std::shared_ptr<const Model> device_model(const ModelConfig& config,
                                                 DType compute = DType::kF32,
                                                 bool deterministic = true) {
  return Model::from(RandomCheckpoint(config), cuda::make_device(compute, deterministic, 1), 0);
}

}  // namespace alignpro::model
