#include "alignpro/model/layer.h"

namespace alignpro::model {
namespace {

using ops::Matrix;

const ops::Weight& weight_of(const LayerPass& pass, int64_t layer, LinearSite site) {
  return pass.weights.layers[static_cast<size_t>(layer)].linear(site);
}

// The MLP's op and its gradient, by the activation of its gate.
struct GatedUnit {
  void (ops::Ops::*forward)(const Matrix& gate_up, const Matrix& h);
  void (ops::Ops::*backward)(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up);
};

GatedUnit gate_of(const ModelConfig& config) {
  if (config.gelu) return {&ops::Ops::geglu, &ops::Ops::geglu_backward};
  return {&ops::Ops::swiglu, &ops::Ops::swiglu_backward};
}

// `rows` of a matrix as wide as the ranks, where there are any.
Matrix cut_ranks(const Matrix& all, int64_t begin, int64_t rows, int64_t ranks) {
  return {ops::at(all.data, begin * block_bytes(all.dtype)), rows, ranks, ranks, all.dtype};
}

// A product of the layer: the base weights with each range's adapter.
void apply_linear(const LayerPass& pass, int64_t layer, LinearSite site, const Matrix& x,
                  ops::LinearExtras extras, const Matrix& out, const LayerActivations& saved) {
  std::vector<ops::LoraRows> lora;
  int64_t used = 0;
  for (const LoraRange& range : pass.ranges) {
    const ops::LoraWeight* update = range.adapter->update(layer, site);
    if (update == nullptr) continue;
    const int64_t rows = range.end - range.begin;
    lora.push_back(
        {range.begin, range.end, update,
         cut_ranks(saved.lora_down[static_cast<size_t>(site)], used, rows, update->ranks)});
    used += rows * update->ranks;
  }
  extras.lora = lora;
  pass.ops.linear(x, weight_of(pass, layer, site), extras, out);
}

// dx = dy (W + update), and the update's gradients. x is the forward's input. dx has no data where
// nothing trainable lies below.
void linear_backward(const LayerPass& pass, const DeviceAdapter& adapter, int64_t layer,
                     LinearSite site, const Matrix& x, const LayerActivations& saved,
                     const Matrix& dy, const Matrix& dx, const LayerBackwardBuffers& buffers,
                     const LayerGradients& gradients) {
  const ops::Weight& w = weight_of(pass, layer, site);
  const ops::LoraWeight* update = adapter.update(layer, site);
  if (update == nullptr) {
    if (dx.data != nullptr) pass.ops.linear_backward(dy, w, nullptr, {}, dx);
    return;
  }
  const Matrix d_lora_down = cut_ranks(buffers.d_lora_down, 0, dy.rows, update->ranks);
  const Matrix lora_down =
      cut_ranks(saved.lora_down[static_cast<size_t>(site)], 0, dy.rows, update->ranks);
  pass.ops.linear_backward(dy, w, update, d_lora_down, dx);
  const SiteGradients& to = gradients[static_cast<size_t>(site)];
  pass.ops.lora_backward(*update, x, lora_down, dy, d_lora_down, to.a, to.b, buffers.lora);
}

// out = residual + the product at `site`, or its norm where the family has one there. raw keeps
// what is normed; without data the scratch `normed` does, which x is not.
void apply_block_output(const LayerPass& pass, int64_t layer, LinearSite site, const Matrix& x,
                        const void* norm, const Matrix& raw, const Matrix& residual,
                        const Matrix& out, const LayerActivations& saved) {
  if (norm == nullptr) {
    apply_linear(pass, layer, site, x, {.residual = residual}, out, saved);
    return;
  }
  const Matrix& to = raw.data == nullptr ? saved.normed : raw;
  apply_linear(pass, layer, site, x, {}, to, saved);
  pass.ops.rms_norm_add(to, norm, static_cast<float>(pass.weights.config.rms_eps), residual, out);
}

// The gradient by the product: d_stream itself, or that by what was normed, in `to`.
Matrix block_output_backward(const LayerPass& pass, const void* norm, const Matrix& raw,
                             const Matrix& d_stream, const Matrix& to) {
  if (norm == nullptr) return d_stream;
  pass.ops.clear(to.data, to.rows * to.ld * block_bytes(to.dtype));
  pass.ops.rms_norm_backward(raw, norm, static_cast<float>(pass.weights.config.rms_eps), d_stream,
                             to);
  return to;
}

}  // namespace

LayerActivations cut_activations(ops::Workspace& from, const ModelConfig& c, int64_t rows,
                                 DType dtype) {
  LayerActivations layer;
  layer.qkv = from.matrix(rows, c.qkv_size(), dtype);
  layer.attention_output = from.matrix(rows, c.q_size(), dtype);
  layer.gate_up = from.matrix(rows, 2 * c.intermediate_size, dtype);
  return layer;
}

void cut_scratch(LayerActivations& layer, ops::Workspace& from, const ModelConfig& c, int64_t rows,
                 DType dtype) {
  layer.normed = from.matrix(rows, c.hidden_size, dtype);
  layer.activated = from.matrix(rows, c.intermediate_size, dtype);
}

void embed(const LayerPass& pass, const Matrix& out) {
  pass.ops.embedding(pass.plan, *pass.weights.embedding, pass.weights.embedding_scale, out);
  for (const LoraRange& range : pass.ranges) {
    const ops::SoftRows* soft = range.adapter->soft_rows();
    if (soft != nullptr) pass.ops.soft_rows(pass.plan, *soft, {range.begin, range.end}, out);
  }
}

void layer_forward(const LayerPass& pass, int64_t layer, const Matrix& in, const Matrix& out,
                   const LayerActivations& saved, void* workspace) {
  const ModelConfig& c = pass.weights.config;
  const LayerWeights& w = pass.weights.layers[static_cast<size_t>(layer)];
  const auto eps = static_cast<float>(c.rms_eps);
  const size_t kind = c.attention_kind(layer);
  ops::Ops& ops = pass.ops;

  ops.rms_norm(in, w.attention_norm, eps, saved.normed);
  apply_linear(pass, layer, LinearSite::kQkv, saved.normed, {.bias = w.qkv_bias}, saved.qkv, saved);
  if (c.qk_norm) {
    ops.qk_norm(pass.plan.shape(kind), saved.qkv, w.q_norm, w.k_norm, eps, saved.raw_qk);
  }
  ops.rope_kv_write(pass.plan, kind, saved.qkv, saved.kv);
  ops.attention(pass.plan, kind, saved.qkv, saved.kv, workspace, saved.attention_output,
                saved.attention_saved);
  apply_block_output(pass, layer, LinearSite::kO, saved.attention_output, w.attention_output_norm,
                     saved.raw_attention, in, saved.mlp_input, saved);

  ops.rms_norm(saved.mlp_input, w.mlp_norm, eps, saved.normed);
  apply_linear(pass, layer, LinearSite::kGateUp, saved.normed, {}, saved.gate_up, saved);
  (ops.*gate_of(c).forward)(saved.gate_up, saved.activated);
  apply_block_output(pass, layer, LinearSite::kDown, saved.activated, w.mlp_output_norm,
                     saved.raw_mlp, saved.mlp_input, out, saved);
}

void final_hidden(const LayerPass& pass, const Matrix& stream, const Matrix& out) {
  if (out.rows == 0) return;
  pass.ops.output_rows(pass.plan, stream, out);
  pass.ops.rms_norm(out, pass.weights.final_norm, static_cast<float>(pass.weights.config.rms_eps),
                    out);
}

void layer_backward(const LayerPass& pass, const DeviceAdapter& adapter, int64_t layer,
                    const Matrix& in, const LayerActivations& saved, const LayerBackwardBuffers& b,
                    const LayerGradients& gradients, const Matrix& d_stream) {
  const ModelConfig& c = pass.weights.config;
  const LayerWeights& w = pass.weights.layers[static_cast<size_t>(layer)];
  const auto eps = static_cast<float>(c.rms_eps);
  const size_t kind = c.attention_kind(layer);
  ops::Ops& ops = pass.ops;
  const bool goes_on = layer > 0 || adapter.soft_rows() != nullptr;  // something is trained below
  const auto site = [&](LinearSite which, const Matrix& x, const Matrix& dy, const Matrix& dx) {
    linear_backward(pass, adapter, layer, which, x, saved, dy, dx, b, gradients);
  };

  // MLP: stream = mlp_input + down(silu(gate) up), or its norm, and GELU's gate. d_normed has the
  // gradient by what is normed there until the next product gives it its own.
  (ops.*gate_of(c).forward)(saved.gate_up, saved.activated);
  site(LinearSite::kDown, saved.activated,
       block_output_backward(pass, w.mlp_output_norm, saved.raw_mlp, d_stream, b.d_normed),
       b.d_activated);
  (ops.*gate_of(c).backward)(saved.gate_up, b.d_activated, b.d_gate_up);
  ops.rms_norm(saved.mlp_input, w.mlp_norm, eps, saved.normed);
  site(LinearSite::kGateUp, saved.normed, b.d_gate_up, b.d_normed);
  ops.rms_norm_backward(saved.mlp_input, w.mlp_norm, eps, b.d_normed, d_stream);

  // Attention: mlp_input = in + o(attention(rope(qkv(norm(in)))))
  site(LinearSite::kO, saved.attention_output,
       block_output_backward(pass, w.attention_output_norm, saved.raw_attention, d_stream,
                             b.d_normed),
       b.d_attention_output);
  ops.attention_backward(pass.plan, kind, saved.qkv, saved.kv, saved.attention_saved,
                         saved.attention_output, b.d_attention_output, b.attention, b.d_qkv);
  ops.rope_backward(pass.plan, kind, b.d_qkv);
  if (c.qk_norm) {
    ops.qk_norm_backward(pass.plan.shape(kind), saved.raw_qk, w.q_norm, w.k_norm, eps, b.d_qkv);
  }
  ops.rms_norm(in, w.attention_norm, eps, saved.normed);
  site(LinearSite::kQkv, saved.normed, b.d_qkv, goes_on ? b.d_normed : Matrix{});
  if (goes_on) ops.rms_norm_backward(in, w.attention_norm, eps, b.d_normed, d_stream);
}

}  // namespace alignpro::model
