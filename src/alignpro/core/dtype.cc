#include "alignpro/core/dtype.h"

#include <bit>
#include <cstring>

#include "alignpro/core/error.h"

namespace alignpro {
namespace {

struct Format {
  std::string_view name;
  int64_t block_values;
  int64_t block_bytes;
};

// A quantised block is its float16 scale (and, for Q4_1, minimum), then 32 integers.
constexpr Format kF32{"F32", 1, 4};
constexpr Format kF16{"F16", 1, 2};
constexpr Format kBF16{"BF16", 1, 2};
constexpr Format kQ8_0{"Q8_0", 32, 2 + 32};
constexpr Format kQ4_0{"Q4_0", 32, 2 + 16};
constexpr Format kQ4_1{"Q4_1", 32, 2 + 2 + 16};

const Format& format(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return kF32;
    case DType::kF16:
      return kF16;
    case DType::kBF16:
      return kBF16;
    case DType::kQ8_0:
      return kQ8_0;
    case DType::kQ4_0:
      return kQ4_0;
    case DType::kQ4_1:
      return kQ4_1;
  }
  throw InvalidArgument("dtype: not one of the enumerators");
}

// Files promise no alignment that C++ would accept, so every load is a memcpy.
uint16_t load_u16(const std::byte* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

// Selects instead of branches, so that a loop over it vectorises. A subnormal goes through an
// integer conversion and not through a float32 subnormal, which flush-to-zero would lose.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // inf, nan: exponent 255
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return std::bit_cast<float>(sign | (magnitude < 0x400u ? subnormal : normal));
}

void expand_f16(const std::byte* source, int64_t values, float* out) {
  for (int64_t i = 0; i < values; ++i) out[i] = half_to_float(load_u16(source + 2 * i));
}

void expand_bf16(const std::byte* source, int64_t values, float* out) {
  for (int64_t i = 0; i < values; ++i) {
    out[i] = std::bit_cast<float>(static_cast<uint32_t>(load_u16(source + 2 * i)) << 16);
  }
}

// Scale times integer is exact in float32 (11 + 8 bits), so contraction could not change a bit.
void expand_q8_0(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ8_0.block_bytes, out += kQ8_0.block_values) {
    const float scale = half_to_float(load_u16(source));
    const std::byte* q = source + 2;
    for (int j = 0; j < 32; ++j) out[j] = scale * static_cast<float>(static_cast<int8_t>(q[j]));
  }
}

// Byte j holds value j in its low and value j + 16 in its high nibble.
void expand_q4_0(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ4_0.block_bytes, out += kQ4_0.block_values) {
    const float scale = half_to_float(load_u16(source));
    const std::byte* q = source + 2;
    for (int j = 0; j < 16; ++j) {
      const int pair = std::to_integer<int>(q[j]);
      out[j] = scale * static_cast<float>((pair & 15) - 8);
      out[j + 16] = scale * static_cast<float>((pair >> 4) - 8);
    }
  }
}

void expand_q4_1(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ4_1.block_bytes, out += kQ4_1.block_values) {
    const float scale = half_to_float(load_u16(source));
    const float minimum = half_to_float(load_u16(source + 2));
    const std::byte* q = source + 4;
    for (int j = 0; j < 16; ++j) {
      const int pair = std::to_integer<int>(q[j]);
      out[j] = scale * static_cast<float>(pair & 15) + minimum;
      out[j + 16] = scale * static_cast<float>(pair >> 4) + minimum;
    }
  }
}

}  // namespace

std::string_view dtype_name(DType dtype) { return format(dtype).name; }

int64_t block_values(DType dtype) { return format(dtype).block_values; }

int64_t block_bytes(DType dtype) { return format(dtype).block_bytes; }

int64_t row_bytes(DType dtype, int64_t values) {
  const Format& f = format(dtype);
  require(values >= 0 && values % f.block_values == 0, "row_bytes: expected a multiple of ",
          f.block_values, " values for ", f.name, ", got ", values);
  return values / f.block_values * f.block_bytes;
}

void dequantize(DType dtype, const std::byte* source, int64_t values, float* out) {
  const int64_t bytes = row_bytes(dtype, values);
  if (values == 0) return;
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, source, static_cast<size_t>(bytes));
      return;
    case DType::kF16:
      expand_f16(source, values, out);
      return;
    case DType::kBF16:
      expand_bf16(source, values, out);
      return;
    case DType::kQ8_0:
      expand_q8_0(source, values / 32, out);
      return;
    case DType::kQ4_0:
      expand_q4_0(source, values / 32, out);
      return;
    case DType::kQ4_1:
      expand_q4_1(source, values / 32, out);
      return;
  }
}

}  // namespace alignpro
