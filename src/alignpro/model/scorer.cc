#include "alignpro/model/scorer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "alignpro/core/error.h"
#include "alignpro/ops/embedding.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/rms_norm.h"

namespace alignpro::model {
namespace {

// Inputs scored in one pass when nothing is kept: bounds the buffers, changes no bit.
constexpr int64_t kGroupTokens = 2048;

float* or_null(std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

}  // namespace

// What backward() needs of the policy's pass.
struct Score::Graph {
  std::unique_ptr<TokenTree> tree;
  std::vector<AlignedBuffer> streams;         // [layers + 1]: what enters each layer, and leaves
  std::vector<LayerActivations> activations;  // by layer; empty when they are computed again
  std::vector<float> cos, sin;
  std::vector<int32_t> rows;     // of each scored value
  std::vector<float> hidden;     // [values, hidden] normed
  std::vector<int32_t> tokens;   // [values]
  // d logprob / d hidden and, with a reference, d kl / d hidden: [values, hidden]
  std::vector<float> d_logprob, d_kl;
};

Score::Score(std::shared_ptr<const Model> model, ScoreRequest request)
    : model_(std::move(model)), request_(std::move(request)) {
  check();
  const auto count = static_cast<int64_t>(request_.sequences.size());
  int64_t total = 0;
  for (int64_t s = 0; s < count; ++s) {
    offsets_.push_back(total);
    total += static_cast<int64_t>(request_.sequences[static_cast<size_t>(s)].size()) -
             request_.starts[static_cast<size_t>(s)];
  }
  const auto values = static_cast<size_t>(total);
  for (auto* out : {&logprob_, &entropy_, &lse_}) out->resize(values);
  if (request_.with_reference) {
    for (auto* out : {&kl_, &ref_logprob_, &ref_lse_}) out->resize(values);
  }
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (request_.keep_graph) {
    score_group(order);
    return;
  }
  // Neighbours in token order share the most: group them.
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return request_.sequences[static_cast<size_t>(a)] < request_.sequences[static_cast<size_t>(b)];
  });
  for (size_t begin = 0; begin < order.size();) {
    size_t end = begin;
    int64_t tokens = 0;
    while (end < order.size() && (end == begin || tokens < kGroupTokens)) {
      tokens += static_cast<int64_t>(request_.sequences[static_cast<size_t>(order[end++])].size());
    }
    score_group({order.data() + begin, end - begin});
    begin = end;
  }
}

void Score::check() const {
  const ModelConfig& config = model_->config();
  require(request_.starts.size() == request_.sequences.size(),
          "score: expected a start for each of ", request_.sequences.size(), " sequences, got ",
          request_.starts.size());
  require(std::isfinite(request_.temperature) && request_.temperature > 0.0f,
          "score: temperature must be above 0, got ", request_.temperature);
  require(!request_.keep_graph || request_.adapter != nullptr,
          "score: keep_graph needs an adapter; the base weights are never trained");
  if (request_.adapter != nullptr) request_.adapter->require_fits(config);
  if (request_.reference != nullptr) request_.reference->require_fits(config);
  for (size_t s = 0; s < request_.sequences.size(); ++s) {
    const auto& sequence = request_.sequences[s];
    const auto size = static_cast<int64_t>(sequence.size());
    require(size > 0, "score: sequence ", s, " is empty");
    require(size <= model_->context_length(), "score: sequence ", s, " has ", size,
            " tokens, the context holds ", model_->context_length());
    require(request_.starts[s] >= 1 && request_.starts[s] <= size, "score: start of sequence ", s,
            " must lie in [1, ", size, "], got ", request_.starts[s]);
    for (const int32_t token : sequence) {
      require(token >= 0 && token < config.vocab_size, "score: sequence ", s, " holds token ",
              token, ", the vocabulary has ", config.vocab_size);
    }
  }
}

