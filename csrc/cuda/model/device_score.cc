#include "device_score.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "alignpro/core/dtype.h"
#include "alignpro/core/error.h"
#include "score_memory.h"

namespace alignpro::cuda {
namespace {

// Takes a staging from the model's pool and gives it back when nothing on its stream reads it.
class Lease {
 public:
  Lease(ScoreStagingPool& pool, const DeviceWeights& weights) : pool_(pool), staging_(pool.take()) {
    if (weights.fast != nullptr && !staging_->fast) {
      staging_->fast.emplace(weights.fast, staging_->stream.get());
    }
  }
  ~Lease() {
    try {
      synchronize(staging_->stream.get());
      pool_.give_back(std::move(staging_));
    } catch (const Unavailable&) {  // the device is gone
    }
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  ScoreStaging* operator->() const { return staging_.get(); }

 private:
  ScoreStagingPool& pool_;
  std::unique_ptr<ScoreStaging> staging_;
};

int64_t values_of(const model::ScoreRequest& request, int64_t sequence) {
  const auto s = static_cast<size_t>(sequence);
  return static_cast<int64_t>(request.sequences[s].size()) - request.starts[s];
}

}  // namespace

class DeviceScore::Pass {
 public:
  Pass(std::shared_ptr<const DeviceModel> model, const model::ScoreRequest& request,
       std::span<const int64_t> members)
      : model_(std::move(model)),
        weights_(model_->weights()),
        request_(request),
        tree_(request, members),
        memory_(weights_, request, tree_),
        lease_(model_->score_staging(), weights_),
        kept_memory_(stream(), memory_.kept(nullptr).bytes),
        kept_(memory_.kept(kept_memory_.data())) {
    if (request.adapter != nullptr) policy_ = model_->adapters().get(*request.adapter);
    if (request.reference != nullptr) reference_ = model_->adapters().get(*request.reference);
  }

  // Leaves results() and hidden(), in this order of values: sequence after sequence of the members.
  void forward();
  const float* results() const { return results_; }  // [5][values]: see LogprobOutput
  const std::byte* hidden() const { return hidden_; }

  void backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                std::span<const float> d_kl, model::AdapterGradients& gradients);

 private:
  Stream stream() const { return lease_->stream.get(); }
  FastLinear* fast() const { return lease_->fast ? &*lease_->fast : nullptr; }
  int64_t values() const { return tree_.values(); }
  int64_t num_layers() const { return weights_.config.num_layers; }
  float eps() const { return static_cast<float>(weights_.config.rms_eps); }
  AdapterRows range(const std::shared_ptr<const DeviceAdapter>& adapter) const {
    return {0, tree_.rows(), adapter.get()};
  }
  void run_layer(const AdapterRows& adapter, int64_t layer, const Matrix& in, const Matrix& out,
                 const LayerMemory& memory, const Matrix& normed, const Matrix& activated) const;
  void pick_hidden(const Matrix& last, const Matrix& to) const;
  LogprobInput logprob_input(bool with_reference) const;
  void d_stream_of_values(const ScoreMemory::Backward& m, std::span<const float> d_logprob,
                          std::span<const float> d_entropy, std::span<const float> d_kl);
  void unpack(const ScoreMemory::Backward& m, const std::byte* staged,
              model::AdapterGradients& gradients) const;

