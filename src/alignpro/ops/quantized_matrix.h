#pragma once

#include <cstddef>
#include <cstdint>

#include "alignpro/core/dtype.h"

namespace alignpro::ops {

// A matrix [rows, cols] as it lies in a file or in a tensor: rows in order, values in any storage
// format, widened to float32 where they are used. Points to memory of the caller's.
struct QuantizedMatrix {
  const std::byte* data;
  DType dtype;
  int64_t rows;
  int64_t cols;
};

// One row of such a matrix, for matrices that are put together from several.
struct QuantizedRow {
  const std::byte* data;
  DType dtype;
};

}  // namespace alignpro::ops
