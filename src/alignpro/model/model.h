#pragma once

#include <cstdint>
#include <memory>

#include "alignpro/core/buffer_pool.h"
#include "alignpro/model/language_model.h"
#include "alignpro/model/score_memory.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

// Base weights, constant after load, on the device that computes with them. Sessions and scores run
// the same layers; there is one definition of every number (contract 1).
class Model final : public LanguageModel {
 public:
  // `context_length` 0: the model's own (for longrope, the positions of pre-training; a larger
  // value selects the long factors for every position).
  static std::shared_ptr<Model> load(const ModelFiles& files, std::unique_ptr<ops::Device> device,
                                     int64_t context_length);
  static std::shared_ptr<Model> from(const Checkpoint& checkpoint,
                                     std::unique_ptr<ops::Device> device, int64_t context_length);

  const ModelConfig& config() const override { return weights_.config; }
  int64_t context_length() const override { return context_length_; }
  int64_t kv_block_bytes() const override;
  int64_t kv_share_bytes() const override;
  ops::RowCost row_cost() const override {
    return device_->deterministic() ? device_->row_cost() : ops::RowCost{1.0, false};
  }
  std::unique_ptr<Session> make_session(int64_t kv_blocks) const override;

  const Weights& weights() const { return weights_; }
  const ops::Device& device() const { return *device_; }
  BufferPool<ScoreBuffers>& score_buffers() const { return score_buffers_; }

 private:
  Model(std::unique_ptr<ops::Device> device, Weights weights, int64_t context_length);

  const std::unique_ptr<ops::Device> device_;
  const Weights weights_;
  const int64_t context_length_;
  mutable BufferPool<ScoreBuffers> score_buffers_;
};

}  // namespace alignpro::model