  const std::shared_ptr<const DeviceModel> model_;
  const DeviceWeights& weights_;
  const model::ScoreRequest& request_;
  const ScoreTree tree_;
  const ScoreMemory memory_;
  const Lease lease_;  // outlives the memory on its stream
  const DeviceBuffer kept_memory_;
  const ScoreMemory::Kept kept_;
  std::shared_ptr<const DeviceAdapter> policy_, reference_;
  const float* results_ = nullptr;
  const std::byte* hidden_ = nullptr;
};

void DeviceScore::Pass::run_layer(const AdapterRows& adapter, int64_t layer, const Matrix& in,
                                  const Matrix& out, const LayerMemory& memory,
                                  const Matrix& normed, const Matrix& activated) const {
  const ScoreTree::Tables& tables = kept_.tables;
  const LayerPass pass{weights_, {&adapter, 1}, tables.positions, tables.write_blocks,
                       stream(), fast()};
  LayerActivations activations = memory.activations;
  activations.normed = normed;
  activations.activated = activated;
  layer_forward(pass, layer, in, out, memory.kv, activations,
                [&](const Matrix& qkv, const PagedKv& kv, const Matrix& attended) {
                  const AttentionShape shape = weights_.attention();
                  kv_copy(shape, weights_.dtype, tables.copies, tree_.copies(), kv, stream());
                  attention_prefill(shape, qkv, tables.segments, tree_.segments(),
                                    tree_.most_rows(), tables.block_table, tree_.table_ld(), kv,
                                    attended, memory.lse, stream());
                });
}

// The stream is a table too, its rows chosen as an embedding's are.
void DeviceScore::Pass::pick_hidden(const Matrix& last, const Matrix& to) const {
  embedding(last, kept_.tables.value_rows, to, stream());
  rms_norm(to, weights_.final_norm, eps(), to, stream());
}

LogprobInput DeviceScore::Pass::logprob_input(bool with_reference) const {
  LogprobInput in{
      kept_.hidden, weights_.head, kept_.tables.value_tokens, request_.temperature, {}, {}};
  if (with_reference) {
    in.ref_hidden = kept_.reference_hidden;
    in.ref_weight = weights_.head;
  }
  return in;
}

void DeviceScore::Pass::forward() {
  void* staged = lease_->tables.reserve(kept_.table_bytes);
  Workspace pieces(staged);
  tree_.write(tree_.cut(pieces));
  copy_to_device(kept_memory_.data(), staged, kept_.table_bytes, stream());

  const DeviceBuffer scratch(stream(), memory_.forward(nullptr).bytes);
  const ScoreMemory::Forward m = memory_.forward(scratch.data());
  const auto entering = [&](int64_t l) -> const Matrix& {
    return kept_.streams[static_cast<size_t>(request_.keep_graph ? l : 0)];
  };
  embedding(weights_.embedding, kept_.tables.tokens, entering(0), stream());
  if (request_.with_reference) {
    embedding(weights_.embedding, kept_.tables.tokens, m.reference_stream, stream());
  }
  for (int64_t l = 0; l < num_layers(); ++l) {
    const LayerMemory& layer =
        memory_.keeps_layers() ? kept_.layers[static_cast<size_t>(l)] : m.layer;
    run_layer(range(policy_), l, entering(l), entering(l + 1), layer, m.normed, m.activated);
    if (request_.with_reference) {
      run_layer(range(reference_), l, m.reference_stream, m.reference_stream, m.layer, m.normed,
                m.activated);
    }
  }
  pick_hidden(entering(num_layers()), kept_.hidden);
  if (request_.with_reference) pick_hidden(m.reference_stream, kept_.reference_hidden);
  linear_logprob(logprob_input(request_.with_reference), kept_.outputs, m.logprob, stream());

  const int64_t result_bytes = 5 * values() * static_cast<int64_t>(sizeof(float));
  const int64_t hidden_bytes =
      request_.with_hidden ? values() * kept_.hidden.cols * block_bytes(weights_.dtype) : 0;
  auto* results = static_cast<std::byte*>(lease_->results.reserve(result_bytes + hidden_bytes));
  copy_to_host(results, kept_.results, result_bytes, stream());
  if (hidden_bytes > 0) {
    copy_to_host(results + result_bytes, kept_.hidden.data, hidden_bytes, stream());
  }
  synchronize(stream());
  results_ = reinterpret_cast<const float*>(results);
  hidden_ = results + result_bytes;
  for (int64_t i = 0; i < values(); ++i) {
    if (!std::isfinite(results_[i])) {
      throw NumericError(cat("linear_logprob: row ", i,
                             " has no finite softmax (NaN or infinite logits); check the weights "
                             "and the adapter"));
    }
  }
}

// From the derivatives by the outputs to those by the stream that leaves the last layer.
void DeviceScore::Pass::d_stream_of_values(const ScoreMemory::Backward& m,
                                           std::span<const float> d_logprob,
                                           std::span<const float> d_entropy,
                                           std::span<const float> d_kl) {
  const int64_t bytes = 3 * values() * static_cast<int64_t>(sizeof(float));
  auto* staged = static_cast<float*>(lease_->tables.reserve(bytes));
  std::fill_n(staged, 3 * values(), 0.0f);
  std::copy(d_logprob.begin(), d_logprob.end(), staged);
  std::copy(d_entropy.begin(), d_entropy.end(), staged + values());
  std::copy(d_kl.begin(), d_kl.end(), staged + 2 * values());
  copy_to_device(m.upstream, staged, bytes, stream());
  LogprobUpstream upstream{};
  upstream.logprob = m.upstream;
  if (!d_entropy.empty()) upstream.entropy = m.upstream + values();
  if (!d_kl.empty()) upstream.kl = m.upstream + 2 * values();
  // The reference enters through the KL alone.
  linear_logprob_backward(logprob_input(!d_kl.empty()), kept_.outputs, upstream, m.d_hidden, {},
                          m.logprob, stream());
  embedding_backward(m.d_hidden, kept_.tables.value_begins, kept_.tables.row_values, m.d_normed,
                     stream());
  clear(m.d_stream.data, tree_.rows() * m.d_stream.ld * block_bytes(weights_.dtype), stream());
  rms_norm_backward(kept_.streams.back(), weights_.final_norm, eps(), m.d_normed, m.d_stream,
                    stream());
}

void DeviceScore::Pass::backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                                 std::span<const float> d_kl, model::AdapterGradients& gradients) {
  const DeviceBuffer scratch(stream(), memory_.backward(nullptr).bytes);
  const ScoreMemory::Backward m = memory_.backward(scratch.data());
  d_stream_of_values(m, d_logprob, d_entropy, d_kl);

  const ScoreTree::Tables& tables = kept_.tables;
  const AdapterRows rows = range(policy_);
  const LayerPass pass{weights_, {&rows, 1}, tables.positions, tables.write_blocks,
                       stream(), fast()};
  AttentionBackwardInput tree{};
  tree.segments = tables.segments;
  tree.segment_count = tree_.segments();
  tree.max_rows = tree_.most_rows();
  tree.child_begin = tables.child_begins;
  tree.children = tables.children;
  tree.block_table = tables.block_table;
  tree.table_ld = tree_.table_ld();
  for (int64_t l = num_layers() - 1; l >= 0; --l) {
    const auto index = static_cast<size_t>(l);
    const Matrix& in = kept_.streams[index];
    const LayerMemory& layer = memory_.keeps_layers() ? kept_.layers[index] : m.layer;
    if (!memory_.keeps_layers()) {
      // What the layer puts out is not needed again: the stream behind it makes room.
      run_layer(rows, l, in, kept_.streams[index + 1], layer, m.normed, m.activated);
    }
    LayerActivations activations = layer.activations;
    activations.normed = m.normed;
    activations.activated = m.activated;
    layer_backward(pass, *policy_, l, in, layer.kv, layer.lse, activations, tree, m.buffers,
                   m.gradients[index], m.d_stream);
  }
  auto* staged = static_cast<std::byte*>(lease_->results.reserve(m.gradient_bytes));
  copy_to_host(staged, m.first_gradient, m.gradient_bytes, stream());
  synchronize(stream());
  unpack(m, staged, gradients);
}