std::vector<float> Score::hidden_states(const TokenTree& tree, const Adapter* adapter,
                                        Graph* graph) {
  const Weights& weights = model_->weights();
  const ModelConfig& config = weights.config;
  const Batch& batch = tree.batch();
  const int64_t rows = batch.rows(), width = config.hidden_size;
  std::vector<float> normed(static_cast<size_t>(rows * width));
  if (rows == 0) return normed;
  const int64_t half = model_->rope().half();
  std::vector<float> cos(static_cast<size_t>(rows * half)), sin(cos.size());
  model_->rope().compute(batch.positions, cos.data(), sin.data());
  std::vector<AdapterRange> ranges;
  if (adapter != nullptr) ranges.push_back({0, rows, adapter});
  const PassContext pass{weights, batch.segments, batch.kv_writes, ranges,
                         rows,    cos.data(),     sin.data(),      model_->team()};
  // No layer reads another's KV: one layer's worth serves them all.
  KvPool kv(1, config.num_kv_heads, config.head_dim, tree.blocks());
  const bool keep_all = graph != nullptr && rows * config.num_layers *
                                                    LayerActivations::floats_per_row(config) *
                                                    static_cast<int64_t>(sizeof(float)) <=
                                                request_.activation_bytes;
  if (graph != nullptr) {
    graph->streams.resize(static_cast<size_t>(config.num_layers + 1));
    if (keep_all) graph->activations.resize(static_cast<size_t>(config.num_layers));
  }
  LayerScratch scratch;
  LayerActivations passing;
  AlignedBuffer running;
  const auto stream = [&](int64_t l) {
    return graph != nullptr ? graph->streams[static_cast<size_t>(l)].reserve(rows * width)
                            : running.reserve(rows * width);
  };
  ops::embedding(weights.embedding, batch.tokens, stream(0), model_->team());
  for (int64_t l = 0; l < config.num_layers; ++l) {
    layer_forward(pass, l, stream(l), stream(l + 1), kv.layer(l),
                  keep_all ? graph->activations[static_cast<size_t>(l)] : passing, scratch);
  }
  ops::rms_norm(rows, width, stream(config.num_layers), width, weights.final_norm.data(),
                static_cast<float>(config.rms_eps), normed.data(), width, nullptr, model_->team());
  if (graph != nullptr) {
    graph->cos = std::move(cos);
    graph->sin = std::move(sin);
  }
  return normed;
}

void Score::score_group(std::span<const int64_t> members) {
  const int64_t width = model_->config().hidden_size;
  std::vector<std::span<const int32_t>> sequences;
  for (const int64_t s : members)
    sequences.emplace_back(request_.sequences[static_cast<size_t>(s)]);
  auto tree = std::make_unique<TokenTree>(sequences);
  std::vector<int32_t> rows, tokens;
  for (size_t m = 0; m < members.size(); ++m) {
    const auto size = static_cast<int64_t>(sequences[m].size());
    for (int64_t i = request_.starts[static_cast<size_t>(members[m])]; i < size; ++i) {
      rows.push_back(tree->row(static_cast<int64_t>(m), i - 1));
      tokens.push_back(sequences[m][static_cast<size_t>(i)]);
    }
  }
  const auto values = static_cast<int64_t>(rows.size());
  const auto gather = [&](const std::vector<float>& normed) {
    std::vector<float> some(static_cast<size_t>(values * width));
    for (int64_t v = 0; v < values; ++v) {
      std::memcpy(some.data() + v * width, normed.data() + rows[static_cast<size_t>(v)] * width,
                  static_cast<size_t>(width) * sizeof(float));
    }
    return some;
  };
  if (request_.keep_graph) graph_ = std::make_shared<Graph>();
  std::vector<float> hidden = gather(hidden_states(*tree, request_.adapter.get(), graph_.get()));
  std::vector<float> reference;
  if (request_.with_reference) {
    reference = gather(hidden_states(*tree, request_.reference.get(), nullptr));
  }
  // The group's values, then scattered to the sequences' places.
  std::vector<float> out(static_cast<size_t>(6 * values));
  float* at = out.data();
  const ops::LogprobOutput outputs{.logprob = at,
                                   .entropy = at + values,
                                   .kl = at + 2 * values,
                                   .reverse_kl = nullptr,
                                   .ref_logprob = at + 3 * values,
                                   .lse = at + 4 * values,
                                   .ref_lse = at + 5 * values};
  ops::LogprobJacobian jacobian{};
  if (graph_ != nullptr) {
    graph_->d_logprob.resize(hidden.size());
    graph_->d_kl.resize(reference.size());
    jacobian = {graph_->d_logprob.data(), or_null(graph_->d_kl)};
  }
  ops::linear_logprob({.rows = values,
                       .hidden = hidden.data(),
                       .weight = &model_->weights().head(),
                       .tokens = tokens,
                       .temperature = request_.temperature,
                       .ref_hidden = or_null(reference)},
                      outputs, graph_ != nullptr ? &jacobian : nullptr, model_->team());
  int64_t from = 0;
  for (const int64_t s : members) {
    const auto count = static_cast<int64_t>(request_.sequences[static_cast<size_t>(s)].size()) -
                       request_.starts[static_cast<size_t>(s)];
    const int64_t to = offsets_[static_cast<size_t>(s)];
    const auto copy = [&](const float* source, std::vector<float>& target) {
      if (!target.empty()) std::copy_n(source + from, count, target.begin() + to);
    };
    copy(outputs.logprob, logprob_);
    copy(outputs.entropy, entropy_);
    copy(outputs.kl, kl_);
    copy(outputs.ref_logprob, ref_logprob_);
    copy(outputs.lse, lse_);
    copy(outputs.ref_lse, ref_lse_);
    from += count;
  }
  if (graph_ != nullptr) {
    graph_->tree = std::move(tree);
    graph_->rows = std::move(rows);
    graph_->tokens = std::move(tokens);
    graph_->hidden = std::move(hidden);
  }
}

