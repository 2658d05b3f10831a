#include "alignpro/model/session.h"

#include <algorithm>

#include "alignpro/core/error.h"

namespace alignpro::model {

ModelSession::ModelSession(const Model& model, int64_t kv_blocks)
    : model_(model),
      ops_(model.device().make_ops()),
      kv_(*ops_, model.config().num_layers, model.config().num_kv_heads, model.config().head_dim,
          kv_blocks, model.device().kv_dtype()),
      plan_(ops_->make_plan(attention_kinds(model.weights()))),
      sampler_(ops_->make_sampler()),
      plan_memory_(*ops_),
      memory_(*ops_) {}

ModelSession::~ModelSession() {
  try {
    wait();
  } catch (const Unavailable&) {  // the device is gone, and with it what it read
  }
}

// What was staged may be written again, what was held may go.
void ModelSession::wait() {
  if (!under_way_) return;
  ops_->wait();
  under_way_ = false;
  held_.clear();
}

void ModelSession::copy_slots(int64_t from, int64_t to, int64_t slots) {
  const ops::Device::Scope scope(model_.device());
  kv_.copy_slots(from, to, slots);
}

ModelSession::Buffers ModelSession::cut(void* base, int64_t most_ranks, int64_t sums) const {
  const ModelConfig& c = model_.config();
  const DType dtype = model_.device().dtype();
  ops::Workspace from(base);
  Buffers b;
  b.stream = from.matrix(plan_->rows(), c.hidden_size, dtype);
  b.hidden = from.matrix(plan_->outputs(), c.hidden_size, dtype);
  b.layer = cut_activations(from, c, plan_->rows(), dtype);
  b.layer.mlp_input = b.stream;
  cut_scratch(b.layer, from, c, plan_->rows(), dtype);
  b.layer.lora_down.fill(from.matrix(plan_->rows(), most_ranks, dtype));
  b.attention = from.take<char>(ops_->attention_bytes(*plan_));
  // Last: what a recorded step knows lies where it does without.
  b.sums = from.matrix(sums, c.hidden_size, dtype);
  b.bytes = from.bytes();
  return b;
}

void ModelSession::forward(const Batch& batch) {
  const ops::Device::Scope scope(model_.device());
  wait();
  under_way_ = true;
  std::vector<ops::RowRange> rows;
  int64_t most_ranks = 0;
  for (const AdapterRange& range : batch.adapters) {
    rows.push_back({range.row_begin, range.row_end});
    held_.push_back(range.adapter->on(model_.device()));
    most_ranks = std::max(most_ranks, held_.back()->most_ranks());
  }
  plan_->prepare({.tokens = batch.tokens,
                  .positions = batch.positions,
                  .segments = batch.segments,
                  .kv_writes = batch.kv_writes,
                  .adapter_rows = rows,
                  .output_rows = batch.output_rows,
                  .sums = batch.sums.view()});
  plan_->place(plan_memory_.reserve(plan_->bytes()));
  std::vector<LoraRange> ranges;
  for (size_t i = 0; i < held_.size(); ++i) {
    const ops::RowRange at = plan_->adapter_rows()[i];
    ranges.push_back({at.begin, at.end, held_[i].get()});
  }
  const int64_t sums = batch.sums.view().count();
  const Buffers buffers =
      cut(memory_.reserve(cut(nullptr, most_ranks, sums).bytes), most_ranks, sums);
  void* const addresses[] = {plan_memory_.data(), memory_.data()};
  const auto adapter = held_.empty() ? nullptr : held_.back();
  plan_->run(addresses, adapter == nullptr ? 0 : adapter->version(), adapter,
             [&] { compute(buffers, ranges); });
  hidden_ = ops::rows_of(buffers.hidden, 0, static_cast<int64_t>(batch.output_rows.size()));
  if (sums == 0) return;
  ops_->mix_rows(*plan_, hidden_, buffers.sums);
  hidden_ = buffers.sums;
}

void ModelSession::compute(const Buffers& b, std::span<const LoraRange> ranges) {
  const Weights& weights = model_.weights();
  const LayerPass pass{weights, *ops_, *plan_, ranges};
  embed(pass, b.stream);
  LayerActivations layer = b.layer;
  for (int64_t l = 0; l < weights.config.num_layers; ++l) {
    layer.kv = kv_.layer(l);
    layer_forward(pass, l, b.stream, b.stream, layer, b.attention);
  }
  final_hidden(pass, b.stream, b.hidden);
}

void ModelSession::draw(std::span<const ops::SampleRow> rows) {
  const ops::Device::Scope scope(model_.device());
  const auto count = static_cast<int64_t>(rows.size());
  require(count == hidden_.rows, "draw: expected ", hidden_.rows,
          " rows, those of the last forward, got ", count);
  sampler_->draw(hidden_, model_.weights().head(), rows);
  under_way_ = true;
}

bool ModelSession::ready() const {
  if (!under_way_) return true;
  const ops::Device::Scope scope(model_.device());
  return ops_->is_done();
}

void ModelSession::collect(std::span<ops::SampledToken> out) {
  const ops::Device::Scope scope(model_.device());
  wait();
  sampler_->collect(out);
}

}  // namespace alignpro::model
