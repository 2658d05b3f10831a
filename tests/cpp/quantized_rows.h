#pragma once

// Rows of a weight in every storage format.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "alignpro/core/dtype.h"
#include "alignpro/ops/quantized_matrix.h"

namespace alignpro::ops {

// Bytes of `rows` rows in a format: anything, or `fill` throughout, with the float16 factors made
// finite and small.
inline std::vector<std::byte> quantized_rows(DType dtype, int64_t rows, int64_t cols, uint32_t seed,
                                             std::optional<std::byte> fill = std::nullopt) {
  const int64_t size = block_bytes(dtype);
  std::vector<std::byte> bytes(static_cast<size_t>(rows * row_bytes(dtype, cols)));
  std::mt19937 generator(seed);
  for (std::byte& b : bytes) b = fill.value_or(static_cast<std::byte>(generator() & 255));
  const auto tame = [&](int64_t at, bool brain) {  // 2^-9 to 2^-5 in size, either sign
    const uint32_t draw = generator();
    const auto bits =
        static_cast<uint16_t>(brain ? (draw & 0x807f) | 0x3c80 : (draw & 0x83ff) | 0x2000);
    std::memcpy(bytes.data() + at, &bits, 2);
  };
  for (int64_t at = 0; at < static_cast<int64_t>(bytes.size()); at += size) {
    switch (dtype) {
      case DType::kF32: {
        const float value = std::normal_distribution<float>()(generator);
        std::memcpy(bytes.data() + at, &value, 4);
        break;
      }
      case DType::kQ6_K:
        tame(at + 208, false);
        break;
      case DType::kQ3_K:
        tame(at + 108, false);
        break;
      case DType::kQ2_K:
        tame(at + 80, false);
        tame(at + 82, false);
        break;
      case DType::kQ4_1:
      case DType::kQ5_1:
      case DType::kQ4_K:
      case DType::kQ5_K:
        tame(at + 2, false);
        [[fallthrough]];
      default:
        tame(at, dtype == DType::kBF16);
    }
  }
  return bytes;
}

inline std::vector<QuantizedRow> rows_in(DType dtype, const std::vector<std::byte>& bytes,
                                         int64_t cols) {
  const auto size = static_cast<size_t>(row_bytes(dtype, cols));
  std::vector<QuantizedRow> rows;
  for (size_t at = 0; at < bytes.size(); at += size) rows.push_back({bytes.data() + at, dtype});
  return rows;
}

inline constexpr DType kAllTypes[] = {DType::kF32,  DType::kF16,    DType::kBF16,  DType::kQ8_0,
                                      DType::kQ4_0, DType::kQ4_1,   DType::kQ5_0,  DType::kQ5_1,
                                      DType::kQ4_K, DType::kQ5_K,   DType::kQ6_K,  DType::kQ2_K,
                                      DType::kQ3_K, DType::kIQ4_NL, DType::kIQ4_XS};

}  // namespace alignpro::ops
