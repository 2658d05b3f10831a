#pragma once

#include <cstdint>

#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/cpu/panel_layout.h"
#include "alignpro/ops/matrix_view.h"

namespace alignpro::ops {

// The left operand of an integer product: rows quantised in groups of 32 columns, in tiles of
// kInt8TileRows. A group's scale is its largest magnitude / 127.
class Int8Rows {
 public:
  // Columns lie next to each other. Without a pool the caller works alone, as an item of a running
  // pool must.
  void pack(int64_t rows, int64_t cols, MatrixView source, ThreadPool* pool) {
    stride_ = cols / cpu::kGroup * cpu::kInt8GroupBytes;
    const int64_t tiles = (rows + cpu::kInt8TileRows - 1) / cpu::kInt8TileRows;
    auto* to = reinterpret_cast<uint8_t*>(buffer_.reserve(tiles * stride_ / 4));
    const auto pack_tile = [&](int64_t tile, int) {
      const int64_t first = tile * cpu::kInt8TileRows, left = rows - first;
      cpu::kernels().quantize_rows(left < cpu::kInt8TileRows ? left : cpu::kInt8TileRows, cols,
                                   source.data + first * source.row_stride, source.row_stride,
                                   to + tile * stride_);
    };
    if (pool == nullptr || rows * cols <= 8192) {
      for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(tile, 0);
    } else {
      pool->run(tiles, pack_tile);
    }
  }

  // From row `row` on, a multiple of kInt8TileRows; tiles lie stride() bytes apart.
  const uint8_t* at(int64_t row) const {
    return reinterpret_cast<const uint8_t*>(buffer_.data()) + row / cpu::kInt8TileRows * stride_;
  }
  int64_t stride() const { return stride_; }

 private:
  AlignedBuffer buffer_;
  int64_t stride_ = 0;
};

}  // namespace alignpro::ops
