#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "alignpro/core/dtype.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/model_files.h"
#include "alignpro/model/score.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::model {

// What a model is and weighs, from the headers of its files: no weight is read. A folder may hold
// config.json alone; its weights are then taken to be bfloat16.
class ModelFacts {
 public:
  // Throws FileError.
  explicit ModelFacts(const ModelFiles& files);

  const ModelConfig& config() const { return config_; }
  bool has_weights() const { return checkpoint_ != nullptr; }

  // Numbers of the matrices; norms and biases are a ten-thousandth of them.
  int64_t layer_parameters() const;
  int64_t head_parameters() const { return config_.vocab_size * config_.hidden_size; }
  // Numbers that a position keeps in all layers.
  int64_t kv_elements() const { return 2 * config_.num_layers * config_.kv_size(); }

  // Bytes of the matrices. A step reads layers and head, however few rows it has.
  struct Bytes {
    int64_t layers = 0;
    int64_t head = 0;
    int64_t embedding = 0;  // 0 where it is the head
  };
  Bytes bytes(ops::Arithmetic arithmetic) const;  // on the CPU, as stored where that is possible
  Bytes bytes(DType dtype) const;                 // every number of this type, as on a CUDA device

  // Score::bytes on the CPU, under an adapter of one rank on these modules and of `rows` soft rows.
  int64_t score_bytes(const ScoreRequest& request, const std::vector<std::string>& modules,
                      int64_t rank, int64_t rows, int threads) const;

 private:
  // The head's form on the CPU, without values.
  ops::PackedMatrix plan_head(ops::Arithmetic arithmetic) const;

  ModelConfig config_;
  std::shared_ptr<const Checkpoint> checkpoint_;  // null: config.json alone
};

}  // namespace alignpro::model
