#include "alignpro/model/score.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "alignpro/core/dtype.h"
#include "alignpro/core/error.h"
#include "alignpro/model/score_memory.h"

namespace alignpro::model {
namespace {

using ops::Matrix;

// Inputs scored in one pass when nothing is kept: bounds the buffers, changes no bit.
constexpr int64_t kGroupTokens = 2048;

void require_scorable(const ScoreRequest& request, const Model& model) {
  const ModelConfig& config = model.config();
  const int64_t context_length = model.context_length();
  require(request.starts.size() == request.sequences.size(), "score: expected a start for each of ",
          request.sequences.size(), " sequences, got ", request.starts.size());
  require(std::isfinite(request.temperature) && request.temperature > 0.0f,
          "score: temperature must be above 0, got ", request.temperature);
  require(!request.keep_graph || request.adapter != nullptr,
          "score: keep_graph needs an adapter; the base weights are never trained");
  if (request.adapter != nullptr) request.adapter->require_fits(config);
  if (request.reference != nullptr) request.reference->require_fits(config);
  require(request.reference_hidden.empty() || request.with_reference,
          "score: reference_hidden needs with_reference");
  require(request.given_hidden.empty() || (request.adapter == nullptr && !request.keep_graph),
          "score: given_hidden are constants: expected no adapter and no keep_graph");
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    const auto& sequence = request.sequences[s];
    const auto size = static_cast<int64_t>(sequence.size());
    require(size > 0, "score: sequence ", s, " is empty");
    require(size <= context_length, "score: sequence ", s, " has ", size,
            " tokens, the context holds ", context_length);
    require(request.starts[s] >= 1 && request.starts[s] <= size, "score: start of sequence ", s,
            " must lie in [1, ", size, "], got ", request.starts[s]);
    for (size_t i = 0; i < sequence.size(); ++i) {
      require(sequence[i] < config.vocab_size, "score: sequence ", s, " holds token ", sequence[i],
              ", the vocabulary has ", config.vocab_size);
      if (sequence[i] >= 0) continue;
      const std::string where = cat("score: sequence ", s, ", index ", i);
      require(static_cast<int64_t>(i) < request.starts[s], where, ": id ", sequence[i],
              " is below 0: soft rows are read and not scored, and scored is all from ",
              request.starts[s], " on");
      if (request.given_hidden.empty()) {
        Adapter::require_row(request.adapter.get(), sequence[i], where);
      }
    }
  }
}

// What a reference that reads the sequences must have; what it has changes no size.
void require_rows_of_reference(const ScoreRequest& request) {
  if (!request.runs_reference()) return;
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    const auto& sequence = request.sequences[s];
    for (size_t i = 0; i < sequence.size(); ++i) {
      if (sequence[i] >= 0) continue;
      Adapter::require_row(request.reference.get(), sequence[i],
                           cat("score: sequence ", s, ", index ", i, " under the reference"));
    }
  }
}

// Sequences that are scored together, by index: all of them, in their order, where gradients are to
// follow; otherwise as many as bound the buffers, neighbours in token order, which share the most.
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

int64_t values_of(const ScoreRequest& request, int64_t sequence) {
  const auto s = static_cast<size_t>(sequence);
  return static_cast<int64_t>(request.sequences[s].size()) - request.starts[s];
}

std::shared_ptr<const DeviceAdapter> uploaded(const std::shared_ptr<const Adapter>& adapter,
                                              const ops::Device& device) {
  return adapter == nullptr ? nullptr : adapter->on(device);
}

// Takes buffers from the model's pool and gives them back when nothing under way reads them.
class PooledBuffers {
 public:
  explicit PooledBuffers(const Model& model)
      : pool_(model.score_buffers()), buffers_(pool_.take(model.device(), model.weights())) {}
  ~PooledBuffers() {
    if (buffers_ == nullptr) return;
    try {
      buffers_->ops->wait();
      pool_.give_back(std::move(buffers_));
    } catch (const Unavailable&) {  // the device is gone
    }
  }
  PooledBuffers(const PooledBuffers&) = delete;
  PooledBuffers& operator=(const PooledBuffers&) = delete;

  ScoreBuffers& operator*() const { return *buffers_; }
  ScoreBuffers* operator->() const { return buffers_.get(); }

 private:
  BufferPool<ScoreBuffers>& pool_;
  std::unique_ptr<ScoreBuffers> buffers_;
};

}  // namespace

