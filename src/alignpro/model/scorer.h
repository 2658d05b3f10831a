#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/model.h"
#include "alignpro/model/prefix_tree.h"
#include "alignpro/model/transformer.h"

namespace alignpro::model {

// What a score keeps of each layer for its backward.
enum class Activations {
  kKeep,       // everything: LayerActivations::floats_per_row a row and layer
  kRecompute,  // the residual stream alone; each layer is run again, to the same bits
};

struct ScoreRequest {
  std::vector<std::vector<int32_t>> sequences;
  std::vector<int64_t> starts;  // per sequence: tokens [start, size) are scored; 1 <= start <= size
  std::shared_ptr<const Adapter> adapter = nullptr;  // null: base weights
  float temperature = 1.0f;
  bool with_reference = false;  // also the exact KL to the distribution under
  std::shared_ptr<const Adapter> reference = nullptr;  // this adapter (null: base weights)
  bool with_hidden = false;  // also the policy's states that the tokens were predicted from
  bool keep_graph = false;   // backward() will be called; needs an adapter
  Activations activations = Activations::kKeep;
};

// Throws InvalidArgument for an empty sequence, a start out of range, a token outside the
// vocabulary, a sequence longer than the context, naming its index, and for what else does not fit.
void require_scorable(const ScoreRequest& request, const ModelConfig& config,
                      int64_t context_length);

// Sequences that are scored together, by index: all of them, in their order, where gradients are to
// follow; otherwise as many as bound the buffers, neighbours in token order, which share the most.
std::vector<std::vector<int64_t>> score_groups(const ScoreRequest& request);

// Throws InvalidArgument for derivatives that backward() does not take; it has a graph, or had one.
void require_upstream(bool has_graph, int64_t values, bool with_reference,
                      std::span<const float> d_logprob, std::span<const float> d_entropy,
                      std::span<const float> d_kl);

// Scores sequences token by token, through the layers and the vocabulary op that the engine samples
// with: a score equals the log-probability recorded when the token was drawn, to the bit.
// Tokens common to several sequences (a system prompt, the prompt of a group of rewrites) are
// computed once, forward and backward.
class Score {
 public:
  // Throws as require_scorable().
  Score(std::shared_ptr<const Model> model, ScoreRequest request);

  // Flat, sequence after sequence: sum of (size - start) values.
  const std::vector<float>& logprob() const { return logprob_; }
  const std::vector<float>& entropy() const { return entropy_; }
  const std::vector<float>& kl() const { return kl_; }                          // or empty
  const std::vector<float>& reference_logprob() const { return ref_logprob_; }  // or empty
  // [values, hidden] or empty: the normed state before each scored token, whose product with the
  // vocabulary gives the token's logits. A constant: backward() knows nothing of it.
  const std::vector<float>& hidden() const { return hidden_; }

  bool has_reference() const { return request_.with_reference; }
  bool has_hidden() const { return request_.with_hidden; }
  int64_t hidden_size() const { return model_->config().hidden_size; }
  const std::shared_ptr<const Adapter>& adapter() const { return request_.adapter; }

  // Bytes that a Score of this request and its backward() hold at their peak, at most, beside the
  // weights, the adapters and the gradients. With R rows (shared prefixes once), V scored values, L
  // layers, H hidden, F = qkv + q + H + 2 I floats of activations (+ q + k with head norms, + the
  // layer's ranks), about 4 (R (L F + (L + 14) H + ...) + 5 V H) bytes; L F is F when recomputed.
  // The hidden states, where asked for, count twice: here, and in a copy for the caller.
  // Throws as the constructor does.
  static int64_t bytes(const Model& model, const ScoreRequest& request);

  // Gradients of a loss by the adapter's matrices, from its derivatives by the outputs (flat, as
  // above; d_entropy and d_kl may be empty). May be called once: it gives the graph back.
  AdapterGradients backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                            std::span<const float> d_kl);

 private:
  struct Graph;

  struct Hidden {
    std::vector<float> policy, reference;  // [rows, hidden] normed; reference empty without one
  };

  void score_group(std::span<const int64_t> members);
  Hidden hidden_states(const PrefixTree& tree, ScoreBuffers& buffers, bool keep) const;

  std::shared_ptr<const Model> model_;
  ScoreRequest request_;
  std::vector<int64_t> offsets_;  // of each sequence's first value in the flat outputs
  std::vector<float> logprob_, entropy_, kl_, ref_logprob_, hidden_;
  std::vector<double> lse_;
  std::shared_ptr<Graph> graph_;
};

}  // namespace alignpro::model
