#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/model.h"

namespace alignpro::model {

// What a score keeps of each layer for its backward.
enum class Activations {
  kKeep,       // everything: LayerActivations of every layer
  kRecompute,  // the residual stream alone; each layer is run again, to the same bits
};

struct ScoreRequest {
  // Below 0, and before the start: soft rows of the adapter (and of the reference), see Adapter.
  std::vector<std::vector<int32_t>> sequences;
  std::vector<int64_t> starts;  // per sequence: tokens [start, size) are scored; 1 <= start <= size
  std::shared_ptr<const Adapter> adapter = nullptr;  // null: base weights
  float temperature = 1.0f;
  bool with_reference = false;  // also the exact KL to the distribution under
  std::shared_ptr<const Adapter> reference = nullptr;  // this adapter (null: base weights), or to
  // the one whose normed states before the scored tokens these are: [values, hidden], sequence
  // after sequence, as hidden() of a score of the same tokens behind any other contexts gave them.
  // Empty: the reference reads what the policy reads.
  std::vector<float> reference_hidden = {};
  // The policy's own states, likewise, in the place of an adapter's: of a mixture, say. Constants.
  std::vector<float> given_hidden = {};
  bool with_hidden = false;  // also the policy's states that the tokens were predicted from
  bool keep_graph = false;   // backward() will be called; needs an adapter
  Activations activations = Activations::kKeep;

  // Whether the reference's states are computed, and not given.
  bool runs_reference() const { return with_reference && reference_hidden.empty(); }
};

// Gradients of one adapter, module by module as Adapter::modules(), and of its soft rows.
struct AdapterGradients {
  struct Module {
    std::vector<float> a;  // [rank, inputs]
    std::vector<float> b;  // [outputs, rank]
  };
  std::vector<Module> modules;
  std::vector<float> soft_rows;  // [num_rows, hidden_size]

  explicit AdapterGradients(const Adapter& adapter);
};

// Scores sequences token by token, through the layers and the vocabulary op that the engine samples
// with: a score equals the log-probability recorded when the token was drawn, to the bit, where the
// device is deterministic. Tokens common to several sequences (a system prompt, the prompt of a
// group of rewrites) are computed once, forward and backward.
class Score {
 public:
  // Throws InvalidArgument for an empty sequence, a start out of range, a token outside the
  // vocabulary and no soft row, a sequence longer than the context, naming its index, and for what
  // else does not fit; NumericError where a row has no finite softmax.
  Score(std::shared_ptr<const Model> model, ScoreRequest request);
  ~Score();

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

  // Bytes of the device's memory that a Score of this request and its backward() hold at their peak
  // beside the weights, the adapters and, on the CPU, the gradients: exactly on a GPU, at most on
  // the CPU, whose ops allocate for themselves. With R rows (shared prefixes once), V scored
  // values, L layers, H hidden, F = qkv + q + H + 2 I activations of a layer (+ q + k with head
  // norms, + 2 H with norms behind the blocks, + the adapter's ranks; + 2 kv on a GPU), P passes (2
  // with a reference) and w bytes a value, about w (R ((L + 1) H + L F) + P V H) + 48 V are kept, L
  // F only where activations are. With them are held the larger of the forward's scratch, w R (2 H
  // + I + F), and the backward's: 2 w R H, and the larger of 4 V H and w R (H + 4 I + q + qkv, + F
  // when recomputed) with 4 bytes for each number of the adapter. On the CPU P V H more are kept
  // for the backward, and the hidden states, where asked for, count twice: here, and in a copy for
  // the caller. Throws as the constructor does, but for rows that the reference lacks: no size
  // depends on them.
  static int64_t bytes(const Model& model, const ScoreRequest& request);

  // The same of weights that may be planned alone, under an adapter that may be, too. `buffers` are
  // of the device. The request is not checked, its adapters are not looked at.
  static int64_t bytes(const Weights& weights, const ops::Device& device, ScoreBuffers& buffers,
                       const ScoreRequest& request, std::shared_ptr<const DeviceAdapter> policy,
                       std::shared_ptr<const DeviceAdapter> reference);

  // Gradients of a loss by the adapter's matrices and soft rows, from its derivatives by the
  // outputs (flat, as above; d_entropy and d_kl may be empty). May be called once, by any thread:
  // it gives the graph back.
  AdapterGradients backward(std::span<const float> d_logprob, std::span<const float> d_entropy,
                            std::span<const float> d_kl);

 private:
  class Pass;  // over one group of sequences

  void score_group(std::span<const int64_t> members);

  std::shared_ptr<const Model> model_;
  ScoreRequest request_;
  std::vector<int64_t> offsets_;  // of each sequence's first value in the flat outputs
  std::vector<float> logprob_, entropy_, kl_, ref_logprob_, hidden_;
  std::atomic<bool> has_graph_;
  std::unique_ptr<Pass> pass_;  // what backward() needs; none without scored values
};

}  // namespace alignpro::model
