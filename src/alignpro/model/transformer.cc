#include "alignpro/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "alignpro/ops/linear.h"
#include "alignpro/ops/rms_norm.h"
#include "alignpro/ops/rope.h"
#include "alignpro/ops/swiglu.h"

namespace alignpro::model {
namespace {

// A product of the layer: the base weights over all rows, then each range's adapter on top.
void apply_linear(const PassContext& pass, int64_t layer, LinearSite site, const float* x, float* y,
                  const ops::Epilogue& epilogue, LayerScratch& scratch) {
  const ops::PackedMatrix& w = pass.weights.layers[static_cast<size_t>(layer)].linear(site);
  ops::linear(pass.rows, {x, w.cols()}, w, y, w.rows(), epilogue, pass.team);
  for (const AdapterRange& range : pass.adapters) {
    const int64_t rows = range.row_end - range.row_begin;
    const float* in = x + range.row_begin * w.cols();
    for (const int index : range.adapter->at(layer, site)) {
      const Adapter::Module& m = range.adapter->modules()[static_cast<size_t>(index)];
      float* low = scratch.lora.reserve(rows * m.a.rows());
      ops::linear(rows, {in, w.cols()}, m.a, low, m.a.rows(), {}, pass.team);
      float* out = y + range.row_begin * w.rows() + m.where.out_begin;
      ops::linear(rows, {low, m.a.rows()}, m.b, out, w.rows(),
                  {.scale = range.adapter->scale(), .residual = out}, pass.team);
    }
  }
}

// dx = dy W (+ residual), with the adapter's share and its gradients. x is the forward's input. The
// product with the base weights is skipped when dx is null (nothing trainable lies below).
void linear_site_backward(const PassContext& pass, const Adapter& adapter, int64_t layer,
                          LinearSite site, const float* x, const float* dy, float* dx,
                          AdapterGradients& gradients, LayerScratch& scratch) {
  const ops::PackedMatrix& w = pass.weights.layers[static_cast<size_t>(layer)].linear(site);
  const int64_t rows = pass.rows;
  if (dx != nullptr) ops::linear_backward(rows, {dy, w.rows()}, w, dx, w.cols(), {}, pass.team);
  for (const int index : adapter.at(layer, site)) {
    const Adapter::Module& m = adapter.modules()[static_cast<size_t>(index)];
    AdapterGradients::Module& gradient = gradients.modules[static_cast<size_t>(index)];
    const int64_t rank = m.a.rows(), outputs = m.b.rows();
    const float* dy_module = dy + m.where.out_begin;
    float* low = scratch.lora.reserve(rows * rank);
    float* d_low = scratch.d_lora.reserve(rows * rank);
    ops::linear(rows, {x, w.cols()}, m.a, low, rank, {}, pass.team);
    ops::linear_backward(rows, {dy_module, w.rows()}, m.b, d_low, rank, {.scale = adapter.scale()},
                         pass.team);
    ops::matmul(rank, w.cols(), rows, {d_low, 1, rank}, x, w.cols(), gradient.a.data(), w.cols(),
                {}, pass.team);
    ops::matmul(outputs, rank, rows, {dy_module, 1, w.rows()}, low, rank, gradient.b.data(), rank,
                {.scale = adapter.scale()}, pass.team);
    if (dx != nullptr) {
      ops::linear_backward(rows, {d_low, rank}, m.a, dx, w.cols(), {.residual = dx}, pass.team);
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

  ops::rms_norm(rows, hidden, in, hidden, w.attention_norm.data(), eps, normed, hidden, nullptr,
                pass.team);
  apply_linear(pass, layer, LinearSite::kQkv, normed, qkv,
               {.bias = w.qkv_bias.empty() ? nullptr : w.qkv_bias.data()}, scratch);
  if (config.qk_norm) {
    const int64_t width = config.q_size() + config.kv_size(), d = config.head_dim;
    for (int64_t row = 0; row < rows; ++row) {
      float* raw = kept.raw_qk.data() + row * width;
      float* to = qkv + row * config.qkv_size();
      std::memcpy(raw, to, static_cast<size_t>(width) * sizeof(float));
      ops::rms_norm(config.num_heads, d, raw, d, w.q_norm.data(), eps, to, d, nullptr, pass.team);
      ops::rms_norm(config.num_kv_heads, d, raw + config.q_size(), d, w.k_norm.data(), eps,
                    to + config.q_size(), d, nullptr, pass.team);
    }
  }
  ops::rope(rows, qkv, config.qkv_size(), config.num_heads + config.num_kv_heads, config.head_dim,
            config.rope.rotary_dim, pass.cos, pass.sin, pass.team);
  ops::kv_write(shape, qkv, pass.kv_writes, kv, pass.team);
  ops::attention(shape, qkv, pass.segments, kv, kept.attended.data(), pass.team);
  apply_linear(pass, layer, LinearSite::kO, kept.attended.data(), kept.middle.data(),
               {.residual = in}, scratch);

  ops::rms_norm(rows, hidden, kept.middle.data(), hidden, w.mlp_norm.data(), eps, normed, hidden,
                nullptr, pass.team);
  apply_linear(pass, layer, LinearSite::kGateUp, normed, kept.gate_up.data(), {}, scratch);
  float* activated = scratch.activated.reserve(rows * mlp);
  ops::swiglu(rows, mlp, kept.gate_up.data(), activated, pass.team);
  apply_linear(pass, layer, LinearSite::kDown, activated, out, {.residual = kept.middle.data()},
               scratch);
}

AdapterGradients::AdapterGradients(const Adapter& adapter) {
  for (const Adapter::Module& m : adapter.modules()) {
    modules.push_back({std::vector<float>(static_cast<size_t>(m.a.rows() * m.a.cols())),
                       std::vector<float>(static_cast<size_t>(m.b.rows() * m.b.cols()))});
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

  // MLP: stream = middle + down(silu(gate) up)
  float* activated = scratch.activated.reserve(rows * mlp);
  float* d_activated = scratch.d_activated.reserve(rows * mlp);
  float* d_gate_up = scratch.d_gate_up.reserve(rows * 2 * mlp);
  ops::swiglu(rows, mlp, kept.gate_up.data(), activated, pass.team);
  linear_site_backward(pass, adapter, layer, LinearSite::kDown, activated, d_stream, d_activated,
                       gradients, scratch);
  ops::swiglu_backward(rows, mlp, kept.gate_up.data(), d_activated, d_gate_up, pass.team);
  ops::rms_norm(rows, hidden, kept.middle.data(), hidden, w.mlp_norm.data(), eps, normed, hidden,
                factors, pass.team);
  linear_site_backward(pass, adapter, layer, LinearSite::kGateUp, normed, d_gate_up, d_normed,
                       gradients, scratch);
  ops::rms_norm_backward(rows, hidden, kept.middle.data(), hidden, w.mlp_norm.data(), factors,
                         d_normed, hidden, d_stream, hidden, pass.team);

  // Attention: middle = in + o(attention(rope(qkv(norm(in)))))
  float* d_attended = scratch.d_attended.reserve(rows * config.q_size());
  float* d_qkv = scratch.d_qkv.reserve(rows * qkv_size);
  linear_site_backward(pass, adapter, layer, LinearSite::kO, kept.attended.data(), d_stream,
                       d_attended, gradients, scratch);
  std::fill(d_qkv, d_qkv + rows * qkv_size, 0.0f);
  ops::attention_backward(shape, kept.qkv.data(), kept.attended.data(), d_attended, segment_rows,
                          d_qkv, pass.team);
  const int64_t half = config.rope.rotary_dim / 2;
  std::vector<float> back(pass.sin, pass.sin + rows * half);
  for (float& s : back) s = -s;
  ops::rope(rows, d_qkv, qkv_size, config.num_heads + config.num_kv_heads, config.head_dim,
            config.rope.rotary_dim, pass.cos, back.data(), pass.team);
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
                      pass.team);
        ops::rms_norm_backward(heads, d, raw + offset, d, weight.data(), factors,
                               before.data() + offset, d, dq + offset, d, pass.team);
      };
      head_norm(0, config.num_heads, w.q_norm);
      head_norm(config.q_size(), config.num_kv_heads, w.k_norm);
    }
  }
  ops::rms_norm(rows, hidden, in, hidden, w.attention_norm.data(), eps, normed, hidden, factors,
                pass.team);
  linear_site_backward(pass, adapter, layer, LinearSite::kQkv, normed, d_qkv,
                       layer > 0 ? d_normed : nullptr, gradients, scratch);
  if (layer > 0) {
    ops::rms_norm_backward(rows, hidden, in, hidden, w.attention_norm.data(), factors, d_normed,
                           hidden, d_stream, hidden, pass.team);
  }
}

}  // namespace alignpro::model
