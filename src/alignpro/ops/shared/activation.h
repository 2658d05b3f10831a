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

// GELU (Hendrycks and Gimpel 2016) by tanh: x (1 + tanh(u / 2)) / 2 = x sigmoid(u) with the cubic
// u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline constexpr float kGeluLinear = 1.5957691216057308f;
inline constexpr float kGeluCubic = 0.044715f * kGeluLinear;

ALIGNPRO_HOST_DEVICE inline float gelu(float x) {
  return x * (1.0f / (1.0f + std::exp(-x * (kGeluLinear + kGeluCubic * x * x))));
}

// Gradients of gelu(gate) * up.
ALIGNPRO_HOST_DEVICE inline void gelu_gradient(float gate, float up, float d, float* d_gate,
                                               float* d_up) {
  const float square = gate * gate;
  const float s = 1.0f / (1.0f + std::exp(-gate * (kGeluLinear + kGeluCubic * square)));
  *d_gate = d * up * s * (1.0f + gate * (kGeluLinear + 3.0f * kGeluCubic * square) * (1.0f - s));
  *d_up = d * gate * s;
}

// The rotation of one pair of a head's lanes; a negated sine turns back.
ALIGNPRO_HOST_DEVICE inline void rotate(float cos, float sin, float* a, float* b) {
  const float x = *a, y = *b;
  *a = x * cos - y * sin;
  *b = y * cos + x * sin;
}

}  // namespace alignpro::ops
