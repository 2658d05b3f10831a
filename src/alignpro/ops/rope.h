#pragma once

#include <cstdint>

#include "alignpro/core/parallel.h"

namespace alignpro::ops {

// Rotary position embedding (Su et al. 2021), half-split: lane i of a head turns with lane
// i + rotary_dim / 2. Rotates `heads` heads of head_dim at the start of each row, in place, by the
// row's angles cos, sin [rows, rotary_dim / 2]. A negated sin turns back: that is the gradient.
void rope(int64_t rows, float* x, int64_t ldx, int64_t heads, int64_t head_dim, int64_t rotary_dim,
          const float* cos, const float* sin, ThreadPool& pool);

}  // namespace alignpro::ops
