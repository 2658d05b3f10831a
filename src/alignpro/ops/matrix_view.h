#pragma once

#include <cstdint>

namespace alignpro::ops {

// A float matrix in memory: element (m, k) at data[m * row_stride + k * col_stride].
struct MatrixView {
  const float* data;
  int64_t row_stride;
  int64_t col_stride = 1;
};

}  // namespace alignpro::ops
