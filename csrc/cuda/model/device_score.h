#pragma once

// model::Score on a device: the same outputs and gradients, by the ops that sessions sample with.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "alignpro/model/scorer.h"
#include "alignpro/model/transformer.h"
#include "device_model.h"

namespace alignpro::cuda {

class DeviceScore {
 public:
  // Log-probabilities to the bit of those that sessions draw, in mode strict. Throws as
  // model::Score; NumericError where a row has no finite softmax.
  DeviceScore(std::shared_ptr<const DeviceModel> model, model::ScoreRequest request);
  ~DeviceScore();

  // As model::Score's: flat, sequence after sequence.
  const std::vector<float>& logprob() const { return logprob_; }
  const std::vector<float>& entropy() const { return entropy_; }
  const std::vector<float>& kl() const { return kl_; }                          // or empty
  const std::vector<float>& reference_logprob() const { return ref_logprob_; }  // or empty
  const std::vector<float>& hidden() const { return hidden_; }                  // or empty

  bool has_reference() const { return request_.with_reference; }
  bool has_hidden() const { return request_.with_hidden; }
  int64_t hidden_size() const { return model_->config().hidden_size; }
  const std::shared_ptr<const model::Adapter>& adapter() const { return request_.adapter; }

  // Bytes of device memory that a score of this request and its backward() hold at their peak,
  // exactly, beside weights and adapters. With R rows (shared beginnings once), V scored values, L
  // layers, H hidden, F = qkv + 2 kv + q + H + 2 I activations of a layer (+ qkv with head norms,
  // + the adapter's ranks), P passes (2 with a reference) and w bytes a value, about
  // w (R ((L + 1) H + L F) + P V H) + 48 V are kept, L F only where activations are. With them are
  // held the larger of the forward's scratch, w R (2 H + I + F), and the backward's: 2 w R H, and
  // the larger of V (4 H + 4096 w) and w R (H + 4 I + q + qkv, + F when recomputed) with 4 bytes
  // for each number of the adapter. Pieces are rounded up to 256 bytes, segments to blocks of 16
  // positions. Throws as the constructor does.
  static int64_t bytes(const DeviceModel& model, const model::ScoreRequest& request);

  // As model::Score::backward: float32, summed from the model's dtype. Once.
  model::AdapterGradients backward(std::span<const float> d_logprob,
                                   std::span<const float> d_entropy, std::span<const float> d_kl);

 private:
  class Pass;  // over one group of sequences

  void score_group(std::span<const int64_t> members);

  std::shared_ptr<const DeviceModel> model_;
  model::ScoreRequest request_;
  std::vector<int64_t> offsets_;  // of each sequence's first value in the flat outputs
  std::vector<float> logprob_, entropy_, kl_, ref_logprob_, hidden_;
  bool has_graph_;
  std::unique_ptr<Pass> pass_;  // what backward() needs; none without scored values
};

}  // namespace alignpro::cuda
