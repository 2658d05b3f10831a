#include "alignpro/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "alignpro/core/trace.h"
#include "alignpro/model/op_counts.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/rms_norm.h"
#include "alignpro/ops/rope.h"
#include "alignpro/ops/swiglu.h"

namespace alignpro::model {
namespace {

// A product of the layer: the base weights with each range's adapter, in one pass over the rows.
void apply_linear(const PassContext& pass, int64_t layer, LinearSite site, const float* x, float* y,
                  const ops::Epilogue& epilogue, LayerActivations& kept) {
  const ops::PackedMatrix& w = pass.weights.layers[static_cast<size_t>(layer)].linear(site);
  std::vector<ops::LowRankRows> updates;
  int64_t floats = 0;
  for (const AdapterRange& range : pass.adapters) {
    const ops::LowRank* update = range.adapter->update(layer, site);
    if (update == nullptr) continue;
    updates.push_back({range.row_begin, range.row_end, update, nullptr});
    floats += (range.row_end - range.row_begin) * update->ranks();
  }
  float* low = kept.low[static_cast<size_t>(site)].reserve(floats);
  for (ops::LowRankRows& u : updates) {
    u.low = low;
    low += (u.row_end - u.row_begin) * u.update->ranks();
  }
  const trace::Span span(trace::Level::kOps, kLinearNames[static_cast<size_t>(site)], [&] {
    return linear_counts(pass.rows, w, epilogue, pass.adapters, layer, site);
  });
  ops::linear(pass.rows, {x, w.cols()}, w, y, w.rows(), epilogue, pass.pool, updates);
}

// dx = dy (W + update), and the adapter's gradients. x is the forward's input, low what it left. dx
// is null where nothing trainable lies below.
void linear_site_backward(const PassContext& pass, const Adapter& adapter, int64_t layer,
                          LinearSite site, const float* x, const AlignedBuffer& low,
                          const float* dy, float* dx, AdapterGradients& gradients,
                          LayerScratch& scratch) {
  const ops::PackedMatrix& w = pass.weights.layers[static_cast<size_t>(layer)].linear(site);
  const int64_t rows = pass.rows, inputs = w.cols();
  const ops::LowRank* update = adapter.update(layer, site);
  const int64_t ranks = update != nullptr ? update->ranks() : 0;
  float* d_low = scratch.d_low.reserve(rows * ranks);
  if (dx != nullptr || update != nullptr) {
    ops::linear_backward(rows, {dy, w.rows()}, w, dx, inputs, {}, pass.pool, update, d_low);
  }
  if (update == nullptr) return;
  float* d_a = scratch.d_matrix.reserve(std::max(ranks * inputs, adapter.max_rank() * w.rows()));
  ops::matmul(ranks, inputs, rows, {d_low, 1, ranks}, x, inputs, d_a, inputs, {}, pass.pool);
  for (const int index : adapter.at(layer, site)) {
    const Adapter::Module& m = adapter.modules()[static_cast<size_t>(index)];
    auto& gradient = gradients.modules[static_cast<size_t>(index)];
    std::copy_n(d_a + m.rank_begin * inputs, m.rank * inputs, gradient.a.begin());
  }
  for (const int index : adapter.at(layer, site)) {
    const Adapter::Module& m = adapter.modules()[static_cast<size_t>(index)];
    auto& gradient = gradients.modules[static_cast<size_t>(index)];
    const int64_t outputs = m.where.outputs;
    float* d_b = scratch.d_matrix.data();  // [rank, outputs]
    ops::matmul(m.rank, outputs, rows, {low.data() + m.rank_begin, 1, ranks},
                dy + m.where.out_begin, w.rows(), d_b, outputs, {}, pass.pool);
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t r = 0; r < m.rank; ++r) {
        gradient.b[static_cast<size_t>(n * m.rank + r)] = d_b[r * outputs + n];
      }
    }
  }
}

}  // namespace

void LayerActivations::reserve(const ModelConfig& config, int64_t rows) {
  qkv.reserve(rows * config.qkv_size());
  if (config.qk_norm) raw_qk.reserve(rows * (config.q_size() + config.kv_size()));
  attended.reserve(rows * config.q_size());
  middle.reserve(rows * config.hidden_size);
  gate_up.reserve(rows * 2 * config.intermediate_size);
}

int64_t LayerActivations::floats_per_row(const ModelConfig& config) {
  return config.qkv_size() + (config.qk_norm ? config.q_size() + config.kv_size() : 0) +
         config.q_size() + config.hidden_size + 2 * config.intermediate_size;
}

