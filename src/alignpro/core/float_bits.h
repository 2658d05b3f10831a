#pragma once

#include <cstdint>

#include "alignpro/core/host_device.h"

// 16-bit floats by their bits, for host and device alike. Of signalling NaNs only that they stay
// NaN is promised.

namespace alignpro {

ALIGNPRO_HOST_DEVICE inline uint32_t bits_of(float value) {
  return __builtin_bit_cast(uint32_t, value);
}
ALIGNPRO_HOST_DEVICE inline float float_of(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

// Selects instead of branches, so that a loop over it vectorises. A subnormal goes through an
// integer conversion and not through a float32 subnormal, which flush-to-zero would lose.
ALIGNPRO_HOST_DEVICE inline float widen_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // inf, nan: exponent 255
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400u ? subnormal : normal));
}

// The nearest half, ties to even; infinity from 65520 on.
ALIGNPRO_HOST_DEVICE inline uint16_t round_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: the float's own addition rounds at the last place of 2^-24.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// bfloat16: the upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

ALIGNPRO_HOST_DEVICE inline float to_float(Bfloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
ALIGNPRO_HOST_DEVICE inline float to_float(float value) { return value; }

// Nearest, ties to even; infinity beyond the largest.
ALIGNPRO_HOST_DEVICE inline Bfloat16 round_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // NaN stays NaN
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// From a float to the type that stores it.
template <typename T>
ALIGNPRO_HOST_DEVICE inline T stored(float value);
template <>
ALIGNPRO_HOST_DEVICE inline float stored<float>(float value) {
  return value;
}
template <>
ALIGNPRO_HOST_DEVICE inline Bfloat16 stored<Bfloat16>(float value) {
  return round_bfloat16(value);
}

}  // namespace alignpro
