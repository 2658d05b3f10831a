#pragma once

#include <cstdint>
#include <functional>

#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops {

// An output-major matrix W [rows, cols] (y = W x), packed once for the matrix products: panels of
// 16 rows, each [cols][16], so that a panel streams through memory in the order the kernel reads
// it. Rows past the end of the last panel are zero.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(int64_t rows, int64_t cols);

  // Packs a matrix whose rows [begin, end) `read` writes to out [end - begin, cols].
  static PackedMatrix pack(int64_t rows, int64_t cols,
                           const std::function<void(int64_t begin, int64_t end, float* out)>& read,
                           ThreadTeam& team);
  static PackedMatrix pack(int64_t rows, int64_t cols, const float* source);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t panels() const { return (rows_ + cpu::kPanel - 1) / cpu::kPanel; }
  int64_t bytes() const { return data_.capacity() * static_cast<int64_t>(sizeof(float)); }

  // Panel p: [cols][16].
  const float* panel(int64_t p) const { return data_.data() + p * cols_ * cpu::kPanel; }

  // Copies row `row` to out [cols].
  void read_row(int64_t row, float* out) const;

 private:
  void pack_panel(int64_t p, const float* source);

  int64_t rows_ = 0;
  int64_t cols_ = 0;
  AlignedBuffer data_;
};

}  // namespace alignpro::ops