AdapterGradients Score::backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                                 std::span<const float> d_kl) {
  require(graph_ != nullptr,
          "backward: the graph is gone; score with keep_graph=True and call backward once");
  const auto check_size = [&](std::span<const float> d, const char* name) {
    require(d.empty() || d.size() == logprob_.size(), "backward: ", name, " has ", d.size(),
            " values, expected ", logprob_.size());
  };
  require(d_logprob.size() == logprob_.size(), "backward: d_logprob has ", d_logprob.size(),
          " values, expected ", logprob_.size());
  check_size(d_entropy, "d_entropy");
  check_size(d_kl, "d_kl");
  require(d_kl.empty() || request_.with_reference,
          "backward: d_kl was given, but the score had no reference");

  const std::shared_ptr<Graph> graph = std::exchange(graph_, nullptr);
  const Weights& weights = model_->weights();
  const ModelConfig& config = weights.config;
  const Batch& batch = graph->tree->batch();
  const int64_t rows = batch.rows(), width = config.hidden_size;
  const auto values = static_cast<int64_t>(graph->rows.size());
  ThreadTeam& team = model_->team();
  AdapterGradients gradients(*request_.adapter);
  if (rows == 0 || values == 0) return gradients;

  // keep_graph scores in the given order: the flat outputs are the graph's own.
  const ops::LogprobOutput forward{.logprob = logprob_.data(),
                                   .entropy = entropy_.data(),
                                   .kl = nullptr,
                                   .reverse_kl = nullptr,
                                   .ref_logprob = nullptr,
                                   .lse = lse_.data(),
                                   .ref_lse = nullptr};
  const ops::LogprobJacobian jacobian{graph->d_logprob.data(), or_null(graph->d_kl)};
  std::vector<float> d_hidden(static_cast<size_t>(values * width));
  // The reference enters through the KL alone, whose derivative the forward has left.
  ops::linear_logprob_backward({.rows = values,
                                .hidden = graph->hidden.data(),
                                .weight = &weights.head(),
                                .tokens = graph->tokens,
                                .temperature = request_.temperature},
                               forward, nullptr, &jacobian,
                               {.logprob = d_logprob.data(),
                                .entropy = d_entropy.empty() ? nullptr : d_entropy.data(),
                                .kl = d_kl.empty() ? nullptr : d_kl.data()},
                               d_hidden.data(), nullptr, team);
  std::vector<float> d_normed(static_cast<size_t>(rows * width));
  for (int64_t v = 0; v < values; ++v) {
    float* to = d_normed.data() + graph->rows[static_cast<size_t>(v)] * width;
    const float* from = d_hidden.data() + v * width;
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
  std::vector<float> d_stream(static_cast<size_t>(rows * width));
  std::vector<float> factors(static_cast<size_t>(rows)), ignored(static_cast<size_t>(rows * width));
  const float* last = graph->streams.back().data();
  ops::rms_norm(rows, width, last, width, weights.final_norm.data(),
                static_cast<float>(config.rms_eps), ignored.data(), width, factors.data(), team);
  ops::rms_norm_backward(rows, width, last, width, weights.final_norm.data(), factors.data(),
                         d_normed.data(), width, d_stream.data(), width, team);

  const std::vector<AdapterRange> ranges{{0, rows, request_.adapter.get()}};
  const PassContext pass{weights, batch.segments,    batch.kv_writes,   ranges,
                         rows,    graph->cos.data(), graph->sin.data(), team};
  const bool recompute = graph->activations.empty();
  std::unique_ptr<KvPool> kv;
  if (recompute) {
    kv = std::make_unique<KvPool>(1, config.num_kv_heads, config.head_dim, graph->tree->blocks());
  }
  LayerScratch scratch;
  LayerActivations again;
  AlignedBuffer unused;
  for (int64_t l = config.num_layers - 1; l >= 0; --l) {
    const float* in = graph->streams[static_cast<size_t>(l)].data();
    if (recompute) {
      layer_forward(pass, l, in, unused.reserve(rows * width), kv->layer(l), again, scratch);
    }
    layer_backward(pass, *request_.adapter, l, in,
                   recompute ? again : graph->activations[static_cast<size_t>(l)],
                   graph->tree->segment_rows(), d_stream.data(), gradients, scratch);
  }
  return gradients;
}

}  // namespace alignpro::model
