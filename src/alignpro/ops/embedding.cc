#include "alignpro/ops/embedding.h"

#include <algorithm>

#include "alignpro/ops/row_parallel.h"

namespace alignpro::ops {

void embedding(const PackedMatrix& table, std::span<const int32_t> tokens, float scale, float* out,
               ThreadPool& pool) {
  row_parallel(static_cast<int64_t>(tokens.size()), table.cols(), pool, [&](int64_t row) {
    const int32_t token = tokens[static_cast<size_t>(row)];
    if (token < 0) return;
    float* to = out + row * table.cols();
    table.read_row(token, to);
    if (scale == 1.0f) return;
    for (int64_t c = 0; c < table.cols(); ++c) to[c] *= scale;
  });
}

void soft_rows(const float* soft, int64_t cols, std::span<const int32_t> tokens, float* out) {
  for (const int32_t token : tokens) {
    if (token < 0) std::copy_n(soft + (-1 - int64_t{token}) * cols, cols, out);
    out += cols;
  }
}

void soft_rows_backward(std::span<const int32_t> tokens, int64_t cols, const float* d_out,
                        int64_t m, float* d_soft) {
  std::fill_n(d_soft, m * cols, 0.0f);
  for (const int32_t token : tokens) {
    if (token < 0) {
      float* to = d_soft + (-1 - int64_t{token}) * cols;
      for (int64_t c = 0; c < cols; ++c) to[c] += d_out[c];
    }
    d_out += cols;
  }
}

}  // namespace alignpro::ops
