#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/packed_matrix.h"
#include "alignpro/ops/shared/sampling.h"

namespace alignpro::ops {

// A token whose logit is lowered before anything is drawn: of a positive one, divided by
// `repetition`, of a negative one, multiplied with it (Keskar et al. 2019, equation 1); then
// `minus` is taken away. Both are of logits at temperature 1.
struct Penalty {
  int32_t token = 0;
  float repetition = 1.0f;
  float minus = 0.0f;
  int32_t times = 0;  // that it was written, for who keeps the list
};

// How one token is drawn.
struct SampleRow : DrawOptions {
  double uniform = 0.0;                // the draw, in [0, 1)
  std::span<const int32_t> banned;     // tokens that may not be drawn (EOS before min_new_tokens);
                                       // ascending
  std::span<const Penalty> penalties;  // ascending by token
};

struct SampledToken {
  int32_t token = -1;      // -1: none could be drawn, and the numbers are NaN
  float logprob = 0.0f;    // of the model's distribution at the row's temperature, as it is without
                           // truncation, bans and penalties
  float kept_mass = 1.0f;  // probability, under the penalties, of what truncation and bans left
};

// Projects hidden [rows, K] on the head [V, K] and draws a token a row, by inversion of the
// cumulative distribution in token order. No logits tensor: plain rows keep two numbers per
// vocabulary tile; of truncated rows, at most 64 at once, the logits are kept until they are drawn.
// A row fails alone: one with a NaN logit or no finite one, or whose bans leave nothing, has token
// -1, and the others have the bits that they have without it.
void head_sample(const PackedMatrix& head, const float* hidden, std::span<const SampleRow> rows,
                 std::span<SampledToken> out, ThreadPool& pool);

}  // namespace alignpro::ops