AdapterGradients::AdapterGradients(const Adapter& adapter) : soft_rows(adapter.soft_rows().size()) {
  for (const Adapter::Module& m : adapter.modules()) {
    modules.push_back({std::vector<float>(static_cast<size_t>(m.rank * m.where.inputs)),
                       std::vector<float>(static_cast<size_t>(m.where.outputs * m.rank))});
  }
}

class Score::Pass {
 public:
  // offsets: of each sequence's first value among all of the request's.
  Pass(std::shared_ptr<const Model> model, const ScoreRequest& request,
       std::span<const int64_t> members, std::span<const int64_t> offsets)
      : model_(std::move(model)),
        weights_(model_->weights()),
        request_(request),
        members_(members.begin(), members.end()),
        offsets_(offsets),
        tree_(request, members),
        policy_(uploaded(request.adapter, model_->device())),
        reference_(uploaded(request.reference, model_->device())),
        pooled_(*model_),
        memory_(weights_, model_->device(), ops(), prepared(), request, tree_, policy_, reference_),
        kept_memory_(ops(), memory_.kept(nullptr).bytes),
        kept_(memory_.kept(kept_memory_.data())) {}

  int64_t values() const { return tree_.values(); }

  // Leaves results() and hidden(), in this order of values: sequence after sequence of the members.
  void forward();
  const float* results() const { return results_; }  // [5][values]: see LogprobOutput
  const std::byte* hidden() const { return hidden_; }

  void backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                std::span<const float> d_kl, AdapterGradients& gradients);

 private:
  ops::Ops& ops() const { return *pooled_->ops; }
  const ops::Plan& plan() const { return *pooled_->plan; }
  const ops::Plan& prepared() const {
    pooled_->plan->prepare(tree_.plan_request());
    return *pooled_->plan;
  }
  int64_t num_layers() const { return weights_.config.num_layers; }
  float eps() const { return static_cast<float>(weights_.config.rms_eps); }
  void embed_tokens(const DeviceAdapter* adapter, const Matrix& out) const;
  void run_layer(const DeviceAdapter* adapter, int64_t layer, const Matrix& in, const Matrix& out,
                 const LayerActivations& own, const LayerActivations& scratch,
                 void* workspace) const;
  void clear_shared_kv(const LayerActivations& scratch) const;
  LayerActivations joined(const LayerActivations& own, const LayerActivations& scratch) const;
  ops::LogprobRequest logprob_request(bool with_reference) const;
  void upload(const std::vector<float>& states, ops::HostBuffer& buffer, const Matrix& to) const;
  void d_stream_of_values(const ScoreMemory::Backward& m, std::span<const float> d_logprob,
                          std::span<const float> d_entropy, std::span<const float> d_kl);
  void unpack(const ScoreMemory::Backward& m, const std::byte* host,
              AdapterGradients& gradients) const;

  const std::shared_ptr<const Model> model_;
  const Weights& weights_;
  const ScoreRequest& request_;
  const std::vector<int64_t> members_;
  const std::span<const int64_t> offsets_;
  const ScoreTree tree_;
  const std::shared_ptr<const DeviceAdapter> policy_, reference_;
  const PooledBuffers pooled_;  // outlives the memory of its ops
  const ScoreMemory memory_;
  const ops::Buffer kept_memory_;
  const ScoreMemory::Kept kept_;
  const float* results_ = nullptr;
  const std::byte* hidden_ = nullptr;
};

// What a layer leaves, with the scratch that all of them use.
LayerActivations Score::Pass::joined(const LayerActivations& own,
                                     const LayerActivations& scratch) const {
  LayerActivations all = own;
  all.normed = scratch.normed;
  all.activated = scratch.activated;
  if (!ops().attention_backward_reads_kv()) all.kv = scratch.kv;
  return all;
}

void Score::Pass::embed_tokens(const DeviceAdapter* adapter, const Matrix& out) const {
  const LoraRange range{0, tree_.rows(), adapter};
  embed({weights_, ops(), plan(), {&range, adapter == nullptr ? 0u : 1u}}, out);
}

void Score::Pass::run_layer(const DeviceAdapter* adapter, int64_t layer, const Matrix& in,
                            const Matrix& out, const LayerActivations& own,
                            const LayerActivations& scratch, void* workspace) const {
  const LoraRange range{0, tree_.rows(), adapter};
  const LayerPass pass{weights_, ops(), plan(), {&range, adapter == nullptr ? 0u : 1u}};
  layer_forward(pass, layer, in, out, joined(own, scratch), workspace);
}

