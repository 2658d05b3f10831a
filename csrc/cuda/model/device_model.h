#pragma once

// A model whose decoder layers run on a GPU, by the ops of ops.h: the engine's LanguageModel, and
// what DeviceScore scores and trains with.

#include <cstdint>
#include <memory>

#include "alignpro/engine/language_model.h"
#include "device_adapter.h"
#include "device_weights.h"
#include "score_memory.h"

namespace alignpro::cuda {

class DeviceModel final : public engine::LanguageModel {
 public:
  // compute: kBF16 or kF32, of weights, activations and KV alike (sums are float32). `threads`
  // convert the file; context_length as model::Model::load. Throws as DeviceWeights.
  static std::shared_ptr<DeviceModel> load(const model::ModelFiles& files, DType compute,
                                           int64_t context_length, int threads, const Mode& mode);
  static std::shared_ptr<DeviceModel> from(const model::Checkpoint& checkpoint, DType compute,
                                           int64_t context_length, int threads,
                                           const Mode& mode = {});

  const model::ModelConfig& config() const override { return weights_->config; }
  int64_t context_length() const override { return weights_->context_length; }
  int64_t kv_block_bytes() const override { return weights_->kv_block_bytes(); }
  int64_t kv_share_bytes() const override;  // half of the device's free memory
  std::unique_ptr<engine::Session> make_session(int64_t kv_blocks) const override;

  const DeviceWeights& weights() const { return *weights_; }

  DeviceAdapters& adapters() const { return *adapters_; }
  ScoreStagingPool& score_staging() const { return *score_staging_; }

 private:
  explicit DeviceModel(std::shared_ptr<const DeviceWeights> weights);

  std::shared_ptr<const DeviceWeights> weights_;
  std::shared_ptr<DeviceAdapters> adapters_;
  std::unique_ptr<ScoreStagingPool> score_staging_ = std::make_unique<ScoreStagingPool>();
};

}  // namespace alignpro::cuda
