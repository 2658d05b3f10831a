#include "score_memory.h"

#include <algorithm>

#include "alignpro/ops/kv_view.h"

namespace alignpro::cuda {
namespace {

using ops::kKvBlock;

std::vector<std::span<const int32_t>> sequences_of(const model::ScoreRequest& request,
                                                   std::span<const int64_t> members) {
  std::vector<std::span<const int32_t>> sequences;
  for (const int64_t s : members) {
    sequences.emplace_back(request.sequences[static_cast<size_t>(s)]);
  }
  return sequences;
}

}  // namespace

ScoreTree::ScoreTree(const model::ScoreRequest& request, std::span<const int64_t> members)
    : tree_(sequences_of(request, members)),
      write_blocks_(static_cast<size_t>(rows()), -1),
      value_begins_(static_cast<size_t>(rows() + 1)) {
  const model::Batch& batch = tree_.batch();
  // A row's first block is its segment's own; the others begin with what that one ends with.
  for (const model::KvWrite& write : batch.kv_writes) {
    int32_t& block = write_blocks_[static_cast<size_t>(write.row)];
    if (block < 0) {
      block = write.block;
    } else {
      copies_.push_back({block, write.block, write.slot});
    }
  }
  // Segments come with what continues them behind each, so a segment's children follow it.
  const auto paths = tree_.segment_rows();
  for (size_t s = 0; s < batch.segments.size(); ++s) {
    const model::Segment& segment = batch.segments[s];
    segments_.push_back({static_cast<int32_t>(segment.row_begin),
                         static_cast<int32_t>(segment.row_count),
                         static_cast<int32_t>(segment.position)});
    most_rows_ = std::max(most_rows_, segment.row_count);
    table_ld_ = std::max(table_ld_, static_cast<int64_t>(segment.blocks.size()));
    viewer_begins_.push_back(static_cast<int32_t>(children_.size()));
    const auto continues = [&](size_t other) {
      return paths[other].position > segment.position &&
             paths[other].key_rows[static_cast<size_t>(segment.position)] == segment.row_begin;
    };
    for (size_t v = s; v < paths.size() && (v == s || continues(v)); ++v) {
      children_.push_back(static_cast<int32_t>(v));
    }
  }
  viewer_begins_.push_back(static_cast<int32_t>(children_.size()));
  for (size_t m = 0; m < members.size(); ++m) {
    const auto& sequence = request.sequences[static_cast<size_t>(members[m])];
    const auto size = static_cast<int64_t>(sequence.size());
    for (int64_t i = request.starts[static_cast<size_t>(members[m])]; i < size; ++i) {
      value_rows_.push_back(tree_.row(static_cast<int64_t>(m), i - 1));
      tokens_.push_back(sequence[static_cast<size_t>(i)]);
      ++value_begins_[static_cast<size_t>(value_rows_.back()) + 1];
    }
  }
  for (size_t row = 1; row < value_begins_.size(); ++row) {
    value_begins_[row] += value_begins_[row - 1];
  }
  std::vector<int32_t> next(value_begins_.begin(), value_begins_.end() - 1);
  row_values_.resize(value_rows_.size());
  for (size_t v = 0; v < value_rows_.size(); ++v) {
    row_values_[static_cast<size_t>(next[static_cast<size_t>(value_rows_[v])]++)] =
        static_cast<int32_t>(v);
  }
}

ScoreTree::Tables ScoreTree::cut(Workspace& from) const {
  const auto ints = [&](int64_t count) { return from.take<int32_t>(count); };
  Tables t;
  t.tokens = ints(rows());
  t.positions = ints(rows());
  t.write_blocks = ints(rows());
  t.copies = from.take<KvCopy>(copies());
  t.segments = from.take<Segment>(segments());
  t.block_table = ints(segments() * table_ld_);
  t.child_begins = ints(segments() + 1);
  t.children = ints(static_cast<int64_t>(children_.size()));
  t.value_rows = ints(values());
  t.value_tokens = ints(values());
  t.value_begins = ints(rows() + 1);
  t.row_values = ints(values());
  return t;
}

void ScoreTree::write(const Tables& staged) const {
  const model::Batch& batch = tree_.batch();
  std::copy(batch.tokens.begin(), batch.tokens.end(), staged.tokens);
  std::copy(batch.positions.begin(), batch.positions.end(), staged.positions);
  std::copy(write_blocks_.begin(), write_blocks_.end(), staged.write_blocks);
  std::copy(copies_.begin(), copies_.end(), staged.copies);
  std::copy(segments_.begin(), segments_.end(), staged.segments);
  std::fill_n(staged.block_table, segments() * table_ld_, 0);
  for (size_t s = 0; s < batch.segments.size(); ++s) {
    std::copy(batch.segments[s].blocks.begin(), batch.segments[s].blocks.end(),
              staged.block_table + static_cast<int64_t>(s) * table_ld_);
  }
  std::copy(viewer_begins_.begin(), viewer_begins_.end(), staged.child_begins);
  std::copy(children_.begin(), children_.end(), staged.children);
  std::copy(value_rows_.begin(), value_rows_.end(), staged.value_rows);
  std::copy(tokens_.begin(), tokens_.end(), staged.value_tokens);
  std::copy(value_begins_.begin(), value_begins_.end(), staged.value_begins);
  std::copy(row_values_.begin(), row_values_.end(), staged.row_values);
}

ScoreMemory::Ranks ScoreMemory::ranks(const model::Adapter* adapter, int64_t layer) const {
  Ranks ranks{};
  for (const model::LinearSite site : model::kLinearSites) {
    if (adapter == nullptr) break;
    ranks[static_cast<size_t>(site)] = device_ranks(*adapter, layer, site, weights_.dtype);
  }
  return ranks;
}

ScoreMemory::Ranks ScoreMemory::most_ranks() const {
  Ranks most{};
  for (int64_t l = 0; l < weights_.config.num_layers; ++l) {
    for (const model::Adapter* adapter : {request_.adapter.get(), request_.reference.get()}) {
      const Ranks of_layer = ranks(adapter, l);
      for (size_t s = 0; s < most.size(); ++s) most[s] = std::max(most[s], of_layer[s]);
    }
  }
  return most;
}

LayerMemory ScoreMemory::cut_layer(Workspace& from, const Ranks& ranks, bool with_raw) const {
  const model::ModelConfig& c = weights_.config;
  const auto matrix = [&](int64_t cols) { return from.matrix(tree_.rows(), cols, weights_.dtype); };
  LayerMemory memory;
  LayerActivations& a = memory.activations;
  a.qkv = matrix(c.qkv_size());
  if (with_raw && c.qk_norm) a.raw_qkv = matrix(c.qkv_size());
  a.attended = matrix(c.q_size());
  a.middle = matrix(c.hidden_size);
  a.gate_up = matrix(2 * c.intermediate_size);
  for (size_t s = 0; s < ranks.size(); ++s) a.low[s] = matrix(ranks[s]);
  memory.kv = weights_.kv_layer(
      from.take<char>(tree_.blocks() * weights_.kv_block_bytes() / c.num_layers), 1, 0);
  memory.lse = from.take<float>(tree_.rows() * c.num_heads);
  return memory;
}

LogprobInput ScoreMemory::logprob_input() const {
  LogprobInput in;
  in.hidden = {nullptr, tree_.values(), weights_.config.hidden_size, weights_.config.hidden_size,
               weights_.dtype};
  in.weight = weights_.head;
  return in;
}

ScoreMemory::Kept ScoreMemory::kept(void* base) const {
  const model::ModelConfig& c = weights_.config;
  const int64_t rows = tree_.rows(), values = tree_.values(), width = c.hidden_size;
  Workspace from(base);
  Kept m;
  m.tables = tree_.cut(from);
  m.table_bytes = from.bytes();
  for (int64_t l = 0; l < (request_.keep_graph ? c.num_layers + 1 : 1); ++l) {
    m.streams.push_back(from.matrix(rows, width, weights_.dtype));
  }
  for (int64_t l = 0; keeps_layers() && l < c.num_layers; ++l) {
    m.layers.push_back(cut_layer(from, ranks(request_.adapter.get(), l), true));
  }
  m.hidden = from.matrix(values, width, weights_.dtype);
  if (request_.with_reference) m.reference_hidden = from.matrix(values, width, weights_.dtype);
  float* r = m.results = from.take<float>(5 * values);
  auto* lse = from.take<double>(2 * values);
  if (base != nullptr) {
    m.outputs = {r, r + values, r + 2 * values, r + 3 * values, r + 4 * values, lse, lse + values};
  }
  m.bytes = from.bytes();
  return m;
}

ScoreMemory::Forward ScoreMemory::forward(void* base) const {
  const model::ModelConfig& c = weights_.config;
  const int64_t rows = tree_.rows(), width = c.hidden_size;
  Workspace from(base);
  Forward m;
  if (request_.with_reference) m.reference_stream = from.matrix(rows, width, weights_.dtype);
  Workspace layers = from.rest(), head = from.rest();  // one after the other
  m.normed = layers.matrix(rows, width, weights_.dtype);
  m.activated = layers.matrix(rows, c.intermediate_size, weights_.dtype);
  if (request_.with_reference || !keeps_layers()) m.layer = cut_layer(layers, most_ranks(), false);
  m.logprob = head.take<char>(linear_logprob_bytes(logprob_input()));
  m.bytes = from.bytes() + std::max(layers.bytes(), head.bytes());
  return m;
}

ScoreMemory::Backward ScoreMemory::backward(void* base) const {
  const model::ModelConfig& c = weights_.config;
  const DType dtype = weights_.dtype;
  const int64_t rows = tree_.rows(), values = tree_.values(), width = c.hidden_size;
  Workspace from(base);
  Backward m;
  m.d_stream = from.matrix(rows, width, dtype);
  m.d_normed = from.matrix(rows, width, dtype);
  Workspace head = from.rest(), layers = from.rest();
  m.d_hidden = head.matrix(values, width, DType::kF32);
  m.upstream = head.take<float>(3 * values);
  m.logprob = head.take<char>(linear_logprob_backward_bytes(logprob_input()));

  const Ranks most = most_ranks();
  m.normed = layers.matrix(rows, width, dtype);
  m.activated = layers.matrix(rows, c.intermediate_size, dtype);
  if (!keeps_layers()) m.layer = cut_layer(layers, most, true);
  LayerBackwardBuffers& b = m.buffers;
  b.d_activated = layers.matrix(rows, c.intermediate_size, dtype);
  b.d_gate_up = layers.matrix(rows, 2 * c.intermediate_size, dtype);
  b.d_normed = m.d_normed;
  b.d_attended = layers.matrix(rows, c.q_size(), dtype);
  b.d_qkv = layers.matrix(rows, c.qkv_size(), dtype);
  b.d_low = layers.matrix(rows, *std::max_element(most.begin(), most.end()), dtype);
  b.attention = layers.take<char>(attention_backward_bytes(weights_.attention(), rows));
  int64_t lora = 0;
  for (const model::LinearSite site : model::kLinearSites) {
    const model::LinearShape shape = model::linear_shape(c, site);
    lora = std::max(lora, lora_backward_bytes(rows, shape.inputs, shape.outputs,
                                              most[static_cast<size_t>(site)]));
  }
  b.lora = layers.take<char>(lora);
  const int64_t before = layers.bytes();
  m.first_gradient = layers.take<char>(0);
  for (int64_t l = 0; l < c.num_layers; ++l) {
    const Ranks of_layer = ranks(request_.adapter.get(), l);
    LayerGradients& gradients = m.gradients.emplace_back();
    for (const model::LinearSite site : model::kLinearSites) {
      const int64_t count = of_layer[static_cast<size_t>(site)];
      const model::LinearShape shape = model::linear_shape(c, site);
      if (count == 0) continue;
      gradients[static_cast<size_t>(site)] = {layers.matrix(count, shape.inputs, DType::kF32),
                                              layers.matrix(shape.outputs, count, DType::kF32)};
    }
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

}  // namespace alignpro::cuda
