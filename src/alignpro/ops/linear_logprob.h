#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/logprob_output.h"
#include "alignpro/ops/packed_matrix.h"
#include "alignpro/ops/quantized_matrix.h"

namespace alignpro::ops {

// The weight of a vocabulary projection: packed for the engine, or as it stands in a file or a
// tensor (then each tile is widened and packed where it is used).
struct VocabularyWeight {
  VocabularyWeight() = default;
  VocabularyWeight(const PackedMatrix* matrix) : packed(matrix) {}
  VocabularyWeight(const QuantizedMatrix& matrix) : stored(matrix) {}

  const PackedMatrix* packed = nullptr;
  QuantizedMatrix stored = {};  // where it is not packed

  int64_t rows() const { return packed != nullptr ? packed->rows() : stored.rows; }
  int64_t cols() const { return packed != nullptr ? packed->cols() : stored.cols; }
  Arithmetic arithmetic() const {
    return packed != nullptr ? packed->arithmetic() : Arithmetic::kFloat32;
  }
};

// The fused vocabulary op: with z = hidden W^T / temperature, p = softmax(z), and q likewise from
// the reference's hidden states (and weight), one pass over tiles of the vocabulary.
struct LogprobInput {
  int64_t rows;
  const float* hidden;                // [rows, W.cols]
  VocabularyWeight weight;            // [vocab, cols]
  std::span<const int32_t> tokens;    // [rows]
  float temperature = 1.0f;           // > 0
  const float* ref_hidden = nullptr;  // [rows, ref_weight.cols]; null: no reference
  VocabularyWeight ref_weight = {};   // no rows: the same weight
};

// Derivatives by the hidden states, [rows, cols] each, gathered in the forward's own pass: sums of
// rows of W weighted by p, rescaled as the maximum grows. They make the backward by these two
// outputs free of any product with W.
struct LogprobJacobian {
  float* logprob;       // d logprob / d hidden
  float* kl = nullptr;  // d KL(p || q) / d hidden; null: not wanted
};

// Nothing of size rows x vocab is stored; see linear_logprob_bytes. Throws NumericError naming the
// row when a logit is NaN or +inf, or all are -inf. `jacobian` may be null.
void linear_logprob(const LogprobInput& in, const LogprobOutput& out,
                    const LogprobJacobian* jacobian, ThreadPool& pool);

// tv [rows] = TV(p, q) = sum max(0, p - q), and mass_above [rows] = sum of p where p > q, which its
// derivative needs. A pass of its own: it can start only when both normalisers are known.
void total_variation(const LogprobInput& in, const LogprobOutput& forward, float* tv,
                     float* mass_above, ThreadPool& pool);

// d_hidden [rows, cols] and d_weight [vocab, cols] (overwritten; either may be null). With a
// jacobian, d_hidden's share of logprob and kl comes from it; all the rest computes the tiles
// again. The reference is a constant. `forward` is what the forward passes wrote.
// Sums run over tiles, and for d_weight over blocks of rows, in order: the bits do not depend on
// the pool.
void linear_logprob_backward(const LogprobInput& in, const LogprobOutput& forward,
                             const LogprobJacobian* jacobian, const LogprobUpstream& upstream,
                             float* d_hidden, float* d_weight, ThreadPool& pool);

// Bytes that linear_logprob allocates beside its inputs and outputs, at most, on `threads` threads.
int64_t linear_logprob_bytes(const LogprobInput& in, bool with_jacobian, int threads);

}  // namespace alignpro::ops
