#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/matrix_view.h"

namespace alignpro::ops {

// Rows packed at a time: bounds the packed copy (480 x 1536 floats are 2.9 MB).
inline constexpr int64_t kRowChunk = 480;
// The largest block of rows: 96 x 192 packed floats are 74 KB of a worker's L2.
inline constexpr int64_t kRowBlock = 96;

// The left operand of a product in the order the kernel reads it:
// [row block][contraction block][row tile][k][6].
class PackedRows {
 public:
  struct Block {
    int64_t row, rows;
    int64_t offset;  // into the packed floats
  };

  // Blocks hold at most `block_size` rows, and one begins at every row in `cuts` (ascending).
  // Without a pool the caller packs alone, as an item of a running pool must.
  void pack(int64_t rows, int64_t contract, MatrixView source, int64_t block_size, ThreadPool* pool,
            std::span<const int64_t> cuts = {}) {
    layout(rows, contract, block_size, cuts);
    const int64_t steps = (contract + cpu::kContract - 1) / cpu::kContract;
    const auto pack_item = [&](int64_t item, int) {
      const int64_t block = item / steps;
      const int64_t k_begin = item % steps * cpu::kContract;
      cpu::kernels().pack_rows(
          block_rows(block), k_count(k_begin),
          source.data + block_row(block) * source.row_stride + k_begin * source.col_stride,
          source.row_stride, source.col_stride, buffer_.data() + offset(block, k_begin));
    };
    const int64_t items = blocks() * steps;
    // Waking a pool costs more than packing a few rows.
    if (pool == nullptr || rows * contract <= 32768) {
      for (int64_t item = 0; item < items; ++item) pack_item(item, 0);
    } else {
      pool->run(items, pack_item);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t contract() const { return contract_; }
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t block_row(int64_t block) const { return blocks_[static_cast<size_t>(block)].row; }
  int64_t block_rows(int64_t block) const { return blocks_[static_cast<size_t>(block)].rows; }

  // Packed rows of a block from contraction index k_begin (a multiple of kContract), and the floats
  // from one row tile to the next.
  const float* at(int64_t block, int64_t k_begin) const {
    return buffer_.data() + offset(block, k_begin);
  }
  int64_t tile_stride(int64_t k_begin) const { return k_count(k_begin) * cpu::kRowTile; }
  int64_t k_count(int64_t k_begin) const { return std::min(cpu::kContract, contract_ - k_begin); }

 protected:
  static int64_t padded(int64_t rows) {
    return (rows + cpu::kRowTile - 1) / cpu::kRowTile * cpu::kRowTile;
  }
  int64_t offset(int64_t block, int64_t k_begin) const {
    const Block& b = blocks_[static_cast<size_t>(block)];
    return b.offset + padded(b.rows) * k_begin;
  }
  void layout(int64_t rows, int64_t contract, int64_t block_size, std::span<const int64_t> cuts) {
    rows_ = rows;
    contract_ = contract;
    blocks_.clear();
    int64_t size = 0;
    for (int64_t row = 0; row < rows;) {
      while (!cuts.empty() && cuts.front() <= row) cuts = cuts.subspan(1);
      const int64_t end = std::min({rows, row + block_size, cuts.empty() ? rows : cuts.front()});
      blocks_.push_back({row, end - row, size});
      size += padded(end - row) * contract;
      row = end;
    }
    buffer_.reserve(size);
  }

 private:
  AlignedBuffer buffer_;
  std::vector<Block> blocks_;
  int64_t rows_ = 0;
  int64_t contract_ = 0;
};

}  // namespace alignpro::ops
