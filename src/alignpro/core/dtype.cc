#include "alignpro/core/dtype.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "alignpro/core/error.h"
#include "alignpro/core/float_bits.h"

namespace alignpro {
namespace {

// Files promise no alignment that C++ would accept, so every load is a memcpy.
template <typename T>
T load(const std::byte* source) {
  T bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}
float half_at(const std::byte* source) { return widen_half(load<uint16_t>(source)); }
int int_at(const std::byte* source) { return std::to_integer<int>(*source); }

void expand_f32(const std::byte* source, int64_t values, float* out) {
  std::memcpy(out, source, static_cast<size_t>(values) * sizeof(float));
}
void expand_f16(const std::byte* source, int64_t values, float* out) {
  for (int64_t i = 0; i < values; ++i) out[i] = half_at(source + 2 * i);
}
void expand_bf16(const std::byte* source, int64_t values, float* out) {
  for (int64_t i = 0; i < values; ++i) out[i] = to_float(Bfloat16{load<uint16_t>(source + 2 * i)});
}

// One block each. A block of 32 is its float16 scale (and, for Qx_1, minimum), the fifth bits where
// there are five, then the low bits of 32 integers. A block of 256 scales groups of 32 (Q6_K: 16)
// by integers that share float16 factors.

// Scale times integer is exact in float32 (11 + 8 bits), so contraction could not change a bit.
void block_q8_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  for (int j = 0; j < 32; ++j) out[j] = scale * static_cast<float>(load<int8_t>(block + 2 + j));
}

// Byte j holds value j in its low and value j + 16 in its high nibble.
void block_q4_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  for (int j = 0; j < 16; ++j) {
    const int pair = int_at(block + 2 + j);
    out[j] = scale * static_cast<float>((pair & 15) - 8);
    out[j + 16] = scale * static_cast<float>((pair >> 4) - 8);
  }
}

// The same, and bit i of `high` is the fifth bit of value i. Every value is scale x integer +
// minimum with an exact product, so one rounding at most.
inline void expand_five_bits(const std::byte* low, uint32_t high, float scale, float minimum,
                             float* out) {
  for (int j = 0; j < 16; ++j) {
    const int pair = int_at(low + j);
    const int first = (pair & 15) | static_cast<int>((high >> j & 1u) << 4);
    const int second = (pair >> 4) | static_cast<int>((high >> (j + 16) & 1u) << 4);
    out[j] = scale * static_cast<float>(first) + minimum;
    out[j + 16] = scale * static_cast<float>(second) + minimum;
  }
}
void block_q4_1(const std::byte* block, float* out) {
  expand_five_bits(block + 4, 0, half_at(block), half_at(block + 2), out);
}
void block_q5_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  expand_five_bits(block + 6, load<uint32_t>(block + 2), scale, -16.0f * scale, out);
}
void block_q5_1(const std::byte* block, float* out) {
  expand_five_bits(block + 8, load<uint32_t>(block + 4), half_at(block), half_at(block + 2), out);
}

// Groups 2i and 2i + 1 of 32 values are the low and the high nibbles of 32 bytes; with five bits,
// bit `group` of byte j is the fifth bit of value j.
template <bool kFiveBits>
void block_k(const std::byte* block, float* out) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  for (int group = 0; group < 8; ++group, out += 32) {
    const GroupScale g = k_group_scale(block + 4, group);
    const float s = scale * g.scale, m = minimum * g.minimum;
    const std::byte* high = block + 16;
    const std::byte* low = high + (kFiveBits ? 32 : 0) + group / 2 * 32;
    for (int j = 0; j < 32; ++j) {
      const int pair = int_at(low + j), fifth = kFiveBits ? int_at(high + j) >> group & 1 : 0;
      out[j] = s * static_cast<float>((group % 2 == 0 ? pair & 15 : pair >> 4) | fifth << 4) - m;
    }
  }
}

// Two halves of 128: value 32 i + j of a half has its low nibble in byte j + 32 (i % 2), the high
// one where i > 1, and its upper two bits at 2 i in byte j; 16 values share a signed scale.
void block_q6_k(const std::byte* block, float* out) {
  const float factor = half_at(block + 208);
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i, out += 32) {
      const std::byte* low = block + 64 * half + 32 * (i % 2);
      const std::byte* high = block + 128 + 32 * half;
      const std::byte* scales = block + 192 + 8 * half + 2 * i;
      for (int j = 0; j < 32; ++j) {
        const int nibble = int_at(low + j) >> (i > 1 ? 4 : 0) & 15;
        const int q = nibble | (int_at(high + j) >> (2 * i) & 3) << 4;
        const auto scale = load<int8_t>(scales + j / 16);
        out[j] = factor * static_cast<float>(scale) * static_cast<float>(q - 32);
      }
    }
  }
}

// Groups of 16 values have a scale and a minimum in one byte each.
void block_q2_k(const std::byte* block, float* out) {
  const float factor = half_at(block + 80), minimum = half_at(block + 82);
  for (int i = 0; i < 256; ++i) {
    const int scales = int_at(block + i / 16);
    const float s = factor * static_cast<float>(scales & 15);
    out[i] = s * static_cast<float>(two_bits_at(block + 16, i)) -
             minimum * static_cast<float>(scales >> 4);
  }
}

