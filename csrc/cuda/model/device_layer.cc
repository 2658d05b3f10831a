#include "device_layer.h"

namespace alignpro::cuda {
namespace {

using model::LinearSite;

const Matrix& weight_of(const DeviceWeights& weights, int64_t layer, LinearSite site) {
  return weights.layers[static_cast<size_t>(layer)].linears[static_cast<size_t>(site)];
}

// x A^T of so many rows, where there is room for it.
Matrix low_rank(const Matrix& low, int64_t rows, const DeviceLowRank& update) {
  return {low.data, rows, update.ranks(), update.ranks(), low.dtype};
}

// A product of the layer, range by range: the base weights with the adapter's update, in mode
// strict in the same pass.
void apply_linear(const LayerPass& pass, int64_t layer, LinearSite site, const Matrix& x,
                  const LinearExtras& extras, const Matrix& out, const LayerActivations& kept) {
  const Matrix& w = weight_of(pass.weights, layer, site);
  for (const AdapterRows& range : pass.ranges) {
    const Matrix from = rows_of(x, range.begin, range.end);
    LinearExtras joined = extras;
    joined.residual = rows_of(extras.residual, range.begin, range.end);
    const Matrix to = rows_of(out, range.begin, range.end);
    const DeviceLowRank* update =
        range.adapter == nullptr ? nullptr : &range.adapter->update(layer, site);
    const bool with_update = update != nullptr && update->ranks() > 0;
    if (with_update) {
      joined.lora_x = low_rank(kept.low[static_cast<size_t>(site)], from.rows, *update);
      joined.lora_up = update->b;
      joined.lora_scale = update->scale;
    }
    if (pass.fast != nullptr) {
      pass.fast->multiply(from, w, 1.0f, joined.bias, joined.residual, to);
      if (!with_update) continue;
      pass.fast->multiply(from, update->a, 1.0f, nullptr, {}, joined.lora_x);
      pass.fast->multiply(joined.lora_x, update->b, update->scale, nullptr, to, to);
      continue;
    }
    if (with_update) linear(from, update->a, {}, joined.lora_x, pass.stream);
    linear(from, w, joined, to, pass.stream);
  }
}

// dx = dy (W + update), and the update's gradients. x is the forward's input. dx has no data where
// nothing trainable lies below.
void site_backward(const LayerPass& pass, const DeviceAdapter& adapter, int64_t layer,
                   LinearSite site, const Matrix& x, const LayerActivations& kept, const Matrix& dy,
                   const Matrix& dx, const LayerBackwardBuffers& buffers,
                   const LayerGradients& gradients) {
  const Matrix& w = weight_of(pass.weights, layer, site);
  const DeviceLowRank& update = adapter.update(layer, site);
  if (update.ranks() == 0) {
    if (dx.data != nullptr) linear_backward(dy, w, {}, dx, pass.stream);
    return;
  }
  const Matrix d_low = low_rank(buffers.d_low, dy.rows, update);
  linear_backward(dy, w, {{}, update.a, update.b, d_low, update.scale}, dx, pass.stream);
  const Matrix low = low_rank(kept.low[static_cast<size_t>(site)], dy.rows, update);
  const SiteGradients& to = gradients[static_cast<size_t>(site)];
  lora_backward({x, low, dy, d_low, update.scale}, to.a, to.b, buffers.lora, pass.stream);
}

}  // namespace

Matrix rows_of(const Matrix& m, int64_t begin, int64_t end) {
  if (m.data == nullptr) return m;
  return {at(m.data, begin * m.ld * block_bytes(m.dtype)), end - begin, m.cols, m.ld, m.dtype};
}

// As model::layer_forward, op for op.
void layer_forward(const LayerPass& pass, int64_t layer, const Matrix& in, const Matrix& out,
                   const PagedKv& kv, const LayerActivations& kept, const Attend& attend) {
  const model::ModelConfig& c = pass.weights.config;
  const DeviceLayer& w = pass.weights.layers[static_cast<size_t>(layer)];
  const AttentionShape shape = pass.weights.attention();
  const auto eps = static_cast<float>(c.rms_eps);
  const Stream stream = pass.stream;

  rms_norm(in, w.attention_norm, eps, kept.normed, stream);
  apply_linear(pass, layer, LinearSite::kQkv, kept.normed, {.bias = w.qkv_bias}, kept.qkv, kept);
  if (c.qk_norm) {
    if (kept.raw_qkv.data != nullptr) {
      const int64_t width = block_bytes(kept.qkv.dtype);
      copy_pieces(kept.raw_qkv.data, kept.qkv.data, kept.qkv.ld * width,
                  (c.q_size() + c.kv_size()) * width, kept.qkv.rows, stream);
    }
    qk_norm(shape, kept.qkv, w.q_norm, w.k_norm, eps, stream);
  }
  rope_kv_write(shape, kept.qkv, c.rope.rotary_dim, pass.weights.cos, pass.weights.sin,
                pass.positions, pass.write_blocks, kv, stream);
  attend(kept.qkv, kv, kept.attended);
  apply_linear(pass, layer, LinearSite::kO, kept.attended, {.residual = in}, kept.middle, kept);

  rms_norm(kept.middle, w.mlp_norm, eps, kept.normed, stream);
  apply_linear(pass, layer, LinearSite::kGateUp, kept.normed, {}, kept.gate_up, kept);
  swiglu(kept.gate_up, kept.activated, stream);
  apply_linear(pass, layer, LinearSite::kDown, kept.activated, {.residual = kept.middle}, out,
               kept);
}

// As model::layer_backward, op for op.
void layer_backward(const LayerPass& pass, const DeviceAdapter& adapter, int64_t layer,
                    const Matrix& in, const PagedKv& kv, const float* lse,
                    const LayerActivations& kept, AttentionBackwardInput attention,
                    const LayerBackwardBuffers& b, const LayerGradients& gradients,
                    const Matrix& d_stream) {
  const model::ModelConfig& c = pass.weights.config;
  const DeviceLayer& w = pass.weights.layers[static_cast<size_t>(layer)];
  const AttentionShape shape = pass.weights.attention();
  const auto eps = static_cast<float>(c.rms_eps);
  const Stream stream = pass.stream;
  const auto site = [&](LinearSite which, const Matrix& x, const Matrix& dy, const Matrix& dx) {
    site_backward(pass, adapter, layer, which, x, kept, dy, dx, b, gradients);
  };

  // MLP: stream = middle + down(silu(gate) up)
  swiglu(kept.gate_up, kept.activated, stream);
  site(LinearSite::kDown, kept.activated, d_stream, b.d_activated);
  swiglu_backward(kept.gate_up, b.d_activated, b.d_gate_up, stream);
  rms_norm(kept.middle, w.mlp_norm, eps, kept.normed, stream);
  site(LinearSite::kGateUp, kept.normed, b.d_gate_up, b.d_normed);
  rms_norm_backward(kept.middle, w.mlp_norm, eps, b.d_normed, d_stream, stream);

  // Attention: middle = in + o(attention(rope(qkv(norm(in)))))
  site(LinearSite::kO, kept.attended, d_stream, b.d_attended);
  attention.qkv = kept.qkv;
  attention.out = kept.attended;
  attention.dout = b.d_attended;
  attention.lse = lse;
  attention.kv = kv;
  attention_backward(shape, attention, b.d_qkv, b.attention, stream);
  rope_backward(shape, b.d_qkv, c.rope.rotary_dim, pass.weights.cos, pass.weights.sin,
                pass.positions, stream);
  if (c.qk_norm) qk_norm_backward(shape, kept.raw_qkv, w.q_norm, w.k_norm, eps, b.d_qkv, stream);
  rms_norm(in, w.attention_norm, eps, kept.normed, stream);
  site(LinearSite::kQkv, kept.normed, b.d_qkv, layer > 0 ? b.d_normed : Matrix{});
  if (layer > 0) {
    rms_norm_backward(in, w.attention_norm, eps, b.d_normed, d_stream, stream);
  }
}

}  // namespace alignpro::cuda