ops::AttentionShape attention_shape(const ModelConfig& config) {
  return {config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim)))};
}

void layer_forward(const PassContext& pass, int64_t layer, const float* in, float* out,
                   const ops::KvView& kv, LayerActivations& kept, LayerScratch& scratch) {
  const ModelConfig& config = pass.weights.config;
  const LayerWeights& w = pass.weights.layers[static_cast<size_t>(layer)];
  const ops::AttentionShape shape = attention_shape(config);
  const int64_t rows = pass.rows, hidden = config.hidden_size, mlp = config.intermediate_size;
  const float eps = static_cast<float>(config.rms_eps);
  kept.reserve(config, rows);
  float* normed = scratch.normed.reserve(rows * hidden);
  float* qkv = kept.qkv.data();
  trace::Span op;
  const auto begin = [&op](const char* name, const auto& counts_of) {
    op.begin(trace::Level::kOps, name, counts_of);
  };

  begin("rms_norm", [&] { return rms_norm_counts(rows, hidden); });
  ops::rms_norm(rows, hidden, in, hidden, w.attention_norm.data(), eps, normed, hidden, nullptr,
                pass.pool);
  op.end();
  apply_linear(pass, layer, LinearSite::kQkv, normed, qkv,
               {.bias = w.qkv_bias.empty() ? nullptr : w.qkv_bias.data()}, kept);
  if (config.qk_norm) {
    const int64_t width = config.q_size() + config.kv_size(), d = config.head_dim;
    begin("qk_norm", [&] { return rms_norm_counts(rows, width); });
    for (int64_t row = 0; row < rows; ++row) {
      float* raw = kept.raw_qk.data() + row * width;
      float* to = qkv + row * config.qkv_size();
      std::memcpy(raw, to, static_cast<size_t>(width) * sizeof(float));
      ops::rms_norm(config.num_heads, d, raw, d, w.q_norm.data(), eps, to, d, nullptr, pass.pool);
      ops::rms_norm(config.num_kv_heads, d, raw + config.q_size(), d, w.k_norm.data(), eps,
                    to + config.q_size(), d, nullptr, pass.pool);
    }
  }
  begin("rope", [&] {
    return rope_counts(rows, config.num_heads + config.num_kv_heads, config.rope.rotary_dim);
  });
  ops::rope(rows, qkv, config.qkv_size(), config.num_heads + config.num_kv_heads, config.head_dim,
            config.rope.rotary_dim, pass.cos, pass.sin, pass.pool);
  begin("kv_write", [&] {
    return kv_write_counts(shape, static_cast<int64_t>(pass.kv_writes.size()), kv.dtype);
  });
  ops::kv_write(shape, qkv, pass.kv_writes, kv, pass.pool);
  begin("attention", [&] { return attention_counts(shape, pass.attention, kv.dtype); });
  ops::attention(shape, qkv, pass.attention, kv, kept.attended.data(), pass.pool);
  op.end();
  apply_linear(pass, layer, LinearSite::kO, kept.attended.data(), kept.middle.data(),
               {.residual = in}, kept);

  begin("rms_norm", [&] { return rms_norm_counts(rows, hidden); });
  ops::rms_norm(rows, hidden, kept.middle.data(), hidden, w.mlp_norm.data(), eps, normed, hidden,
                nullptr, pass.pool);
  op.end();
  apply_linear(pass, layer, LinearSite::kGateUp, normed, kept.gate_up.data(), {}, kept);
  float* activated = scratch.activated.reserve(rows * mlp);
  begin("swiglu", [&] { return swiglu_counts(rows, mlp); });
  ops::swiglu(rows, mlp, kept.gate_up.data(), activated, pass.pool);
  op.end();
  apply_linear(pass, layer, LinearSite::kDown, activated, out, {.residual = kept.middle.data()},
               kept);
}

AdapterGradients::AdapterGradients(const Adapter& adapter) {
  for (const Adapter::Module& m : adapter.modules()) {
    modules.push_back({std::vector<float>(static_cast<size_t>(m.rank * m.where.inputs)),
                       std::vector<float>(static_cast<size_t>(m.where.outputs * m.rank))});
  }
}

