#pragma once

// Models for bodies of tests that run on every device: on the CPU in an executable of their own, on
// an emulated GPU in device_model_test (ALIGNPRO_EMULATED_DEVICE), in every dtype that it computes
// in.

#include <cstring>
#include <memory>
#include <vector>

#include "alignpro/model/model.h"
#include "random_checkpoint.h"
#if defined(ALIGNPRO_EMULATED_DEVICE)
#include "device_models.h"
#endif

namespace alignpro::model {

#if defined(ALIGNPRO_EMULATED_DEVICE)
// Two layers say what three do. Under the address sanitizer, where fibers take twenty times as
// long, float32 alone, and a race is looked for twice.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr int kRounds = 2;
#else
inline constexpr int kRounds = 8;
#endif
inline std::vector<std::shared_ptr<const Model>> on_the_device(const ModelConfig& config) {
  const ModelConfig shape = wide(small(config.qkv_bias, config.qk_norm, config.fused_projections));
  std::vector<std::shared_ptr<const Model>> models = {device_model(shape)};
#if !defined(__SANITIZE_ADDRESS__)
  models.push_back(device_model(shape, DType::kBF16));
#endif
  return models;
}
#else
inline constexpr int kRounds = 8;
inline std::vector<std::shared_ptr<const Model>> on_the_device(const ModelConfig& config) {
  return {cpu_model(config), cpu_model(config, 2, ops::Arithmetic::kFloat32, DType::kF16)};
}
#endif

// Of these, what has gradients.
inline std::vector<std::shared_ptr<const Model>> trainable(const ModelConfig& config) {
  auto models = on_the_device(config);
  std::erase_if(models,
                [](const auto& model) { return model->device().kv_dtype() == DType::kF16; });
  return models;
}

inline bool equal_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace alignpro::model
