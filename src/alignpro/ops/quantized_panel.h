#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "alignpro/ops/quantized_matrix.h"

namespace alignpro::ops {

// Rearranges up to 16 rows of `cols` values in one format other than float32 into a panel
// (cpu/panel_layout.h): the same codes and scales, no arithmetic. Missing rows are zero.
void pack_quantized_panel(DType dtype, std::span<const QuantizedRow> rows, int64_t cols,
                          std::byte* out);

}  // namespace alignpro::ops
