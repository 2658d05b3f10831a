#include "alignpro/core/dtype.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "alignpro/core/error.h"
#include "alignpro/core/float_bits.h"

namespace alignpro {
namespace {

struct Format {
  std::string_view name;
  int64_t block_values;
  int64_t block_bytes;
};

// A block of 32 is its float16 scale (and, for Qx_1, minimum), the fifth bits where there are five,
// then the low bits of 32 integers. A block of 256 scales groups of 32 (Q6_K: 16) by integers that
// share float16 factors.
constexpr Format kF32{"F32", 1, 4};
constexpr Format kF16{"F16", 1, 2};
constexpr Format kBF16{"BF16", 1, 2};
constexpr Format kQ8_0{"Q8_0", 32, 2 + 32};
constexpr Format kQ4_0{"Q4_0", 32, 2 + 16};
constexpr Format kQ4_1{"Q4_1", 32, 2 + 2 + 16};
constexpr Format kQ5_0{"Q5_0", 32, 2 + 4 + 16};
constexpr Format kQ5_1{"Q5_1", 32, 2 + 2 + 4 + 16};
constexpr Format kQ4_K{"Q4_K", 256, 2 + 2 + 12 + 128};
constexpr Format kQ5_K{"Q5_K", 256, 2 + 2 + 12 + 32 + 128};
constexpr Format kQ6_K{"Q6_K", 256, 128 + 64 + 16 + 2};

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
    case DType::kQ5_0:
      return kQ5_0;
    case DType::kQ5_1:
      return kQ5_1;
    case DType::kQ4_K:
      return kQ4_K;
    case DType::kQ5_K:
      return kQ5_K;
    case DType::kQ6_K:
      return kQ6_K;
  }
  throw InvalidArgument("dtype: not one of the enumerators");
}

// Files promise no alignment that C++ would accept, so every load is a memcpy.
uint16_t load_u16(const std::byte* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

void expand_f16(const std::byte* source, int64_t values, float* out) {
  for (int64_t i = 0; i < values; ++i) out[i] = widen_half(load_u16(source + 2 * i));
}

void expand_bf16(const std::byte* source, int64_t values, float* out) {
  for (int64_t i = 0; i < values; ++i) {
    out[i] = to_float(Bfloat16{load_u16(source + 2 * i)});
  }
}

// Scale times integer is exact in float32 (11 + 8 bits), so contraction could not change a bit.
void expand_q8_0(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ8_0.block_bytes, out += kQ8_0.block_values) {
    const float scale = widen_half(load_u16(source));
    const std::byte* q = source + 2;
    for (int j = 0; j < 32; ++j) out[j] = scale * static_cast<float>(static_cast<int8_t>(q[j]));
  }
}

// Byte j holds value j in its low and value j + 16 in its high nibble.
void expand_q4_0(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ4_0.block_bytes, out += kQ4_0.block_values) {
    const float scale = widen_half(load_u16(source));
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
    const float scale = widen_half(load_u16(source));
    const float minimum = widen_half(load_u16(source + 2));
    const std::byte* q = source + 4;
    for (int j = 0; j < 16; ++j) {
      const int pair = std::to_integer<int>(q[j]);
      out[j] = scale * static_cast<float>(pair & 15) + minimum;
      out[j + 16] = scale * static_cast<float>(pair >> 4) + minimum;
    }
  }
}

uint32_t load_u32(const std::byte* source) {
  uint32_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

// As Q4_x, and bit i of `high` is the fifth bit of value i. Every value is scale x integer +
// minimum with an exact product, so one rounding at most.
void expand_five_bits(const std::byte* low, uint32_t high, float scale, float minimum, float* out) {
  for (int j = 0; j < 16; ++j) {
    const int pair = std::to_integer<int>(low[j]);
    const int first = (pair & 15) | static_cast<int>((high >> j & 1u) << 4);
    const int second = (pair >> 4) | static_cast<int>((high >> (j + 16) & 1u) << 4);
    out[j] = scale * static_cast<float>(first) + minimum;
    out[j + 16] = scale * static_cast<float>(second) + minimum;
  }
}

void expand_q5_0(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ5_0.block_bytes, out += kQ5_0.block_values) {
    const float scale = widen_half(load_u16(source));
    expand_five_bits(source + 6, load_u32(source + 2), scale, -16.0f * scale, out);
  }
}

void expand_q5_1(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ5_1.block_bytes, out += kQ5_1.block_values) {
    expand_five_bits(source + 8, load_u32(source + 4), widen_half(load_u16(source)),
                     widen_half(load_u16(source + 2)), out);
  }
}

