#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/model/layer.h"
#include "alignpro/model/model.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

// What one engine holds of a Model: the pool of KV blocks, and one set of buffers, as large as the
// largest step. The model outlives it.
class ModelSession final : public Session {
 public:
  ModelSession(const Model& model, int64_t kv_blocks);
  ~ModelSession() override;

  void copy_slots(int64_t from, int64_t to, int64_t slots) override;
  void forward(const Batch& batch) override;
  void draw(std::span<const ops::SampleRow> rows) override;
  bool ready() const override;
  void collect(std::span<ops::SampledToken> out) override;

 private:
  // [rows, ...] each, in one piece.
  struct Buffers {
    ops::Matrix stream, hidden;  // hidden [outputs, hidden_size]
    ops::Matrix sums;            // [sums, hidden_size]
    LayerActivations layer;      // between attention and MLP it is the stream
    void* attention = nullptr;
    int64_t bytes = 0;
  };

  Buffers cut(void* base, int64_t most_ranks, int64_t sums) const;
  void compute(const Buffers& buffers, std::span<const LoraRange> ranges);
  void wait();

  const Model& model_;
  const std::unique_ptr<ops::Ops> ops_;
  KvPool kv_;
  const std::unique_ptr<ops::Plan> plan_;
  const std::unique_ptr<ops::Sampler> sampler_;
  ops::Buffer plan_memory_, memory_;
  ops::Matrix hidden_;      // of the last forward, to be drawn from
  bool under_way_ = false;  // the device may still read what is staged and what is held
  std::vector<std::shared_ptr<const DeviceAdapter>> held_;
};

}  // namespace alignpro::model
