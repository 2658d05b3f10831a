#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/core/dtype.h"
#include "alignpro/model/config.h"
#include "alignpro/model/scorer.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::model {

// Of a score, what its memory depends on beside the model's configuration.
struct ScoreShape {
  std::vector<std::span<const int32_t>> sequences = {};
  std::span<const int64_t> starts = {};
  bool with_reference = false;
  bool with_hidden = false;
  bool keep_graph = false;
  Activations activations = Activations::kKeep;
  std::vector<int64_t> layer_ranks = {};  // of the adapter, by layer; empty: none
  int64_t threads = 1;
  DType kv_dtype = DType::kF32;
};

// Bytes that a score on the CPU and its backward hold at most: the formula of Score::bytes. `head`
// needs no values (PackedMatrix::plan).
int64_t score_bytes(const ModelConfig& config, const ops::PackedMatrix& head,
                    const ScoreShape& shape);

}  // namespace alignpro::model
