#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/model.h"
#include "alignpro/model/token_tree.h"
#include "alignpro/model/transformer.h"

namespace alignpro::model {

struct ScoreRequest {
  std::vector<std::vector<int32_t>> sequences;
  std::vector<int64_t> starts;  // per sequence: tokens [start, size) are scored; 1 <= start <= size
  std::shared_ptr<const Adapter> adapter;  // null: base weights
  float temperature = 1.0f;
  bool with_reference = false;               // also the exact KL to the distribution under
  std::shared_ptr<const Adapter> reference;  // this adapter (null: base weights)
  bool keep_graph = false;                   // backward() will be called; needs an adapter
  // Activations above this many bytes are computed again, layer by layer, in the backward.
  int64_t activation_bytes = int64_t{1} << 30;
};

// Scores sequences token by token, through the layers and the vocabulary op that the engine samples
// with: a score equals the log-probability recorded when the token was drawn, to the bit.
// Tokens common to several sequences (a system prompt, the prompt of a group of rewrites) are
// computed once, forward and backward.
class Score {
 public:
  // Throws InvalidArgument for an empty sequence, a start out of range, a token outside the
  // vocabulary or a sequence longer than the context, naming its index.
  Score(std::shared_ptr<const Model> model, ScoreRequest request);

  // Flat, sequence after sequence: sum of (size - start) values.
  const std::vector<float>& logprob() const { return logprob_; }
  const std::vector<float>& entropy() const { return entropy_; }
  const std::vector<float>& kl() const { return kl_; }                          // or empty
  const std::vector<float>& reference_logprob() const { return ref_logprob_; }  // or empty

  bool has_reference() const { return request_.with_reference; }
  const std::shared_ptr<const Adapter>& adapter() const { return request_.adapter; }

  // Gradients of a loss by the adapter's matrices, from its derivatives by the outputs (flat, as
  // above; d_entropy and d_kl may be empty). May be called once: it gives the graph back.
  AdapterGradients backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                            std::span<const float> d_kl);

 private:
  struct Graph;

  void check() const;
  void score_group(std::span<const int64_t> members);
  std::vector<float> hidden_states(const TokenTree& tree, const Adapter* adapter, Graph* graph);

  std::shared_ptr<const Model> model_;
  ScoreRequest request_;
  std::vector<int64_t> offsets_;  // of each sequence's first value in the flat outputs
  std::vector<float> logprob_, entropy_, kl_, ref_logprob_, lse_, ref_lse_;
  std::shared_ptr<Graph> graph_;
};

}  // namespace alignpro::model
