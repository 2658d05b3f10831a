#pragma once

// Statistics of vocabulary tiles for linear_logprob and head_sample: one kernel, so that both see
// the same bits. Defined in linear_logprob.cu where not said otherwise.

#include "bodies/vocabulary.h"
#include "ops.h"

namespace alignpro::cuda {

// stats [live][tiles] of rows [first, first + live); logits of v.tokens, where given, to logit and
// ref_logit [rows]; all of them, where wanted, to logits [live][tiles][kTile]. draws [rows]:
// temperatures instead of v's; null: v's.
template <typename T>
void measure_tiles(const char* op, const Vocabulary<T>& v, bool with_ref, const SampleRow* draws,
                   int64_t first, int64_t live, ops::TileStats* stats, float* logit,
                   float* ref_logit, float* logits, Stream stream);

extern template void measure_tiles<float>(const char*, const Vocabulary<float>&, bool,
                                          const SampleRow*, int64_t, int64_t, ops::TileStats*,
                                          float*, float*, float*, Stream);
extern template void measure_tiles<Bfloat16>(const char*, const Vocabulary<Bfloat16>&, bool,
                                             const SampleRow*, int64_t, int64_t, ops::TileStats*,
                                             float*, float*, float*, Stream);

// gradients [rows] from what forward and upstream hold. Defined in total_variation.cu.
void fill_gradients(const char* op, const LogprobInput& in, const LogprobOutput& forward,
                    const LogprobUpstream& upstream, ops::RowGradient* gradients, Stream stream);

template <typename T>
Operand<T> operand(const Matrix& m) {
  return {static_cast<const T*>(m.data), m.ld, m.rows, m.cols};
}

// The same memory with its rows as the contraction.
template <typename T>
Operand<T, true> columns(const Matrix& m) {
  return {static_cast<const T*>(m.data), m.ld, m.cols, m.rows};
}

template <typename T>
Vocabulary<T> vocabulary(const LogprobInput& in) {
  return {operand<T>(in.hidden),     operand<T>(in.weight), operand<T>(in.ref_hidden),
          operand<T>(in.ref_weight), 1.0f / in.temperature, in.tokens};
}

}  // namespace alignpro::cuda
