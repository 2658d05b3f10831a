#pragma once

// One decoder layer, forward and backward, written in ops. The engine and the scorer run the same
// functions; they differ only in which buffers outlive a layer.

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/core/aligned.h"
#include "alignpro/core/buffer_pool.h"
#include "alignpro/core/parallel.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/batch.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/attention.h"

namespace alignpro::model {

// What a layer leaves behind for its backward, beside the residual stream that entered it.
struct LayerActivations {
  AlignedBuffer qkv;       // [rows, qkv_size] q and k after norm and rope
  AlignedBuffer raw_qk;    // [rows, q_size + kv_size] q and k before their norm; empty without one
  AlignedBuffer attended;  // [rows, q_size]
  AlignedBuffer middle;    // [rows, hidden] the stream between attention and MLP
  AlignedBuffer gate_up;   // [rows, 2 * intermediate]
  // By LinearSite, [rows, ranks] scale x A^T of each adapter range, one behind the other.
  std::array<AlignedBuffer, 4> low;

  void reserve(const ModelConfig& config, int64_t rows);
  // Without the low-rank part, which is Adapter::layer_ranks.
  static int64_t floats_per_row(const ModelConfig& config);
};

// Buffers that no layer needs afterwards.
struct LayerScratch {
  AlignedBuffer normed;     // [rows, hidden]
  AlignedBuffer activated;  // [rows, intermediate]
  // backward
  AlignedBuffer d_activated, d_gate_up, d_normed, d_attended, d_qkv, factors;
  AlignedBuffer d_low;      // [rows, ranks]
  AlignedBuffer d_matrix;   // one site's stacked dA, or one module's dB transposed
  AlignedBuffer attention;  // see ops::attention_backward
};

// All that scoring needs beside results: the residual stream entering each layer and leaving the
// last, the layers' activations, and scratch.
struct ScoreBuffers {
  std::vector<AlignedBuffer> streams;         // [layers + 1] x [rows, hidden]
  std::vector<LayerActivations> activations;  // by layer; one where they are computed again
  AlignedBuffer reference_stream;
  LayerActivations reference_activations;
  LayerScratch scratch;
  AlignedBuffer d_stream;
};

// Fresh pages cost about a fifteenth of a training step.
using ScoreBufferPool = BufferPool<ScoreBuffers>;

// What every layer of a pass shares.
struct PassContext {
  const Weights& weights;
  const ops::AttentionPlan& attention;
  std::span<const KvWrite> kv_writes;
  std::span<const AdapterRange> adapters;
  int64_t rows;
  const float* cos;  // [rows, rotary_dim / 2]
  const float* sin;
  ThreadPool& pool;
};

ops::AttentionShape attention_shape(const ModelConfig& config);

// out [rows, hidden] = layer(in); out may be in.
void layer_forward(const PassContext& pass, int64_t layer, const float* in, float* out,
                   const ops::KvView& kv, LayerActivations& kept, LayerScratch& scratch);

// Gradients of one adapter, module by module as Adapter::modules().
struct AdapterGradients {
  struct Module {
    std::vector<float> a;  // [rank, inputs]
    std::vector<float> b;  // [outputs, rank]
  };
  std::vector<Module> modules;

  explicit AdapterGradients(const Adapter& adapter);
};

// Turns d_stream [rows, hidden] from the gradient by the layer's output into the gradient by its
// input, and adds the adapter's gradients. All rows run with `adapter`.
void layer_backward(const PassContext& pass, const Adapter& adapter, int64_t layer, const float* in,
                    const LayerActivations& kept, std::span<const ops::SegmentRows> segment_rows,
                    float* d_stream, AdapterGradients& gradients, LayerScratch& scratch);

}  // namespace alignpro::model
