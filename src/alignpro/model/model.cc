#include "alignpro/model/model.h"

#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/trace.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/op_counts.h"
#include "alignpro/model/transformer.h"
#include "alignpro/ops/embedding.h"
#include "alignpro/ops/rms_norm.h"

namespace alignpro::model {
Model::Model(Weights weights, std::unique_ptr<ThreadPool> pool, int64_t context_length,
             DType kv_dtype)
    : weights_(std::move(weights)),
      context_length_(context_length),
      kv_dtype_(kv_dtype),
      rope_(weights_.config.rope, context_length),
      pool_(std::move(pool)) {}

std::shared_ptr<Model> Model::load(const ModelFiles& files, int threads, int64_t context_length,
                                   ops::Arithmetic arithmetic, DType kv_dtype) {
  return from(*Checkpoint::open(files), threads, context_length, arithmetic, kv_dtype);
}

std::shared_ptr<Model> Model::from(const Checkpoint& checkpoint, int threads,
                                   int64_t context_length, ops::Arithmetic arithmetic,
                                   DType kv_dtype) {
  require(kv_dtype == DType::kF32 || kv_dtype == DType::kF16, "kv_dtype: expected F32 or F16, got ",
          dtype_name(kv_dtype));
  const int64_t context = choose_context(checkpoint.config(), context_length);
  auto pool = std::make_unique<ThreadPool>(threads);
  Weights weights = Weights::load(checkpoint, *pool, arithmetic);
  return std::shared_ptr<Model>(new Model(std::move(weights), std::move(pool), context, kv_dtype));
}

void Model::forward(const Batch& batch, KvPool& kv, float* hidden) const {
  const ModelConfig& config = weights_.config;
  const int64_t rows = batch.rows(), width = config.hidden_size;
  // One set of buffers a driving thread, as large as its largest batch.
  struct Workspace {
    AlignedBuffer stream, cos, sin;
    LayerActivations activations;
    LayerScratch scratch;
  };
  thread_local Workspace own;
  float* stream = own.stream.reserve(rows * width);
  float* cos = own.cos.reserve(rows * rope_.half());
  float* sin = own.sin.reserve(rows * rope_.half());
  rope_.compute(batch.positions, cos, sin);
  trace::Span op(trace::Level::kOps, "embedding",
                 [&] { return embedding_counts(rows, weights_.embedding); });
  ops::embedding(weights_.embedding, batch.tokens, stream, *pool_);
  op.end();
  const ops::AttentionPlan plan(attention_shape(config), batch.segments, pool_->size());
  const PassContext pass{weights_, plan, batch.kv_writes, batch.adapters, rows, cos, sin, *pool_};
  for (int64_t l = 0; l < config.num_layers; ++l) {
    layer_forward(pass, l, stream, stream, kv.layer(l), own.activations, own.scratch);
  }
  op.begin(trace::Level::kOps, "rms_norm",
           [&] { return rms_norm_counts(static_cast<int64_t>(batch.output_rows.size()), width); });
  for (size_t i = 0; i < batch.output_rows.size(); ++i) {
    ops::rms_norm(1, width, stream + batch.output_rows[i] * width, width,
                  weights_.final_norm.data(), static_cast<float>(config.rms_eps),
                  hidden + static_cast<int64_t>(i) * width, width, nullptr, *pool_);
  }
}

void Model::sample(const float* hidden, std::span<const ops::SampleRow> rows,
                   std::span<ops::SampledToken> out) const {
  const trace::Span op(trace::Level::kOps, "head_sample", [&] {
    return head_sample_counts(static_cast<int64_t>(rows.size()), weights_.head());
  });
  ops::head_sample(weights_.head(), hidden, rows, out, *pool_);
}

}  // namespace alignpro::model