// No layer reads another's keys and values: one layer's worth serves them all, and the reference
// after the policy, too. Slots that are never written are read, and weighed with zero.
void Score::Pass::clear_shared_kv(const LayerActivations& scratch) const {
  if (!ops().attention_backward_reads_kv()) ops().clear(scratch.kv.base, memory_.kv_bytes());
}

ops::LogprobRequest Score::Pass::logprob_request(bool with_reference) const {
  return {kept_.hidden, with_reference ? kept_.reference_hidden : Matrix{}, &weights_.head(),
          request_.temperature};
}

// Of the request's states, this group's.
void Score::Pass::upload(const std::vector<float>& states, ops::HostBuffer& buffer,
                         const Matrix& to) const {
  const int64_t row = row_bytes(to.dtype, to.cols), bytes = to.rows * row;
  auto* staged = static_cast<std::byte*>(ops().stage(buffer, to.data, bytes));
  std::byte* next = staged;
  for (const int64_t s : members_) {
    const int64_t count = values_of(request_, s);
    round_values(to.dtype, states.data() + offsets_[static_cast<size_t>(s)] * to.cols,
                 count * to.cols, next);
    next += count * row;
  }
  ops().upload(to.data, staged, bytes);
}

void Score::Pass::forward() {
  const bool with_reference = memory_.runs_reference(), given = !request_.given_hidden.empty();
  pooled_->plan->place(kept_.plan);
  const ops::Buffer scratch(ops(), memory_.forward(nullptr).bytes);
  const ScoreMemory::Forward m = memory_.forward(scratch.data());
  clear_shared_kv(m.scratch);
  const auto entering = [&](int64_t l) -> const Matrix& {
    return kept_.streams[static_cast<size_t>(request_.keep_graph ? l : 0)];
  };
  if (!given) embed_tokens(policy_.get(), entering(0));
  if (with_reference) embed_tokens(reference_.get(), m.reference_stream);
  // Layer by layer, so that both passes use a layer's weights while they are in cache.
  for (int64_t l = 0; l < num_layers(); ++l) {
    const LayerActivations& layer =
        memory_.keeps_layers() ? kept_.layers[static_cast<size_t>(l)] : m.layer;
    if (!given) {
      run_layer(policy_.get(), l, entering(l), entering(l + 1), layer, m.scratch, m.attention);
    }
    if (with_reference) {
      run_layer(reference_.get(), l, m.reference_stream, m.reference_stream, m.layer, m.scratch,
                m.attention);
    }
  }
  const LayerPass pass{weights_, ops(), plan(), {}};
  if (given) {
    upload(request_.given_hidden, pooled_->given_hidden, kept_.hidden);
  } else {
    final_hidden(pass, entering(num_layers()), kept_.hidden);
  }
  if (with_reference) {
    final_hidden(pass, m.reference_stream, kept_.reference_hidden);
  } else if (request_.with_reference) {
    upload(request_.reference_hidden, pooled_->reference_hidden, kept_.reference_hidden);
  }
  ops().linear_logprob(plan(), logprob_request(request_.with_reference), kept_.outputs,
                       kept_.jacobian, m.logprob);

  results_ = static_cast<const float*>(ops().download(
      pooled_->results, kept_.results, 5 * values() * static_cast<int64_t>(sizeof(float))));
  if (request_.with_hidden) {
    hidden_ = static_cast<const std::byte*>(
        ops().download(pooled_->hidden, kept_.hidden.data,
                       values() * kept_.hidden.cols * block_bytes(kept_.hidden.dtype)));
  }
  ops().wait();
  for (int64_t i = 0; i < values(); ++i) {
    require<NumericError>(std::isfinite(results_[i]), "linear_logprob: row ", i,
                          " has no finite softmax (NaN or infinite logits); check the weights "
                          "and the adapter");
  }
}

