#pragma once

#include <cmath>

#include "alignpro/core/host_device.h"

namespace alignpro::ops {

ALIGNPRO_HOST_DEVICE inline float silu(float x) { return x * (1.0f / (1.0f + std::exp(-x))); }

// The rotation of one pair of a head's lanes; a negated sine turns back.
ALIGNPRO_HOST_DEVICE inline void rotate(float cos, float sin, float* a, float* b) {
  const float x = *a, y = *b;
  *a = x * cos - y * sin;
  *b = y * cos + x * sin;
}

}  // namespace alignpro::ops
