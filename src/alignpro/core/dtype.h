#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace alignpro {

// Storage formats of weights in a file. Arithmetic is float32 throughout.
enum class DType { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1 };

std::string_view dtype_name(DType dtype);

// Values that share one scale: 1 for plain floats, 32 for the quantised formats.
int64_t block_values(DType dtype);

// Bytes of one such block.
int64_t block_bytes(DType dtype);

// Bytes of a row of `values` values; `values` must be a multiple of block_values(dtype).
int64_t row_bytes(DType dtype, int64_t values);

// Expands `values` stored values (a multiple of block_values) to float32, exactly.
void dequantize(DType dtype, const std::byte* source, int64_t values, float* out);

}  // namespace alignpro
