#include "alignpro/model/score_bytes.h"

#include <algorithm>

#include "alignpro/model/kv_pool.h"
#include "alignpro/model/prefix_tree.h"
#include "alignpro/model/transformer.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/packed_rows.h"

namespace alignpro::model {

int64_t score_bytes(const ModelConfig& config, const ops::PackedMatrix& head,
                    const ScoreShape& shape) {
  const PrefixTree tree(shape.sequences);
  const int64_t rows = tree.batch().rows(), hidden = config.hidden_size;
  const int64_t mlp = config.intermediate_size, layers = config.num_layers;
  const int64_t passes = shape.with_reference ? 2 : 1;
  int64_t values = 0;
  for (size_t s = 0; s < shape.sequences.size(); ++s) {
    values += static_cast<int64_t>(shape.sequences[s].size()) - shape.starts[s];
  }
  int64_t most_ranks = 0, all_ranks = 0;
  for (const int64_t ranks : shape.layer_ranks) {
    most_ranks = std::max(most_ranks, ranks);
    all_ranks += ranks;
  }
  const int64_t activations = LayerActivations::floats_per_row(config);
  const bool keep = shape.keep_graph && shape.activations == Activations::kKeep;
  // Floats a row: streams, activations, the reference's, a layer's scratch.
  int64_t row_floats = (shape.keep_graph ? layers + 1 : 1) * hidden;
  row_floats += keep ? layers * activations + all_ranks : activations + most_ranks;
  if (shape.with_reference) row_floats += hidden + activations + most_ranks;
  row_floats += hidden + mlp;
  row_floats += passes * hidden;         // normed
  row_floats += config.rope.rotary_dim;  // angles
  int64_t floats = values * hidden * (passes + (shape.with_hidden ? 2 : 0));
  const float* some = reinterpret_cast<const float*>(&head);  // only whether it is null counts
  int64_t bytes = ops::linear_logprob_bytes({.rows = values,
                                             .hidden = some,
                                             .weight = &head,
                                             .tokens = {},
                                             .ref_hidden = shape.with_reference ? some : nullptr},
                                            shape.keep_graph, shape.threads);
  if (shape.keep_graph) {
    // The backward's scratch, the stream's gradient, the Jacobian.
    row_floats += 3 * mlp + 4 * hidden + config.q_size() + config.qkv_size() + config.num_heads +
                  most_ranks + 3 + config.rope.rotary_dim / 2;
    floats += values * hidden * (passes + 1);
    floats += ops::attention_backward_floats(attention_shape(config), tree.segment_rows());
    floats += most_ranks * std::max(hidden, 2 * mlp);
  }
  floats += rows * row_floats;
  const int64_t widest = std::max({hidden, mlp, config.q_size(), 2 * mlp});
  floats += ops::kRowChunk * (widest + (shape.threads + 1) * ops::cpu::kPanel);
  bytes += (tree.blocks() + 1) *
           KvPool::block_bytes(1, config.num_kv_heads, config.head_dim, shape.kv_dtype);
  bytes += floats * static_cast<int64_t>(sizeof(float));
  return bytes + values * 64;
}

}  // namespace alignpro::model
