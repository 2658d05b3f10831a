#pragma once

#include <cstdint>

#include "alignpro/core/host_device.h"

namespace alignpro::ops {

// First token, in token order, at which the cumulative mass passes `target`; rounding at the end
// falls back to the last token with any mass; -1 where none has. *below receives the mass of the
// tokens before it.
ALIGNPRO_ANY_SIDE
template <typename Mass>
ALIGNPRO_HOST_DEVICE int64_t invert(int64_t count, double target, const Mass& mass,
                                    double* below = nullptr) {
  double sum = 0.0, before = 0.0;
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const double m = mass(i);
    if (!(m > 0.0)) continue;
    last = i;
    before = sum;
    sum += m;
    if (sum > target) break;
  }
  if (below != nullptr) *below = before;
  return last;
}

}  // namespace alignpro::ops
