#include "alignpro/model/score_memory.h"

#include <algorithm>
#include <utility>

#include "alignpro/model/kv_pool.h"
#include "alignpro/model/score.h"

namespace alignpro::model {
namespace {

std::vector<std::span<const int32_t>> sequences_of(const ScoreRequest& request,
                                                   std::span<const int64_t> members) {
  std::vector<std::span<const int32_t>> sequences;
  for (const int64_t s : members) {
    sequences.emplace_back(request.sequences[static_cast<size_t>(s)]);
  }
  return sequences;
}

}  // namespace

ScoreTree::ScoreTree(const ScoreRequest& request, std::span<const int64_t> members)
    : tree_(sequences_of(request, members)),
      soft_rows_(request.keep_graph && request.adapter != nullptr ? request.adapter->num_rows()
                                                                  : 0) {
  for (size_t m = 0; m < members.size(); ++m) {
    const auto& sequence = request.sequences[static_cast<size_t>(members[m])];
    const auto size = static_cast<int64_t>(sequence.size());
    for (int64_t i = request.starts[static_cast<size_t>(members[m])]; i < size; ++i) {
      value_rows_.push_back(tree_.row(static_cast<int64_t>(m), i - 1));
      targets_.push_back(sequence[static_cast<size_t>(i)]);
    }
  }
}

ops::PlanRequest ScoreTree::plan_request() const {
  const Batch& batch = tree_.batch();
  return {.tokens = batch.tokens,
          .positions = batch.positions,
          .segments = batch.segments,
          .kv_writes = batch.kv_writes,
          .output_rows = value_rows_,
          .targets = targets_,
          .segment_rows = tree_.segment_rows(),
          .soft_rows = soft_rows_};
}

ScoreMemory::ScoreMemory(const Weights& weights, const ops::Device& device, const ops::Ops& ops,
                         const ops::Plan& plan, const ScoreRequest& request, const ScoreTree& tree,
                         std::shared_ptr<const DeviceAdapter> policy,
                         std::shared_ptr<const DeviceAdapter> reference)
    : weights_(weights),
      ops_(ops),
      plan_(plan),
      request_(request),
      tree_(tree),
      dtype_(device.dtype()),
      kv_dtype_(device.kv_dtype()),
      runs_reference_(request.runs_reference()),
      policy_(std::move(policy)),
      reference_(std::move(reference)) {}

bool ScoreMemory::keeps_layers() const {
  return request_.keep_graph && request_.activations == Activations::kKeep;
}

ScoreMemory::Ranks ScoreMemory::ranks(const DeviceAdapter* adapter, int64_t layer) const {
  Ranks ranks{};
  for (const LinearSite site : kLinearSites) {
    const ops::LoraWeight* lora = adapter == nullptr ? nullptr : adapter->update(layer, site);
    if (lora != nullptr) ranks[static_cast<size_t>(site)] = lora->ranks;
  }
  return ranks;
}

ScoreMemory::Ranks ScoreMemory::most_ranks() const {
  Ranks most{};
  for (int64_t l = 0; l < weights_.config.num_layers; ++l) {
    for (const DeviceAdapter* adapter : {policy_.get(), reference_.get()}) {
      const Ranks of_layer = ranks(adapter, l);
      for (size_t s = 0; s < most.size(); ++s) most[s] = std::max(most[s], of_layer[s]);
    }
  }
  return most;
}

int64_t ScoreMemory::kv_bytes() const {
  const ModelConfig& c = weights_.config;
  return tree_.blocks() * KvPool::block_bytes(1, c.num_kv_heads, c.head_dim, kv_dtype_);
}

void ScoreMemory::cut_kv(LayerActivations& layer, ops::Workspace& from) const {
  const ModelConfig& c = weights_.config;
  layer.kv =
      KvPool::layer_of(from.take<char>(kv_bytes()), 1, 0, c.num_kv_heads, c.head_dim, kv_dtype_);
}

LayerActivations ScoreMemory::cut_layer(ops::Workspace& from, const Ranks& ranks,
                                        bool with_raw) const {
  const ModelConfig& c = weights_.config;
  const int64_t rows = tree_.rows();
  LayerActivations a = cut_activations(from, c, rows, dtype_);
  a.mlp_input = from.matrix(rows, c.hidden_size, dtype_);
  if (with_raw && c.qk_norm) a.raw_qk = from.matrix(rows, c.q_size() + c.kv_size(), dtype_);
  if (with_raw && c.output_norms) {
    for (ops::Matrix* raw : {&a.raw_attention, &a.raw_mlp}) {
      *raw = from.matrix(rows, c.hidden_size, dtype_);
    }
  }
  for (size_t s = 0; s < ranks.size(); ++s) a.lora_down[s] = from.matrix(rows, ranks[s], dtype_);
  if (ops_.attention_backward_reads_kv()) {
    cut_kv(a, from);
    a.attention_saved = from.take<float>(rows * c.num_heads);
  }
  return a;
}

ops::LogprobRequest ScoreMemory::logprob_shape() const {
  const int64_t width = weights_.config.hidden_size;
  return {
      {nullptr, tree_.values(), width, width, dtype_}, {}, &weights_.head(), request_.temperature};
}

ScoreMemory::Kept ScoreMemory::kept(void* base) const {
  const ModelConfig& c = weights_.config;
  const int64_t rows = tree_.rows(), values = tree_.values(), width = c.hidden_size;
  ops::Workspace from(base);
  Kept m;
  m.plan = from.take<char>(plan_.bytes());
  for (int64_t l = 0; l < (request_.keep_graph ? c.num_layers + 1 : 1); ++l) {
    m.streams.push_back(from.matrix(rows, width, dtype_));
  }
  for (int64_t l = 0; keeps_layers() && l < c.num_layers; ++l) {
    m.layers.push_back(cut_layer(from, ranks(policy_.get(), l), true));
  }
  m.hidden = from.matrix(values, width, dtype_);
  if (request_.with_reference) m.reference_hidden = from.matrix(values, width, dtype_);
  m.jacobian = nullptr;
  if (request_.keep_graph) {
    const int64_t bytes = ops_.logprob_jacobian_bytes(values, width, request_.with_reference);
    if (bytes > 0) m.jacobian = from.take<char>(bytes);
  }
  float* r = m.results = from.take<float>(5 * values);
  auto* lse = from.take<double>(2 * values);
  m.outputs = {};
  if (base != nullptr) {
    m.outputs = {r, r + values, r + 2 * values, r + 3 * values, r + 4 * values, lse, lse + values};
  }
  m.bytes = from.bytes();
  return m;
}

ScoreMemory::Forward ScoreMemory::forward(void* base) const {
  const int64_t rows = tree_.rows(), width = weights_.config.hidden_size;
  ops::Workspace from(base);
  Forward m;
  if (runs_reference_) m.reference_stream = from.matrix(rows, width, dtype_);
  ops::Workspace layers = from.rest(), head = from.rest();  // one after the other
  cut_scratch(m.scratch, layers, weights_.config, rows, dtype_);
  if (!ops_.attention_backward_reads_kv()) cut_kv(m.scratch, layers);
  if (runs_reference_ || !keeps_layers()) m.layer = cut_layer(layers, most_ranks(), false);
  m.attention = layers.take<char>(ops_.attention_bytes(plan_));
  m.logprob = head.take<char>(ops_.linear_logprob_bytes(logprob_shape()));
  m.bytes = from.bytes() + std::max(layers.bytes(), head.bytes());
  return m;
}

ScoreMemory::Backward ScoreMemory::backward(void* base) const {
  const ModelConfig& c = weights_.config;
  const int64_t rows = tree_.rows(), values = tree_.values(), width = c.hidden_size;
  ops::Workspace from(base);
  Backward m;
  m.d_stream = from.matrix(rows, width, dtype_);
  m.d_normed = from.matrix(rows, width, dtype_);
  ops::Workspace head = from.rest(), layers = from.rest();
  m.d_hidden = head.matrix(values, width, DType::kF32);
  m.upstream = head.take<float>(3 * values);
  m.logprob = head.take<char>(ops_.linear_logprob_backward_bytes(logprob_shape()));

  const Ranks most = most_ranks();
  cut_scratch(m.scratch, layers, c, rows, dtype_);
  if (!keeps_layers()) {
    if (!ops_.attention_backward_reads_kv()) cut_kv(m.scratch, layers);
    m.layer = cut_layer(layers, most, true);
    m.attention = layers.take<char>(ops_.attention_bytes(plan_));
  }
  LayerBackwardBuffers& b = m.buffers;
  b.d_activated = layers.matrix(rows, c.intermediate_size, dtype_);
  b.d_gate_up = layers.matrix(rows, 2 * c.intermediate_size, dtype_);
  b.d_normed = m.d_normed;
  b.d_attention_output = layers.matrix(rows, c.q_size(), dtype_);
  b.d_qkv = layers.matrix(rows, c.qkv_size(), dtype_);
  b.d_lora_down = layers.matrix(rows, *std::max_element(most.begin(), most.end()), dtype_);
  b.attention = layers.take<char>(ops_.attention_backward_bytes(plan_));
  int64_t lora = 0;
  for (const LinearSite site : kLinearSites) {
    const LinearShape shape = linear_shape(c, site);
    lora = std::max(lora, ops_.lora_backward_bytes(rows, shape.inputs, shape.outputs,
                                                   most[static_cast<size_t>(site)]));
  }
  b.lora = layers.take<char>(lora);
  const int64_t before = layers.bytes();
  m.first_gradient = layers.take<char>(0);
  for (int64_t l = 0; l < c.num_layers; ++l) {
    const Ranks of_layer = ranks(policy_.get(), l);
    LayerGradients& gradients = m.gradients.emplace_back();
    for (const LinearSite site : kLinearSites) {
      const int64_t count = of_layer[static_cast<size_t>(site)];
      const LinearShape shape = linear_shape(c, site);
      if (count == 0) continue;
      gradients[static_cast<size_t>(site)] = {layers.matrix(count, shape.inputs, DType::kF32),
                                              layers.matrix(shape.outputs, count, DType::kF32)};
    }
  }
  if (policy_ != nullptr && policy_->soft_rows() != nullptr) {
    m.d_soft = layers.matrix(policy_->soft_rows()->matrix.rows, width, DType::kF32);
  }
  m.gradient_bytes = layers.bytes() - before;
  m.bytes = from.bytes() + std::max(head.bytes(), layers.bytes());
  return m;
}

int64_t ScoreMemory::peak_bytes() const {
  const int64_t scratch = forward(nullptr).bytes;
  return kept(nullptr).bytes +
         (request_.keep_graph ? std::max(scratch, backward(nullptr).bytes) : scratch);
}

}  // namespace alignpro::model