// From the derivatives by the outputs to those by the stream that leaves the last layer.
void Score::Pass::d_stream_of_values(const ScoreMemory::Backward& m,
                                     std::span<const float> d_logprob,
                                     std::span<const float> d_entropy,
                                     std::span<const float> d_kl) {
  const int64_t bytes = 3 * values() * static_cast<int64_t>(sizeof(float));
  auto* staged = static_cast<float*>(ops().stage(pooled_->upstream, m.upstream, bytes));
  std::fill_n(staged, 3 * values(), 0.0f);
  std::copy(d_logprob.begin(), d_logprob.end(), staged);
  std::copy(d_entropy.begin(), d_entropy.end(), staged + values());
  std::copy(d_kl.begin(), d_kl.end(), staged + 2 * values());
  ops().upload(m.upstream, staged, bytes);
  ops::LogprobUpstream upstream{};
  upstream.logprob = m.upstream;
  if (!d_entropy.empty()) upstream.entropy = m.upstream + values();
  if (!d_kl.empty()) upstream.kl = m.upstream + 2 * values();
  // The reference enters through the KL alone.
  ops().linear_logprob_backward(plan(), logprob_request(!d_kl.empty()), kept_.outputs, upstream,
                                kept_.jacobian, m.d_hidden, m.logprob);
  ops().output_rows_backward(plan(), m.d_hidden, m.d_normed);
  ops().clear(m.d_stream.data, tree_.rows() * m.d_stream.ld * block_bytes(m.d_stream.dtype));
  ops().rms_norm_backward(kept_.streams.back(), weights_.final_norm, eps(), m.d_normed, m.d_stream);
}

void Score::Pass::backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                           std::span<const float> d_kl, AdapterGradients& gradients) {
  const ops::Buffer scratch(ops(), memory_.backward(nullptr).bytes);
  const ScoreMemory::Backward m = memory_.backward(scratch.data());
  d_stream_of_values(m, d_logprob, d_entropy, d_kl);
  if (!memory_.keeps_layers()) clear_shared_kv(m.scratch);

  const LoraRange range{0, tree_.rows(), policy_.get()};
  const LayerPass pass{weights_, ops(), plan(), {&range, 1}};
  for (int64_t l = num_layers() - 1; l >= 0; --l) {
    const auto index = static_cast<size_t>(l);
    const Matrix& in = kept_.streams[index];
    const LayerActivations& layer = memory_.keeps_layers() ? kept_.layers[index] : m.layer;
    if (!memory_.keeps_layers()) {
      // What the layer puts out is not needed again: the stream behind it makes room.
      run_layer(policy_.get(), l, in, kept_.streams[index + 1], layer, m.scratch, m.attention);
    }
    layer_backward(pass, *policy_, l, in, joined(layer, m.scratch), m.buffers, m.gradients[index],
                   m.d_stream);
  }
  if (m.d_soft.rows > 0) ops().soft_rows_backward(plan(), m.d_stream, m.d_soft);
  const void* host = ops().download(pooled_->results, m.first_gradient, m.gradient_bytes);
  ops().wait();
  unpack(m, static_cast<const std::byte*>(host), gradients);
}

// Each module's rows of A and columns of B, out of its site's; and the soft rows.
void Score::Pass::unpack(const ScoreMemory::Backward& m, const std::byte* host,
                         AdapterGradients& gradients) const {
  const auto on_host = [&](const Matrix& matrix) {
    return reinterpret_cast<const float*>(host +
                                          (static_cast<char*>(matrix.data) - m.first_gradient));
  };
  for (size_t i = 0; i < gradients.modules.size(); ++i) {
    const Adapter::Module& module = request_.adapter->modules()[i];
    const SiteGradients& site = m.gradients[static_cast<size_t>(module.where.layer)]
                                           [static_cast<size_t>(module.where.site)];
    const int64_t inputs = module.where.inputs, ranks = site.b.cols;
    auto& [a, b] = gradients.modules[i];
    std::copy_n(on_host(site.a) + module.rank_begin * inputs, module.rank * inputs, a.begin());
    const float* from = on_host(site.b) + module.where.out_begin * ranks + module.rank_begin;
    for (int64_t n = 0; n < module.where.outputs; ++n) {
      std::copy_n(from + n * ranks, module.rank, b.begin() + n * module.rank);
    }
  }
  if (gradients.soft_rows.empty()) return;
  std::copy_n(on_host(m.d_soft), gradients.soft_rows.size(), gradients.soft_rows.begin());
}

