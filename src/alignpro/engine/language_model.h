#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/dtype.h"
#include "alignpro/model/batch.h"
#include "alignpro/model/config.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/ops/head_sample.h"

namespace alignpro::engine {

// What the engine asks of a model: model::Model in production, a model that a reader can compute by
// hand in the engine's tests.
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  virtual const model::ModelConfig& config() const = 0;
  virtual int64_t context_length() const = 0;
  virtual DType kv_dtype() const { return DType::kF32; }  // of the pool that forward() is given

  // As model::Model::forward: writes the batch's KV and hidden [output_rows, hidden_size].
  virtual void forward(const model::Batch& batch, model::KvPool& kv, float* hidden) const = 0;

  // As model::Model::sample: one token for each hidden row.
  virtual void sample(const float* hidden, std::span<const ops::SampleRow> rows,
                      std::span<ops::SampledToken> out) const = 0;
};

}  // namespace alignpro::engine
