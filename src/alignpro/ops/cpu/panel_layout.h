#pragma once

#include <cstdint>

#include "alignpro/core/dtype.h"
#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops::cpu {

// How a panel (16 rows of a weight, all of its columns) lies in memory, so that a product streams
// it once and expands it in registers.
//
// Plain formats: [cols][16] values. Quantised ones: groups of 32 columns one behind the other,
//   scales | high bits | low bits,
// then, for the K formats, the factors of each 8 groups. Codes are unsigned and lie in 32-bit
// words, a row a word: low bits of 8 columns as nibbles, [4][16] words a group (byte codes: as
// bytes, [8][16]). Integer products take four columns from a word of bytes, of each 8 columns the
// even ones from one word, the odd ones from the next; so the bits beyond four of a group's word w
// lie in each byte from bit w on (one bit, [16]) or 2 (w % 4) (two, [2][16], words 0 to 3 in the
// first). A weight is fma(code, scale, minimum), which rounds exactly as the file's formula does:
// products of scale and code fit into 24 bits.
inline constexpr int64_t kGroup = 32;
inline constexpr int64_t kGroupsPerFactor = 8;

struct PanelLayout {
  int64_t scale_bytes;  // float16 scales [16], and minima [16] where the format has them; K: the
                        // integers of [16] scales and [16] minima (Q6_K: 2 x [16] scales; Q2_K:
                        // 2 x ([16] scales, [16] minima); IQ4_XS: [16] scales)
  int64_t high_bytes;   // of codes beyond four bits
  int64_t low_bytes;
  int64_t factor_bytes;  // float16 [16], for 8 groups; with minima twice

  constexpr int64_t group_bytes() const { return scale_bytes + high_bytes + low_bytes; }
};

// Integer products. Activations: tiles of kInt8TileRows rows, a group of 32 columns after the
// other: signed codes [kInt8TileRows][8 words][4 bytes], then per row the scale, scale * the sum
// of its codes, and minus the sums (int32) of all codes, the first 16 and the last 16.
inline constexpr int64_t kInt8TileRows = 16;
inline constexpr int64_t kInt8GroupBytes = kGroup * kInt8TileRows + 5 * kInt8TileRows * 4;

constexpr bool is_quantized(DType dtype) {
  return dtype != DType::kF32 && dtype != DType::kF16 && dtype != DType::kBF16;
}

// The format in which a panel holds these rows, exactly: IQ4_NL has Q8_0's scales and values of 8
// bits, Q3_K has Q6_K's scales and values of fewer bits.
constexpr DType panel_type(DType dtype) {
  return dtype == DType::kIQ4_NL ? DType::kQ8_0 : dtype == DType::kQ3_K ? DType::kQ6_K : dtype;
}

// Codes of 8 bits from -128 on.
constexpr bool has_byte_codes(DType dtype) {
  return dtype == DType::kQ8_0 || dtype == DType::kIQ4_XS;
}

constexpr PanelLayout panel_layout(DType dtype) {
  switch (dtype) {
    case DType::kQ8_0:
      return {32, 0, 512, 0};
    case DType::kQ4_0:
      return {32, 0, 256, 0};
    case DType::kQ4_1:
      return {64, 0, 256, 0};
    case DType::kQ5_0:
      return {32, 64, 256, 0};
    case DType::kQ5_1:
      return {64, 64, 256, 0};
    case DType::kQ4_K:
      return {32, 0, 256, 64};
    case DType::kQ5_K:
      return {32, 64, 256, 64};
    case DType::kQ6_K:
      return {32, 128, 256, 32};
    case DType::kQ2_K:
      return {64, 0, 256, 64};
    case DType::kIQ4_XS:
      return {16, 0, 512, 32};
    default:
      return {0, 0, 0, 0};
  }
}

// Bytes of a panel of `cols` columns (a multiple of the format's block).
constexpr int64_t panel_bytes(DType dtype, int64_t cols) {
  if (dtype == DType::kF32) return cols * kPanel * 4;
  if (!is_quantized(dtype)) return cols * kPanel * 2;
  const PanelLayout layout = panel_layout(dtype);
  const int64_t groups = cols / kGroup;
  return groups * layout.group_bytes() +
         (groups + kGroupsPerFactor - 1) / kGroupsPerFactor * layout.factor_bytes;
}

}  // namespace alignpro::ops::cpu
