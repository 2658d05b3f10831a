#pragma once

// One decoder layer on the device, forward and backward, written in ops as model/transformer.h has
// it. Sessions and scores run the same functions; they differ in which buffers outlive a layer and
// in which op attends.

#include <array>
#include <cstdint>
#include <functional>
#include <span>

#include "../fast_linear.h"
#include "../runtime.h"
#include "device_adapter.h"
#include "device_weights.h"

namespace alignpro::cuda {

// Rows [begin, end) of a matrix; of one without data, that.
Matrix rows_of(const Matrix& m, int64_t begin, int64_t end);

// Rows [begin, end) and their adapter; null: base weights.
struct AdapterRows {
  int64_t begin, end;
  const DeviceAdapter* adapter;
};

// What every layer of a pass shares. ranges cover all rows, in order.
struct LayerPass {
  const DeviceWeights& weights;
  std::span<const AdapterRows> ranges;
  const int32_t *positions, *write_blocks;  // [rows]
  Stream stream;
  FastLinear* fast;  // what multiplies in mode fast; null: linear
};

// What a layer leaves behind, [rows, ...] each. A session lets them share memory with the layer
// before; of a score some are kept for the backward.
struct LayerActivations {
  Matrix normed, activated;          // never needed again
  Matrix qkv;                        // q after norm and rope, k after norm, v
  Matrix raw_qkv;                    // before the norm of q and k; no data: not wanted
  Matrix attended, middle, gate_up;  // middle: the stream between attention and MLP
  std::array<Matrix, 4> low;         // by LinearSite: x A^T, as wide as the adapter's ranks or more
};

// Attends from qkv to what kv holds; called when this layer's keys and values are written.
using Attend = std::function<void(const Matrix& qkv, const PagedKv& kv, const Matrix& out)>;

// out [rows, hidden] = layer(in); out may be in, and middle too.
void layer_forward(const LayerPass& pass, int64_t layer, const Matrix& in, const Matrix& out,
                   const PagedKv& kv, const LayerActivations& kept, const Attend& attend);

// Gradients of a site's stacked matrices, [ranks, inputs] and [outputs, ranks], float32.
struct SiteGradients {
  Matrix a, b;
};
using LayerGradients = std::array<SiteGradients, 4>;  // by LinearSite; unused without an update

// Scratch, [rows, ...] each.
struct LayerBackwardBuffers {
  Matrix d_activated, d_gate_up, d_normed, d_attended, d_qkv, d_low;
  void *attention, *lora;  // workspaces of attention_backward and lora_backward
};

// Turns d_stream [rows, hidden] from the gradient by the layer's output into the gradient by its
// input (of the first layer, by its middle), and writes the adapter's gradients. All rows run with
// `adapter`; kept's normed and activated are scratch; `attention` says who attends with whom.
void layer_backward(const LayerPass& pass, const DeviceAdapter& adapter, int64_t layer,
                    const Matrix& in, const PagedKv& kv, const float* lse,
                    const LayerActivations& kept, AttentionBackwardInput attention,
                    const LayerBackwardBuffers& buffers, const LayerGradients& gradients,
                    const Matrix& d_stream);

}  // namespace alignpro::cuda
