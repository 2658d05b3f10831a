#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "alignpro/core/dtype.h"
#include "alignpro/core/parallel.h"
#include "alignpro/model/batch.h"
#include "alignpro/model/config.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/model/rope_angles.h"
#include "alignpro/model/transformer.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/head_sample.h"

namespace alignpro::model {

// Base weights, constant after load, with the thread pool that computes on them. The engine and the
// scorer both run the same layers; there is one definition of every number (contract 1).
class Model {
 public:
  // `threads` 0: available_cpus(). `context_length` 0: the model's own (for longrope, the positions
  // of pre-training; a larger value selects the long factors for every position). Keys and values
  // are held as kv_dtype, kF32 or kF16, in sampling and scoring alike; kF16 has no gradients.
  static std::shared_ptr<Model> load(const ModelFiles& files, int threads, int64_t context_length,
                                     ops::Arithmetic arithmetic = ops::Arithmetic::kFloat32,
                                     DType kv_dtype = DType::kF32);
  static std::shared_ptr<Model> from(const Checkpoint& checkpoint, int threads,
                                     int64_t context_length,
                                     ops::Arithmetic arithmetic = ops::Arithmetic::kFloat32,
                                     DType kv_dtype = DType::kF32);

  const ModelConfig& config() const { return weights_.config; }
  const Weights& weights() const { return weights_; }
  const RopeAngles& rope() const { return rope_; }
  ThreadPool& pool() const { return *pool_; }
  int64_t context_length() const { return context_length_; }
  DType kv_dtype() const { return kv_dtype_; }
  ScoreBufferPool& score_buffers() const { return *score_buffers_; }

  // Runs the batch, writing K and V into `kv` and the final (normed) hidden states of
  // batch.output_rows into hidden [output_rows, hidden_size]. A row's bits depend on its own
  // sequence alone (contract 2).
  void forward(const Batch& batch, KvPool& kv, float* hidden) const;

  // Draws one token for each hidden row; see ops::head_sample.
  void sample(const float* hidden, std::span<const ops::SampleRow> rows,
              std::span<ops::SampledToken> out) const;

 private:
  Model(Weights weights, std::unique_ptr<ThreadPool> pool, int64_t context_length, DType kv_dtype);

  Weights weights_;
  int64_t context_length_;
  DType kv_dtype_;
  RopeAngles rope_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<ScoreBufferPool> score_buffers_ = std::make_unique<ScoreBufferPool>();
};

}  // namespace alignpro::model