// Groups 2i and 2i + 1 of 32 values are the low and the high nibbles of 32 bytes.
void expand_q4_k(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ4_K.block_bytes) {
    const float scale = widen_half(load_u16(source));
    const float minimum = widen_half(load_u16(source + 2));
    for (int group = 0; group < 8; ++group, out += 32) {
      const GroupScale g = k_group_scale(source + 4, group);
      const float s = scale * g.scale, m = minimum * g.minimum;
      const std::byte* q = source + 16 + group / 2 * 32;
      for (int j = 0; j < 32; ++j) {
        const int pair = std::to_integer<int>(q[j]);
        out[j] = s * static_cast<float>(group % 2 == 0 ? pair & 15 : pair >> 4) - m;
      }
    }
  }
}

// As Q4_K; bit `group` of byte j is the fifth bit of value j.
void expand_q5_k(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ5_K.block_bytes) {
    const float scale = widen_half(load_u16(source));
    const float minimum = widen_half(load_u16(source + 2));
    for (int group = 0; group < 8; ++group, out += 32) {
      const GroupScale g = k_group_scale(source + 4, group);
      const float s = scale * g.scale, m = minimum * g.minimum;
      const std::byte* high = source + 16;
      const std::byte* q = source + 48 + group / 2 * 32;
      for (int j = 0; j < 32; ++j) {
        const int pair = std::to_integer<int>(q[j]);
        const int fifth = std::to_integer<int>(high[j]) >> group & 1;
        out[j] = s * static_cast<float>((group % 2 == 0 ? pair & 15 : pair >> 4) | fifth << 4) - m;
      }
    }
  }
}

// Two halves of 128: value 32 i + j of a half has its low nibble in byte j + 32 (i % 2), the high
// one where i > 1, and its upper two bits at 2 i in byte j; 16 values share a signed scale.
void expand_q6_k(const std::byte* source, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, source += kQ6_K.block_bytes) {
    const float factor = widen_half(load_u16(source + 208));
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i, out += 32) {
        const std::byte* low = source + 64 * half + 32 * (i % 2);
        const std::byte* high = source + 128 + 32 * half;
        const std::byte* scales = source + 192 + 8 * half + 2 * i;
        for (int j = 0; j < 32; ++j) {
          const int nibble = std::to_integer<int>(low[j]) >> (i > 1 ? 4 : 0) & 15;
          const int q = nibble | (std::to_integer<int>(high[j]) >> (2 * i) & 3) << 4;
          const auto scale = static_cast<int8_t>(scales[j / 16]);
          out[j] = factor * static_cast<float>(scale) * static_cast<float>(q - 32);
        }
      }
    }
  }
}

}  // namespace

uint16_t float_to_half(float value) { return round_half(value); }

float half_to_float(uint16_t bits) { return widen_half(bits); }

void quantize_q8_0(const float* values, int64_t count, std::byte* out) {
  const int64_t block = block_values(DType::kQ8_0);
  for (int64_t i = 0; i < count; i += block) {
    float most = 0.0f;
    bool is_nan = false;
    for (int64_t j = 0; j < block; ++j) {
      most = std::max(most, std::abs(values[i + j]));
      is_nan = is_nan || std::isnan(values[i + j]);
    }
    const uint16_t bits = float_to_half(most / 127.0f);
    const float scale = half_to_float(bits);
    require(!is_nan && std::isfinite(scale),
            "compute int8: expected finite weights below 127 * 65520, got ",
            is_nan ? std::nanf("") : most, "; check the model file or use float32");
    std::memcpy(out, &bits, sizeof bits);
    for (int64_t j = 0; j < block; ++j) {
      const float code = scale > 0.0f ? std::nearbyint(values[i + j] / scale) : 0.0f;
      out[2 + j] = static_cast<std::byte>(static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f)));
    }
    out += block_bytes(DType::kQ8_0);
  }
}

// Groups 0 to 3 have their six bits in bytes 0 to 3 (scales) and 4 to 7 (minima); those of the last
// four lie in the nibbles of bytes 8 to 11 with the upper two bits on top of the first eight bytes.
GroupScale k_group_scale(const std::byte* packed, int group) {
  const auto byte = [packed](int at) { return std::to_integer<uint32_t>(packed[at]); };
  if (group < 4) {
    return {static_cast<uint8_t>(byte(group) & 63), static_cast<uint8_t>(byte(group + 4) & 63)};
  }
  return {static_cast<uint8_t>((byte(group + 4) & 15) | byte(group - 4) >> 6 << 4),
          static_cast<uint8_t>(byte(group + 4) >> 4 | byte(group) >> 6 << 4)};
}

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
    case DType::kQ5_0:
      expand_q5_0(source, values / 32, out);
      return;
    case DType::kQ5_1:
      expand_q5_1(source, values / 32, out);
      return;
    case DType::kQ4_K:
      expand_q4_k(source, values / 256, out);
      return;
    case DType::kQ5_K:
      expand_q5_k(source, values / 256, out);
      return;
    case DType::kQ6_K:
      expand_q6_k(source, values / 256, out);
      return;
  }
}

}  // namespace alignpro