Score::Score(std::shared_ptr<const Model> model, ScoreRequest request)
    : model_(std::move(model)), request_(std::move(request)), has_graph_(request_.keep_graph) {
  require_scorable(request_, *model_);
  require_rows_of_reference(request_);
  if (request_.keep_graph) model_->device().require_gradients();
  const ops::Device::Scope scope(model_->device());
  int64_t total = 0;
  for (size_t s = 0; s < request_.sequences.size(); ++s) {
    offsets_.push_back(total);
    total += values_of(request_, static_cast<int64_t>(s));
  }
  const auto values = static_cast<size_t>(total);
  const auto check_states = [&](const std::vector<float>& states, const char* name) {
    require(states.empty() || std::ssize(states) == total * hidden_size(), "score: ", name,
            ": expected ", total, " rows of ", hidden_size(), " values, got ", states.size(),
            " values");
  };
  check_states(request_.reference_hidden, "reference_hidden");
  check_states(request_.given_hidden, "given_hidden");
  for (auto* out : {&logprob_, &entropy_}) out->resize(values);
  if (request_.with_reference) {
    for (auto* out : {&kl_, &ref_logprob_}) out->resize(values);
  }
  if (request_.with_hidden) hidden_.resize(values * static_cast<size_t>(hidden_size()));
  for (const std::vector<int64_t>& group : score_groups(request_)) score_group(group);
  request_.reference_hidden = request_.given_hidden = {};  // the passes hold what they need
}

Score::~Score() = default;

void Score::score_group(std::span<const int64_t> members) {
  int64_t values = 0;
  for (const int64_t s : members) values += values_of(request_, s);
  if (values == 0) return;
  auto pass = std::make_unique<Pass>(model_, request_, members, offsets_);
  pass->forward();
  const int64_t width = hidden_size();
  const float* results = pass->results();
  int64_t from = 0;
  for (const int64_t s : members) {
    const int64_t count = values_of(request_, s), to = offsets_[static_cast<size_t>(s)];
    const auto copy = [&](int64_t which, std::vector<float>& out) {
      if (!out.empty()) std::copy_n(results + which * values + from, count, out.begin() + to);
    };
    copy(0, logprob_);
    copy(1, entropy_);
    copy(2, kl_);
    copy(4, ref_logprob_);
    if (request_.with_hidden) {
      const DType dtype = model_->device().dtype();
      dequantize(dtype, pass->hidden() + from * width * block_bytes(dtype), count * width,
                 hidden_.data() + to * width);
    }
    from += count;
  }
  if (request_.keep_graph) pass_ = std::move(pass);
}

int64_t Score::bytes(const Model& model, const ScoreRequest& request) {
  require_scorable(request, model);
  const ops::Device::Scope scope(model.device());
  const PooledBuffers pooled(model);
  return bytes(model.weights(), model.device(), *pooled, request,
               uploaded(request.adapter, model.device()),
               uploaded(request.reference, model.device()));
}

int64_t Score::bytes(const Weights& weights, const ops::Device& device, ScoreBuffers& buffers,
                     const ScoreRequest& request, std::shared_ptr<const DeviceAdapter> policy,
                     std::shared_ptr<const DeviceAdapter> reference) {
  int64_t most = 0, values = 0;
  for (const std::vector<int64_t>& group : score_groups(request)) {
    const ScoreTree tree(request, group);
    if (tree.values() == 0) continue;
    values += tree.values();
    buffers.plan->prepare(tree.plan_request());
    const ScoreMemory memory(weights, device, *buffers.ops, *buffers.plan, request, tree, policy,
                             reference);
    most = std::max(most, memory.peak_bytes());
  }
  if (values == 0) return 0;
  const ModelConfig& c = weights.config;
  const int64_t widest = std::max({c.hidden_size, 2 * c.intermediate_size, c.qkv_size()});
  return most +
         buffers.ops->score_overhead_bytes({values, c.hidden_size, widest, request.with_reference,
                                            request.with_hidden, request.keep_graph},
                                           weights.head());
}

AdapterGradients Score::backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                                 std::span<const float> d_kl) {
  const auto require_graph = [](bool has_graph) {
    require(has_graph,
            "backward: the graph is gone; score with keep_graph=True and call backward once");
  };
  const auto check_size = [&](std::span<const float> d, const char* name) {
    require(d.size() == logprob_.size(), "backward: ", name, " has ", d.size(),
            " values, expected ", logprob_.size());
  };
  require_graph(has_graph_.load());
  check_size(d_logprob, "d_logprob");
  if (!d_entropy.empty()) check_size(d_entropy, "d_entropy");
  if (!d_kl.empty()) check_size(d_kl, "d_kl");
  require(d_kl.empty() || request_.with_reference,
          "backward: d_kl was given, but the score had no reference");
  require_graph(has_graph_.exchange(false));  // of two threads one has it
  const std::unique_ptr<Pass> pass = std::move(pass_);
  AdapterGradients gradients(*request_.adapter);
  if (pass == nullptr) return gradients;
  const ops::Device::Scope scope(model_->device());
  pass->backward(d_logprob, d_entropy, d_kl, gradients);
  return gradients;
}

}  // namespace alignpro::model
