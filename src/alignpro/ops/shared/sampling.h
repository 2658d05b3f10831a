#pragma once

#include <cmath>
#include <cstdint>

#include "alignpro/core/float_bits.h"
#include "alignpro/core/host_device.h"

namespace alignpro::ops {

// How tokens are drawn: from the caller's parameters, which inherit it, to the row that a kernel
// draws.
struct DrawOptions {
  float temperature = 1.0f;  // 0: the most likely token, lowest id on a tie; its log-probability is
                             // reported at temperature 1
  int32_t top_k = 0;         // 0: off
  float top_p = 1.0f;        // 1: off
  float min_p = 0.0f;        // 0: off
};

ALIGNPRO_HOST_DEVICE inline float inverse_temperature(const DrawOptions& how) {
  return how.temperature > 0.0f ? 1.0f / how.temperature : 1.0f;
}

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

// Whether a draw is truncated: by bans alone where it is greedy.
ALIGNPRO_HOST_DEVICE inline bool truncates(const DrawOptions& how, int64_t bans) {
  return bans > 0 ||
         (how.temperature > 0.0f && (how.top_k > 0 || how.top_p < 1.0f || how.min_p > 0.0f));
}

// The least logit that min_p > 0 leaves beside the best.
ALIGNPRO_HOST_DEVICE inline double min_p_floor(float best, float min_p) {
  return best + std::log(static_cast<double>(min_p));
}

// Keys in the order of preference, larger is better: larger logit first, lower id on a tie.
// token < 2^20.
ALIGNPRO_HOST_DEVICE inline uint64_t preference_key(float z, int64_t token) {
  const uint32_t bits = bits_of(z + 0.0f);  // -0 is 0
  const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 20 | (0xfffffu - static_cast<uint64_t>(token));
}

// A probability in units of 2^-62: sums of a whole vocabulary fit, and are exact in any order.
inline constexpr double kIntegerMassUnit = 0x1p-62;
ALIGNPRO_HOST_DEVICE inline uint64_t integer_mass(float z, double lse) {
  return static_cast<uint64_t>(std::exp(static_cast<float>(z - lse)) * 0x1p62f);
}

}  // namespace alignpro::ops
