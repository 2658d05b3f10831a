#pragma once

#include <cmath>
#include <cstdint>

#include "alignpro/core/host_device.h"

namespace alignpro::ops {

// First position that a token at `position` sees; causal, the window counts itself, 0: all.
ALIGNPRO_HOST_DEVICE inline int64_t first_visible(int64_t position, int64_t sliding_window) {
  const int64_t first = position - sliding_window + 1;
  return sliding_window > 0 && first > 0 ? first : 0;
}

// The softmax over some keys: its maximum and the sum below it. The output under it is a mean, so
// two outputs join as keep * a + add * b. Nothing seen is a sum of 0.
struct SoftmaxJoin {
  float max, sum;
  float keep, add;
};

ALIGNPRO_HOST_DEVICE inline SoftmaxJoin join_softmax(float max, float sum, float next_max,
                                                     float next_sum) {
  if (next_sum == 0.0f) return {max, sum, 1.0f, 0.0f};
  if (sum == 0.0f) return {next_max, next_sum, 0.0f, 1.0f};
  const float top = next_max > max ? next_max : max;
  const float old_mass = std::exp(max - top) * sum;
  const float new_mass = std::exp(next_max - top) * next_sum;
  const float total = old_mass + new_mass;
  return {top, total, old_mass / total, new_mass / total};
}

}  // namespace alignpro::ops
