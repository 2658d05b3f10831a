#pragma once

// What a score holds on a device: the tables of its tree of tokens, what its layers leave, and
// scratch. Sizes follow from the request alone, so what is asked for is what will be allocated.

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../runtime.h"
#include "alignpro/core/buffer_pool.h"
#include "alignpro/model/prefix_tree.h"
#include "alignpro/model/scorer.h"
#include "device_layer.h"

namespace alignpro::cuda {

// Some sequences of a request with their common beginnings once (model::PrefixTree), and which row
// each scored token is predicted from.
class ScoreTree {
 public:
  ScoreTree(const model::ScoreRequest& request, std::span<const int64_t> members);
  ScoreTree(const ScoreTree&) = delete;  // the tree's spans point into it
  ScoreTree& operator=(const ScoreTree&) = delete;

  int64_t rows() const { return tree_.batch().rows(); }
  int64_t values() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t blocks() const { return tree_.blocks(); }
  int64_t most_rows() const { return most_rows_; }  // of a segment
  int64_t segments() const { return static_cast<int64_t>(segments_.size()); }
  int64_t copies() const { return static_cast<int64_t>(copies_.size()); }
  int64_t table_ld() const { return table_ld_; }

  // All of it as the ops read it.
  struct Tables {
    int32_t *tokens, *positions, *write_blocks;  // [rows]
    KvCopy* copies;                              // of blocks that a segment's parent began
    Segment* segments;                           // [segments]
    int32_t* block_table;                        // [segments, table_ld]
    int32_t *child_begins, *children;            // [segments + 1], those of each
    int32_t *value_rows, *value_tokens;          // [values]
    int32_t *value_begins, *row_values;          // [rows + 1], the values of each row
  };
  Tables cut(Workspace& from) const;
  void write(const Tables& staged) const;

 private:
  model::PrefixTree tree_;
  int64_t most_rows_ = 0, table_ld_ = 1;
  std::vector<int32_t> write_blocks_, viewer_begins_, children_;
  std::vector<KvCopy> copies_;
  std::vector<Segment> segments_;
  std::vector<int32_t> value_rows_, tokens_, value_begins_, row_values_;
};

// One layer's, [rows, ...] each.
struct LayerMemory {
  LayerActivations activations;
  PagedKv kv;
  float* lse;  // [rows, heads]
};

// The memory of one pass over a tree, in pieces of a given base; of a null one, bytes alone.
class ScoreMemory {
 public:
  ScoreMemory(const DeviceWeights& weights, const model::ScoreRequest& request,
              const ScoreTree& tree)
      : weights_(weights), request_(request), tree_(tree) {}

  // From the forward on, to the backward where there is one.
  struct Kept {
    ScoreTree::Tables tables;
    int64_t table_bytes;  // from the base on
    // The stream that enters each layer and leaves the last; one without a backward.
    std::vector<Matrix> streams;
    std::vector<LayerMemory> layers;  // by layer, where they are kept
    Matrix hidden, reference_hidden;  // [values, hidden_size] normed
    float* results;                   // [5][values] as `outputs` names them
    LogprobOutput outputs;
    int64_t bytes;
  };
  struct Forward {
    Matrix normed, activated, reference_stream;
    LayerMemory layer;  // of the reference, and of the policy where layers are not kept
    void* logprob;      // a workspace
    int64_t bytes;
  };
  struct Backward {
    Matrix d_stream, d_normed;  // [rows, hidden_size]
    // First the vocabulary's, in the place of what the layers need:
    Matrix d_hidden;  // [values, hidden_size] float32
    float* upstream;  // [3][values]
    void* logprob;    // a workspace
    Matrix normed, activated;
    LayerMemory layer;  // where layers are computed again
    LayerBackwardBuffers buffers;
    std::vector<LayerGradients> gradients;  // by layer, in one piece:
    char* first_gradient;
    int64_t gradient_bytes;
    int64_t bytes;
  };
  Kept kept(void* base) const;
  Forward forward(void* base) const;
  Backward backward(void* base) const;

  bool keeps_layers() const {
    return request_.keep_graph && request_.activations == model::Activations::kKeep;
  }
  int64_t peak_bytes() const;

 private:
  using Ranks = std::array<int64_t, 4>;  // by LinearSite
  Ranks ranks(const model::Adapter* adapter, int64_t layer) const;
  Ranks most_ranks() const;  // of any layer of policy and reference
  LayerMemory cut_layer(Workspace& from, const Ranks& ranks, bool with_raw) const;
  LogprobInput logprob_input() const;  // shapes alone

  const DeviceWeights& weights_;
  const model::ScoreRequest& request_;
  const ScoreTree& tree_;
};

// A stream, pinned memory and a workspace, which cost more to make than a small score takes.
struct ScoreStaging {
  OwnedStream stream;
  PinnedBuffer tables, results;
  std::optional<FastLinear> fast;  // in mode fast
};
using ScoreStagingPool = BufferPool<ScoreStaging>;

}  // namespace alignpro::cuda
