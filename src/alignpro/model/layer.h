#pragma once

// One decoder layer, forward and backward, written in ops, for every device. Sessions and scores
// run the same functions; they differ only in which buffers outlive a layer.

#include <array>
#include <cstdint>
#include <span>

#include "alignpro/model/adapter.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

// Rows [begin, end) run with `adapter`; rows in no range run on the base weights.
struct LoraRange {
  int64_t begin, end;
  const DeviceAdapter* adapter;
};

// What every layer of a pass shares.
struct LayerPass {
  const Weights& weights;
  ops::Ops& ops;
  const ops::Plan& plan;
  std::span<const LoraRange> ranges;
};

// What a layer leaves behind for its backward beside the residual stream that entered it, and the
// scratch it needs, [rows, ...] each.
struct LayerActivations {
  ops::Matrix normed, activated;  // never needed again
  ops::Matrix qkv;                // q and k after norm and rope, v
  ops::Matrix raw_qk;             // q and k before their norm; no data: not wanted
  ops::Matrix attention_output;   // [rows, q_size]
  ops::Matrix mlp_input;          // [rows, hidden] the stream between attention and MLP
  ops::Matrix gate_up;            // [rows, 2 * intermediate]
  // What attention and MLP add, before the norms of a family that has them there, [rows, hidden];
  // no data: not wanted.
  ops::Matrix raw_attention, raw_mlp;
  // By LinearSite: x A^T of each adapter range, one behind the other.
  std::array<ops::Matrix, 4> lora_down;
  ops::KvView kv = {};
  float* attention_saved = nullptr;  // see ops::Ops::attention
};

// qkv, attention_output and gate_up; and normed and activated.
LayerActivations cut_activations(ops::Workspace& from, const ModelConfig& config, int64_t rows,
                                 DType dtype);
void cut_scratch(LayerActivations& layer, ops::Workspace& from, const ModelConfig& config,
                 int64_t rows, DType dtype);

// out [rows, hidden]: the plan's tokens, embedded, with their adapters' soft rows where they are.
void embed(const LayerPass& pass, const ops::Matrix& out);

// out [rows, hidden] = layer(in); out may be in, and mlp_input too. workspace: attention_bytes.
void layer_forward(const LayerPass& pass, int64_t layer, const ops::Matrix& in,
                   const ops::Matrix& out, const LayerActivations& saved, void* workspace);

// The plan's output rows of the stream that leaves the last layer, normed.
void final_hidden(const LayerPass& pass, const ops::Matrix& stream, const ops::Matrix& out);

// Gradients of a site's stacked matrices, [ranks, inputs] and [outputs, ranks], float32.
struct SiteGradients {
  ops::Matrix a, b;
};
using LayerGradients = std::array<SiteGradients, 4>;  // by LinearSite; unused without an adapter

// Scratch, [rows, ...] each.
struct LayerBackwardBuffers {
  ops::Matrix d_activated, d_gate_up, d_normed, d_attention_output, d_qkv, d_lora_down;
  void *attention, *lora;  // workspaces of attention_backward and lora_backward
};

// Turns d_stream [rows, hidden] from the gradient by the layer's output into the gradient by its
// input (of the first layer, without soft rows, by its mlp_input), and writes the adapter's
// gradients. All rows run with `adapter`.
void layer_backward(const LayerPass& pass, const DeviceAdapter& adapter, int64_t layer,
                    const ops::Matrix& in, const LayerActivations& saved,
                    const LayerBackwardBuffers& buffers, const LayerGradients& gradients,
                    const ops::Matrix& d_stream);

}  // namespace alignpro::model
