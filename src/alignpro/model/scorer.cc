#include "alignpro/model/scorer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "alignpro/core/error.h"
#include "alignpro/model/score_bytes.h"
#include "alignpro/ops/embedding.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/rms_norm.h"

namespace alignpro::model {
namespace {

// Inputs scored in one pass when nothing is kept: bounds the buffers, changes no bit.
constexpr int64_t kGroupTokens = 2048;

float* or_null(std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// What every pass over a batch's rows shares: their angles, and who attends with whom.
struct PassTables {
  PassTables(const Model& model, const Batch& batch)
      : cos(static_cast<size_t>(batch.rows() * model.rope().half())),
        sin(cos.size()),
        attention(attention_shape(model.config()), batch.segments, model.pool().size()) {
    model.rope().compute(batch.positions, cos.data(), sin.data());
  }
  PassContext pass(const Model& model, const Batch& batch,
                   std::span<const AdapterRange> adapters) const {
    return {model.weights(), attention,  batch.kv_writes, adapters,
            batch.rows(),    cos.data(), sin.data(),      model.pool()};
  }

  std::vector<float> cos, sin;
  ops::AttentionPlan attention;
};

}  // namespace

void require_scorable(const ScoreRequest& request, const ModelConfig& config,
                      int64_t context_length) {
  require(request.starts.size() == request.sequences.size(), "score: expected a start for each of ",
          request.sequences.size(), " sequences, got ", request.starts.size());
  require(std::isfinite(request.temperature) && request.temperature > 0.0f,
          "score: temperature must be above 0, got ", request.temperature);
  require(!request.keep_graph || request.adapter != nullptr,
          "score: keep_graph needs an adapter; the base weights are never trained");
  if (request.adapter != nullptr) request.adapter->require_fits(config);
  if (request.reference != nullptr) request.reference->require_fits(config);
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    const auto& sequence = request.sequences[s];
    const auto size = static_cast<int64_t>(sequence.size());
    require(size > 0, "score: sequence ", s, " is empty");
    require(size <= context_length, "score: sequence ", s, " has ", size,
            " tokens, the context holds ", context_length);
    require(request.starts[s] >= 1 && request.starts[s] <= size, "score: start of sequence ", s,
            " must lie in [1, ", size, "], got ", request.starts[s]);
    for (const int32_t token : sequence) {
      require(token >= 0 && token < config.vocab_size, "score: sequence ", s, " holds token ",
              token, ", the vocabulary has ", config.vocab_size);
    }
  }
}

std::vector<std::vector<int64_t>> score_groups(const ScoreRequest& request) {
  std::vector<int64_t> order(request.sequences.size());
  std::iota(order.begin(), order.end(), 0);
  if (request.keep_graph) return {order};
  const auto sequence = [&](int64_t s) -> const std::vector<int32_t>& {
    return request.sequences[static_cast<size_t>(s)];
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return sequence(a) < sequence(b); });
  std::vector<std::vector<int64_t>> groups;
  int64_t tokens = kGroupTokens;
  for (const int64_t s : order) {
    if (tokens >= kGroupTokens) {
      groups.emplace_back();
      tokens = 0;
    }
    groups.back().push_back(s);
    tokens += static_cast<int64_t>(sequence(s).size());
  }
  return groups;
}

void require_upstream(bool has_graph, int64_t values, bool with_reference,
                      std::span<const float> d_logprob, std::span<const float> d_entropy,
                      std::span<const float> d_kl) {
  require(has_graph,
          "backward: the graph is gone; score with keep_graph=True and call backward once");
  const auto check_size = [&](std::span<const float> d, const char* name) {
    require(static_cast<int64_t>(d.size()) == values, "backward: ", name, " has ", d.size(),
            " values, expected ", values);
  };
  check_size(d_logprob, "d_logprob");
  if (!d_entropy.empty()) check_size(d_entropy, "d_entropy");
  if (!d_kl.empty()) check_size(d_kl, "d_kl");
  require(d_kl.empty() || with_reference,
          "backward: d_kl was given, but the score had no reference");
}

