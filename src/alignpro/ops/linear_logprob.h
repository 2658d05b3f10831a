#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::ops {

// The fused vocabulary op: with z = hidden W^T / temperature, p = softmax(z), and q likewise from
// the reference's hidden states, one pass over tiles of the vocabulary.
struct LogprobInput {
  int64_t rows;
  const float* hidden;                // [rows, W.cols]
  const PackedMatrix* weight;         // [vocab, cols]
  std::span<const int32_t> tokens;    // [rows]
  float temperature = 1.0f;           // > 0
  const float* ref_hidden = nullptr;  // [rows, cols]; null: no reference
};

// Each [rows]. kl and ref_logprob are written only with a reference; lse and ref_lse are what the
// backward needs.
struct LogprobOutput {
  float* logprob;      // z_a - lse(z)
  float* entropy;      // -sum p log p
  float* kl;           // KL(p || q) over the whole vocabulary, never negative, 0 when z == z_ref
  float* ref_logprob;  // log q_a
  float* lse;
  float* ref_lse;
};

// Nothing of size rows x vocab is stored. Workspace: 480 x cols floats of packed rows, 24 bytes a
// row (at most 480) and tile of 256, and two tiles of 96 x 256 floats a worker. Throws NumericError
// naming the row when a logit is NaN or all are -inf.
void linear_logprob(const LogprobInput& in, const LogprobOutput& out, ThreadTeam& team);

// d_hidden [rows, cols] (overwritten) from the derivatives of the loss by logprob, entropy and kl
// (the last two may be null). Tiles are computed again; each row sums over tiles in order.
void linear_logprob_backward(const LogprobInput& in, const LogprobOutput& forward,
                             const float* d_logprob, const float* d_entropy, const float* d_kl,
                             float* d_hidden, ThreadTeam& team);

}  // namespace alignpro::ops
