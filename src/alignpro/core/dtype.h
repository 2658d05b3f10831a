#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace alignpro {

// Storage formats of weights in a file. Arithmetic is float32 throughout.
enum class DType {
  kF32,
  kF16,
  kBF16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kQ2_K,
  kQ3_K,
  kIQ4_NL,
  kIQ4_XS
};

std::string_view dtype_name(DType dtype);
std::optional<DType> dtype_from_name(std::string_view name);

// Values of one block: 1 for plain floats, 32 for Qx_0, Qx_1 and IQ4_NL, 256 for Qx_K and IQ4_XS.
int64_t block_values(DType dtype);

// Bytes of one such block.
int64_t block_bytes(DType dtype);

// Bytes of a row of `values` values; `values` must be a multiple of block_values(dtype).
int64_t row_bytes(DType dtype, int64_t values);

// The float of these IEEE half-precision bits, exactly.
float half_to_float(uint16_t bits);
// The nearest half-precision float, ties to even; infinity from 65520 on.
uint16_t float_to_half(float value);

// Scale and minimum of group `group` (32 values each, of 8) in a Q4_K or Q5_K block: 6 bits each,
// in the 12 bytes at `packed`.
struct GroupScale {
  uint8_t scale, minimum;
};
GroupScale k_group_scale(const std::byte* packed, int group);

// Value `i` of a Q2_K or Q3_K block: its two bits in the 64 bytes at `packed`.
int two_bits_at(const std::byte* packed, int i);
// The signed scale of group `group` (16 values each, of 16) in the 12 bytes at `packed` of Q3_K.
int q3_k_scale(const std::byte* packed, int group);
// The signed scale of group `group` (32 values each, of 8) in an IQ4_XS block.
int iq4_xs_scale(const std::byte* block, int group);
// What a four-bit code of IQ4_NL and IQ4_XS stands for: -127 to 113, denser around 0.
int iq4_value(int code);

// Blocks of Q8_0 by the format's own rule: scale = largest magnitude / 127, in half precision.
// `count` is a multiple of 32. Throws InvalidArgument for NaN and for magnitudes that the scale
// cannot hold.
void quantize_q8_0(const float* values, int64_t count, std::byte* out);

// Expands `values` stored values (a multiple of block_values) to float32, exactly.
void dequantize(DType dtype, const std::byte* source, int64_t values, float* out);

// The nearest values of kF32, kF16 or kBF16, ties to even.
void round_values(DType dtype, const float* values, int64_t count, std::byte* out);

}  // namespace alignpro