// Each module's rows of A and columns of B, out of its site's.
void DeviceScore::Pass::unpack(const ScoreMemory::Backward& m, const std::byte* staged,
                               model::AdapterGradients& gradients) const {
  const auto on_host = [&](const Matrix& matrix) {
    return reinterpret_cast<const float*>(staged +
                                          (static_cast<char*>(matrix.data) - m.first_gradient));
  };
  for (size_t i = 0; i < gradients.modules.size(); ++i) {
    const model::Adapter::Module& module = request_.adapter->modules()[i];
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
}

DeviceScore::DeviceScore(std::shared_ptr<const DeviceModel> model, model::ScoreRequest request)
    : model_(std::move(model)), request_(std::move(request)), has_graph_(request_.keep_graph) {
  model::require_scorable(request_, model_->config(), model_->context_length());
  const DeviceScope scope(model_->weights().device);
  int64_t total = 0;
  for (size_t s = 0; s < request_.sequences.size(); ++s) {
    offsets_.push_back(total);
    total += values_of(request_, static_cast<int64_t>(s));
  }
  const auto values = static_cast<size_t>(total);
  for (auto* out : {&logprob_, &entropy_}) out->resize(values);
  if (request_.with_reference) {
    for (auto* out : {&kl_, &ref_logprob_}) out->resize(values);
  }
  if (request_.with_hidden) hidden_.resize(values * static_cast<size_t>(hidden_size()));
  for (const std::vector<int64_t>& group : model::score_groups(request_)) score_group(group);
}

DeviceScore::~DeviceScore() = default;

void DeviceScore::score_group(std::span<const int64_t> members) {
  int64_t values = 0;
  for (const int64_t s : members) values += values_of(request_, s);
  if (values == 0) return;
  auto pass = std::make_unique<Pass>(model_, request_, members);
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
      const DType dtype = model_->weights().dtype;
      dequantize(dtype, pass->hidden() + from * width * block_bytes(dtype), count * width,
                 hidden_.data() + to * width);
    }
    from += count;
  }
  if (request_.keep_graph) pass_ = std::move(pass);
}

int64_t DeviceScore::bytes(const DeviceModel& model, const model::ScoreRequest& request) {
  model::require_scorable(request, model.config(), model.context_length());
  int64_t most = 0;
  for (const std::vector<int64_t>& group : model::score_groups(request)) {
    const ScoreTree tree(request, group);
    if (tree.values() == 0) continue;
    most = std::max(most, ScoreMemory(model.weights(), request, tree).peak_bytes());
  }
  return most;
}

model::AdapterGradients DeviceScore::backward(std::span<const float> d_logprob,
                                              std::span<const float> d_entropy,
                                              std::span<const float> d_kl) {
  model::require_upstream(has_graph_, static_cast<int64_t>(logprob_.size()),
                          request_.with_reference, d_logprob, d_entropy, d_kl);
  has_graph_ = false;
  const std::unique_ptr<Pass> pass = std::move(pass_);
  model::AdapterGradients gradients(*request_.adapter);
  if (pass == nullptr) return gradients;
  const DeviceScope scope(model_->weights().device);
  pass->backward(d_logprob, d_entropy, d_kl, gradients);
  return gradients;
}

}  // namespace alignpro::cuda