// What backward() needs of the policy's pass.
struct Score::Graph {
  explicit Graph(std::shared_ptr<const Model> m)
      : model(std::move(m)), buffers(model->score_buffers().take()) {}
  ~Graph() { model->score_buffers().give_back(std::move(buffers)); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  std::shared_ptr<const Model> model;
  std::unique_ptr<ScoreBuffers> buffers;
  std::unique_ptr<PrefixTree> tree;
  std::vector<int32_t> rows;    // of each scored value
  std::vector<float> hidden;    // [values, hidden] normed
  std::vector<int32_t> tokens;  // [values]
  // d logprob / d hidden and, with a reference, d kl / d hidden: [values, hidden]
  std::vector<float> d_logprob, d_kl;
};

Score::Score(std::shared_ptr<const Model> model, ScoreRequest request)
    : model_(std::move(model)), request_(std::move(request)) {
  require_scorable(request_, model_->config(), model_->context_length());
  require(
      !request_.keep_graph || model_->weights().head().arithmetic() == ops::Arithmetic::kFloat32,
      "gradients: expected a model loaded with compute float32, got int8");
  require(!request_.keep_graph || model_->kv_dtype() == DType::kF32,
          "gradients: expected a model loaded with kv_dtype float32, got float16");
  const auto count = static_cast<int64_t>(request_.sequences.size());
  int64_t total = 0;
  for (int64_t s = 0; s < count; ++s) {
    offsets_.push_back(total);
    total += static_cast<int64_t>(request_.sequences[static_cast<size_t>(s)].size()) -
             request_.starts[static_cast<size_t>(s)];
  }
  const auto values = static_cast<size_t>(total);
  for (auto* out : {&logprob_, &entropy_}) out->resize(values);
  lse_.resize(values);
  if (request_.with_reference) {
    for (auto* out : {&kl_, &ref_logprob_}) out->resize(values);
  }
  if (request_.with_hidden) {
    hidden_.resize(values * static_cast<size_t>(model_->config().hidden_size));
  }
  for (const std::vector<int64_t>& group : score_groups(request_)) score_group(group);
}

Score::Hidden Score::hidden_states(const PrefixTree& tree, ScoreBuffers& buffers, bool keep) const {
  const Weights& weights = model_->weights();
  const ModelConfig& config = weights.config;
  const Batch& batch = tree.batch();
  const int64_t rows = batch.rows(), width = config.hidden_size;
  const bool with_reference = request_.with_reference;
  Hidden hidden;
  hidden.policy.resize(static_cast<size_t>(rows * width));
  if (with_reference) hidden.reference.resize(hidden.policy.size());
  if (rows == 0) return hidden;
  const PassTables tables(*model_, batch);
  const auto ranges = [rows](const std::shared_ptr<const Adapter>& adapter) {
    std::vector<AdapterRange> all;
    if (adapter != nullptr) all.push_back({0, rows, adapter.get()});
    return all;
  };
  const auto policy_range = ranges(request_.adapter), reference_range = ranges(request_.reference);
  const PassContext policy = tables.pass(*model_, batch, policy_range);
  const PassContext reference = tables.pass(*model_, batch, reference_range);
  // No layer reads another's KV: one layer's worth serves them all, and the reference after the
  // policy, too.
  KvPool kv(1, config.num_kv_heads, config.head_dim, tree.blocks(), model_->kv_dtype());
  const int64_t layers = config.num_layers;
  const bool keep_all = keep && request_.activations == Activations::kKeep;
  buffers.streams.resize(static_cast<size_t>(keep ? layers + 1 : 1));
  buffers.activations.resize(static_cast<size_t>(keep_all ? layers : 1));
  const auto stream = [&](int64_t l) {
    return buffers.streams[static_cast<size_t>(keep ? l : 0)].reserve(rows * width);
  };
  ops::embedding(weights.embedding, batch.tokens, stream(0), model_->pool());
  float* reference_stream = nullptr;
  if (with_reference) {
    reference_stream = buffers.reference_stream.reserve(rows * width);
    std::copy_n(stream(0), rows * width, reference_stream);
  }
  // Layer by layer, so that both passes use a layer's weights while they are in cache.
  for (int64_t l = 0; l < layers; ++l) {
    layer_forward(policy, l, stream(l), stream(l + 1), kv.layer(l),
                  buffers.activations[static_cast<size_t>(keep_all ? l : 0)], buffers.scratch);
    if (with_reference) {
      layer_forward(reference, l, reference_stream, reference_stream, kv.layer(l),
                    buffers.reference_activations, buffers.scratch);
    }
  }
  const auto final_norm = [&](const float* from, std::vector<float>& to) {
    ops::rms_norm(rows, width, from, width, weights.final_norm.data(),
                  static_cast<float>(config.rms_eps), to.data(), width, nullptr, model_->pool());
  };
  final_norm(stream(layers), hidden.policy);
  if (with_reference) final_norm(reference_stream, hidden.reference);
  return hidden;
}

void Score::score_group(std::span<const int64_t> members) {
  const int64_t width = model_->config().hidden_size;
  std::vector<std::span<const int32_t>> sequences;
  for (const int64_t s : members)
    sequences.emplace_back(request_.sequences[static_cast<size_t>(s)]);
  auto tree = std::make_unique<PrefixTree>(sequences);
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
  auto graph = std::make_shared<Graph>(model_);
  if (request_.keep_graph) graph_ = graph;
  std::vector<float> hidden, reference;
  {
    const Hidden all = hidden_states(*tree, *graph->buffers, request_.keep_graph);
    hidden = gather(all.policy);
    if (request_.with_reference) reference = gather(all.reference);
  }
  // The group's values, then scattered to the sequences' places.
  std::vector<float> out(static_cast<size_t>(4 * values));
  std::vector<double> normaliser(static_cast<size_t>(2 * values));
  float* at = out.data();
  const ops::LogprobOutput outputs{.logprob = at,
                                   .entropy = at + values,
                                   .kl = at + 2 * values,
                                   .reverse_kl = nullptr,
                                   .ref_logprob = at + 3 * values,
                                   .lse = normaliser.data(),
                                   .ref_lse = normaliser.data() + values};
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
                      outputs, graph_ != nullptr ? &jacobian : nullptr, model_->pool());
  int64_t from = 0;
  for (const int64_t s : members) {
    const auto count = static_cast<int64_t>(request_.sequences[static_cast<size_t>(s)].size()) -
                       request_.starts[static_cast<size_t>(s)];
    const int64_t to = offsets_[static_cast<size_t>(s)];
    const auto copy = [&](const auto* source, auto& target) {
      if (!target.empty()) std::copy_n(source + from, count, target.begin() + to);
    };
    copy(outputs.logprob, logprob_);
    copy(outputs.entropy, entropy_);
    copy(outputs.kl, kl_);
    copy(outputs.ref_logprob, ref_logprob_);
    copy(outputs.lse, lse_);
    if (!hidden_.empty()) {
      std::copy_n(hidden.begin() + from * width, count * width, hidden_.begin() + to * width);
    }
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
  require_upstream(graph_ != nullptr, static_cast<int64_t>(logprob_.size()),
                   request_.with_reference, d_logprob, d_entropy, d_kl);

  const std::shared_ptr<Graph> graph = std::exchange(graph_, nullptr);
  const Weights& weights = model_->weights();
  const ModelConfig& config = weights.config;
  const Batch& batch = graph->tree->batch();
  const int64_t rows = batch.rows(), width = config.hidden_size;
  const auto values = static_cast<int64_t>(graph->rows.size());
  ThreadPool& pool = model_->pool();
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
                               d_hidden.data(), nullptr, pool);
  std::vector<float> d_normed(static_cast<size_t>(rows * width));
  for (int64_t v = 0; v < values; ++v) {
    float* to = d_normed.data() + graph->rows[static_cast<size_t>(v)] * width;
    const float* from = d_hidden.data() + v * width;
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
  ScoreBuffers& buffers = *graph->buffers;
  float* d_stream = buffers.d_stream.reserve(rows * width);
  std::fill_n(d_stream, rows * width, 0.0f);
  {
    std::vector<float> factors(static_cast<size_t>(rows)),
        ignored(static_cast<size_t>(rows * width));
    const float* last = buffers.streams.back().data();
    ops::rms_norm(rows, width, last, width, weights.final_norm.data(),
                  static_cast<float>(config.rms_eps), ignored.data(), width, factors.data(), pool);
    ops::rms_norm_backward(rows, width, last, width, weights.final_norm.data(), factors.data(),
                           d_normed.data(), width, d_stream, width, pool);
  }
  const PassTables tables(*model_, batch);
  const std::vector<AdapterRange> ranges{{0, rows, request_.adapter.get()}};
  const PassContext pass = tables.pass(*model_, batch, ranges);
  const bool recompute = request_.activations == Activations::kRecompute;
  std::unique_ptr<KvPool> kv;
  if (recompute) {
    kv = std::make_unique<KvPool>(1, config.num_kv_heads, config.head_dim, graph->tree->blocks());
  }
  for (int64_t l = config.num_layers - 1; l >= 0; --l) {
    const float* in = buffers.streams[static_cast<size_t>(l)].data();
    LayerActivations& kept = buffers.activations[static_cast<size_t>(recompute ? 0 : l)];
    if (recompute) {
      // What the layer puts out is not needed again: the stream behind it makes room.
      layer_forward(pass, l, in, buffers.streams[static_cast<size_t>(l + 1)].data(), kv->layer(l),
                    kept, buffers.scratch);
    }
    layer_backward(pass, *request_.adapter, l, in, kept, graph->tree->segment_rows(), d_stream,
                   gradients, buffers.scratch);
  }
  return gradients;
}

int64_t Score::bytes(const Model& model, const ScoreRequest& request) {
  require_scorable(request, model.config(), model.context_length());
  ScoreShape shape{.starts = request.starts,
                   .with_reference = request.with_reference,
                   .with_hidden = request.with_hidden,
                   .keep_graph = request.keep_graph,
                   .activations = request.activations,
                   .threads = model.pool().size(),
                   .kv_dtype = model.kv_dtype()};
  shape.sequences.assign(request.sequences.begin(), request.sequences.end());
  for (int64_t l = 0; l < model.config().num_layers && request.adapter != nullptr; ++l) {
    shape.layer_ranks.push_back(request.adapter->layer_ranks(l));
  }
  return score_bytes(model.config(), model.weights().head(), shape);
}

}  // namespace alignpro::model