void layer_backward(const PassContext& pass, const Adapter& adapter, int64_t layer, const float* in,
                    const LayerActivations& kept, std::span<const ops::SegmentRows> segment_rows,
                    float* d_stream, AdapterGradients& gradients, LayerScratch& scratch) {
  const ModelConfig& config = pass.weights.config;
  const LayerWeights& w = pass.weights.layers[static_cast<size_t>(layer)];
  const ops::AttentionShape shape = attention_shape(config);
  const int64_t rows = pass.rows, hidden = config.hidden_size, mlp = config.intermediate_size;
  const int64_t qkv_size = config.qkv_size();
  const float eps = static_cast<float>(config.rms_eps);
  float* normed = scratch.normed.reserve(rows * hidden);
  float* factors = scratch.factors.reserve(rows * std::max<int64_t>(1, config.num_heads));
  float* d_normed = scratch.d_normed.reserve(rows * hidden);

  const auto low = [&kept](LinearSite site) -> const AlignedBuffer& {
    return kept.low[static_cast<size_t>(site)];
  };

  // MLP: stream = middle + down(silu(gate) up)
  float* activated = scratch.activated.reserve(rows * mlp);
  float* d_activated = scratch.d_activated.reserve(rows * mlp);
  float* d_gate_up = scratch.d_gate_up.reserve(rows * 2 * mlp);
  ops::swiglu(rows, mlp, kept.gate_up.data(), activated, pass.pool);
  linear_site_backward(pass, adapter, layer, LinearSite::kDown, activated, low(LinearSite::kDown),
                       d_stream, d_activated, gradients, scratch);
  ops::swiglu_backward(rows, mlp, kept.gate_up.data(), d_activated, d_gate_up, pass.pool);
  ops::rms_norm(rows, hidden, kept.middle.data(), hidden, w.mlp_norm.data(), eps, normed, hidden,
                factors, pass.pool);
  linear_site_backward(pass, adapter, layer, LinearSite::kGateUp, normed, low(LinearSite::kGateUp),
                       d_gate_up, d_normed, gradients, scratch);
  ops::rms_norm_backward(rows, hidden, kept.middle.data(), hidden, w.mlp_norm.data(), factors,
                         d_normed, hidden, d_stream, hidden, pass.pool);

  // Attention: middle = in + o(attention(rope(qkv(norm(in)))))
  float* d_attended = scratch.d_attended.reserve(rows * config.q_size());
  float* d_qkv = scratch.d_qkv.reserve(rows * qkv_size);
  linear_site_backward(pass, adapter, layer, LinearSite::kO, kept.attended.data(),
                       low(LinearSite::kO), d_stream, d_attended, gradients, scratch);
  std::fill(d_qkv, d_qkv + rows * qkv_size, 0.0f);
  ops::attention_backward(shape, kept.qkv.data(), kept.attended.data(), d_attended, segment_rows,
                          d_qkv, scratch.attention, pass.pool);
  const int64_t half = config.rope.rotary_dim / 2;
  std::vector<float> back(pass.sin, pass.sin + rows * half);
  for (float& s : back) s = -s;
  ops::rope(rows, d_qkv, qkv_size, config.num_heads + config.num_kv_heads, config.head_dim,
            config.rope.rotary_dim, pass.cos, back.data(), pass.pool);
  if (config.qk_norm) {
    const int64_t width = config.q_size() + config.kv_size(), d = config.head_dim;
    std::vector<float> before(static_cast<size_t>(width)), again(static_cast<size_t>(width));
    for (int64_t row = 0; row < rows; ++row) {
      const float* raw = kept.raw_qk.data() + row * width;
      float* dq = d_qkv + row * qkv_size;
      std::copy(dq, dq + width, before.begin());
      std::fill(dq, dq + width, 0.0f);
      const auto head_norm = [&](int64_t offset, int64_t heads, const std::vector<float>& weight) {
        ops::rms_norm(heads, d, raw + offset, d, weight.data(), eps, again.data(), d, factors,
                      pass.pool);
        ops::rms_norm_backward(heads, d, raw + offset, d, weight.data(), factors,
                               before.data() + offset, d, dq + offset, d, pass.pool);
      };
      head_norm(0, config.num_heads, w.q_norm);
      head_norm(config.q_size(), config.num_kv_heads, w.k_norm);
    }
  }
  ops::rms_norm(rows, hidden, in, hidden, w.attention_norm.data(), eps, normed, hidden, factors,
                pass.pool);
  linear_site_backward(pass, adapter, layer, LinearSite::kQkv, normed, low(LinearSite::kQkv), d_qkv,
                       layer > 0 ? d_normed : nullptr, gradients, scratch);
  if (layer > 0) {
    ops::rms_norm_backward(rows, hidden, in, hidden, w.attention_norm.data(), factors, d_normed,
                           hidden, d_stream, hidden, pass.pool);
  }
}

}  // namespace alignpro::model