// Bit i / 32 of byte i % 32 adds four; codes are from -4 on.
void block_q3_k(const std::byte* block, float* out) {
  const float factor = half_at(block + 108);
  for (int i = 0; i < 256; ++i) {
    const int third = int_at(block + i % 32) >> (i / 32) & 1;
    const int q = (two_bits_at(block + 32, i) | third << 2) - 4;
    out[i] = factor * static_cast<float>(q3_k_scale(block + 96, i / 16)) * static_cast<float>(q);
  }
}

// Nibbles as in Q4_0.
void expand_iq4(const std::byte* low, float scale, float* out) {
  for (int j = 0; j < 16; ++j) {
    out[j] = scale * static_cast<float>(iq4_value(int_at(low + j) & 15));
    out[j + 16] = scale * static_cast<float>(iq4_value(int_at(low + j) >> 4));
  }
}
void block_iq4_nl(const std::byte* block, float* out) {
  expand_iq4(block + 2, half_at(block), out);
}
void block_iq4_xs(const std::byte* block, float* out) {
  for (int group = 0; group < 8; ++group) {
    const float scale = half_at(block) * static_cast<float>(iq4_xs_scale(block, group));
    expand_iq4(block + 8 + 16 * group, scale, out + 32 * group);
  }
}

struct Format {
  std::string_view name;
  int64_t block_values;
  int64_t block_bytes;
  void (*expand)(const std::byte* source, int64_t values, float* out);
};

template <int64_t kValues, int64_t kBytes, void (*kBlock)(const std::byte*, float*)>
constexpr Format blocks(std::string_view name) {
  return {name, kValues, kBytes, [](const std::byte* source, int64_t values, float* out) {
            for (; values > 0; values -= kValues, source += kBytes, out += kValues) {
              kBlock(source, out);
            }
          }};
}

constexpr Format kFormats[] = {
    // by DType
    {"F32", 1, 4, expand_f32},
    {"F16", 1, 2, expand_f16},
    {"BF16", 1, 2, expand_bf16},
    blocks<32, 2 + 32, block_q8_0>("Q8_0"),
    blocks<32, 2 + 16, block_q4_0>("Q4_0"),
    blocks<32, 2 + 2 + 16, block_q4_1>("Q4_1"),
    blocks<32, 2 + 4 + 16, block_q5_0>("Q5_0"),
    blocks<32, 2 + 2 + 4 + 16, block_q5_1>("Q5_1"),
    blocks<256, 2 + 2 + 12 + 128, block_k<false>>("Q4_K"),
    blocks<256, 2 + 2 + 12 + 32 + 128, block_k<true>>("Q5_K"),
    blocks<256, 128 + 64 + 16 + 2, block_q6_k>("Q6_K"),
    blocks<256, 16 + 64 + 2 + 2, block_q2_k>("Q2_K"),
    blocks<256, 32 + 64 + 12 + 2, block_q3_k>("Q3_K"),
    blocks<32, 2 + 16, block_iq4_nl>("IQ4_NL"),
    blocks<256, 2 + 2 + 4 + 128, block_iq4_xs>("IQ4_XS"),
};

const Format& format(DType dtype) {
  const auto index = static_cast<size_t>(dtype);
  require(index < std::size(kFormats), "dtype: not one of the enumerators");
  return kFormats[index];
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

// Two halves of 128 values: value 32 i + j of a half lies at bit 2 i of its byte j.
int two_bits_at(const std::byte* packed, int i) {
  return int_at(packed + i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
}

// Four low bits in nibbles of bytes 0 to 7, two upper bits in bytes 8 to 11.
int q3_k_scale(const std::byte* packed, int group) {
  const int low = int_at(packed + group % 8) >> (group / 8 * 4) & 15;
  const int high = int_at(packed + 8 + group % 4) >> (group / 4 * 2) & 3;
  return (low | high << 4) - 32;
}

// Two upper bits in the 16 bits after the factor, four low bits in the nibbles behind them.
int iq4_xs_scale(const std::byte* block, int group) {
  const int low = int_at(block + 4 + group / 2) >> (group % 2 * 4) & 15;
  const int high = load<uint16_t>(block + 2) >> (2 * group) & 3;
  return (low | high << 4) - 32;
}

int iq4_value(int code) {
  constexpr int kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
  return kValues[code & 15];
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
  const Format& f = format(dtype);
  row_bytes(dtype, values);  // whole blocks
  if (values > 0) f.expand(source, values, out);
}

void round_values(DType dtype, const float* values, int64_t count, std::byte* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits =
        dtype == DType::kF16 ? round_half(values[i]) : round_bfloat16(values[i]).bits;
    std::memcpy(out + 2 * i, &bits, sizeof bits);
  }
}

std::optional<DType> dtype_from_name(std::string_view name) {
  const auto* at = std::ranges::find(kFormats, name, &Format::name);
  if (at == std::end(kFormats)) return std::nullopt;
  return static_cast<DType>(at - kFormats);
}

}  // namespace alignpro
