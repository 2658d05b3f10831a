#pragma once

// What a score holds on its device: the plan of its tree of tokens, what its layers leave, and
// scratch. Sizes follow from the request alone, so what is asked for is what will be allocated.

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/layer.h"
#include "alignpro/model/prefix_tree.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

struct ScoreRequest;

// Ops with what belongs to them, which cost more to make than a small score takes.
struct ScoreBuffers {
  ScoreBuffers(const ops::Device& device, const Weights& weights)
      : ops(device.make_ops()),
        plan(ops->make_plan(attention_kinds(weights))),
        upstream(*ops),
        results(*ops),
        hidden(*ops),
        reference_hidden(*ops),
        given_hidden(*ops) {}

  const std::unique_ptr<ops::Ops> ops;
  const std::unique_ptr<ops::Plan> plan;
  ops::HostBuffer upstream, results, hidden, reference_hidden, given_hidden;
};

// Some sequences of a request with their common beginnings once, and which row each scored token is
// predicted from: sequence after sequence of the members.
class ScoreTree {
 public:
  ScoreTree(const ScoreRequest& request, std::span<const int64_t> members);
  ScoreTree(const ScoreTree&) = delete;  // the tree's spans point into it
  ScoreTree& operator=(const ScoreTree&) = delete;

  int64_t rows() const { return tree_.batch().rows(); }
  int64_t values() const { return static_cast<int64_t>(targets_.size()); }
  int64_t blocks() const { return tree_.blocks(); }
  ops::PlanRequest plan_request() const;

 private:
  const PrefixTree tree_;
  const int64_t soft_rows_;  // that have gradients
  std::vector<int32_t> value_rows_, targets_;
};

// The memory of one pass over a tree, in pieces of a given base; of a null one, bytes alone. The
// plan is prepared for the tree.
class ScoreMemory {
 public:
  ScoreMemory(const Weights& weights, const ops::Device& device, const ops::Ops& ops,
              const ops::Plan& plan, const ScoreRequest& request, const ScoreTree& tree,
              std::shared_ptr<const DeviceAdapter> policy,
              std::shared_ptr<const DeviceAdapter> reference);

  // From the forward on, to the backward where there is one.
  struct Kept {
    void* plan;
    // The stream that enters each layer and leaves the last; one without a backward.
    std::vector<ops::Matrix> streams;
    std::vector<LayerActivations> layers;  // by layer, where they are kept
    ops::Matrix hidden, reference_hidden;  // [values, hidden_size] normed
    void* jacobian;                        // see Ops::linear_logprob; null: none
    float* results;                        // [5][values] as `outputs` names them
    ops::LogprobOutput outputs;
    int64_t bytes;
  };
  struct Forward {
    ops::Matrix reference_stream;
    LayerActivations scratch;   // normed, activated and kv alone
    LayerActivations layer;     // of the reference, and of the policy where layers are not kept
    void *attention, *logprob;  // workspaces
    int64_t bytes;
  };
  struct Backward {
    ops::Matrix d_stream, d_normed;  // [rows, hidden_size]
    // First the vocabulary's, in the place of what the layers need:
    ops::Matrix d_hidden;  // [values, hidden_size] float32
    float* upstream;       // [3][values]
    void* logprob;         // a workspace
    LayerActivations scratch;
    LayerActivations layer;  // where layers are computed again
    void* attention;         // a workspace of the forward, there
    LayerBackwardBuffers buffers;
    std::vector<LayerGradients> gradients;  // by layer, and d_soft [m, hidden_size], in one piece:
    ops::Matrix d_soft;
    char* first_gradient;
    int64_t gradient_bytes;
    int64_t bytes;
  };
  Kept kept(void* base) const;
  Forward forward(void* base) const;
  Backward backward(void* base) const;

  bool keeps_layers() const;
  // Whether the reference's states are computed here, and not given.
  bool runs_reference() const { return runs_reference_; }
  // Bytes of the blocks of one layer.
  int64_t kv_bytes() const;
  int64_t peak_bytes() const;

 private:
  using Ranks = std::array<int64_t, 4>;  // by LinearSite
  Ranks ranks(const DeviceAdapter* adapter, int64_t layer) const;
  Ranks most_ranks() const;  // of any layer of policy and reference
  LayerActivations cut_layer(ops::Workspace& from, const Ranks& ranks, bool with_raw) const;
  void cut_kv(LayerActivations& layer, ops::Workspace& from) const;
  ops::LogprobRequest logprob_shape() const;

  const Weights& weights_;
  const ops::Ops& ops_;
  const ops::Plan& plan_;
  const ScoreRequest& request_;
  const ScoreTree& tree_;
  const DType dtype_, kv_dtype_;
  const bool runs_reference_;
  std::shared_ptr<const DeviceAdapter> policy_, reference_;
};

}  // namespace alignpro::model
