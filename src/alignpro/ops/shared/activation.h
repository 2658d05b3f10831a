#pragma once

#include <cmath>

#include "alignpro/core/host_device.h"

namespace alignpro::ops {

ALIGNPRO_HOST_DEVICE inline float silu(float x) { return x * (1.0f / (1.0f + std::exp(-x))); }

// Gradients of silu(gate) * up.
ALIGNPRO_HOST_DEVICE inline void silu_gradient(float gate, float up, float d, float* d_gate,
                                               float* d_up) {
  const float s = 1.0f / (1.0f + std::exp(-gate));
  *d_gate = d * up * s * (1.0f + gate * (1.0f - s));
  *d_up = d * gate * s;
}

// The rotation of one pair of a head's lanes; a negated sine turns back.
ALIGNPRO_HOST_DEVICE inline void rotate(float cos, float sin, float* a, float* b) {
  const float x = *a, y = *b;
  *a = x * cos - y * sin;
  *b = y * cos + x * sin;
}

}  // namespace alignpro::ops
