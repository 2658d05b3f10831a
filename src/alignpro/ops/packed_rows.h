#pragma once

#include <algorithm>
#include <cstdint>

#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/matrix_view.h"

namespace alignpro::ops {

// Rows packed at a time: bounds the packed copy (480 x 1536 floats are 2.9 MB).
inline constexpr int64_t kRowChunk = 480;
// Rows that share one sub-panel of weights while it is in L1; a multiple of kRowTile. With an
// accumulator tile of 96 x 16 floats, the sub-panel and one packed row tile, 22 KB of a 32 KB L1
// are in use.
inline constexpr int64_t kRowBlock = 96;

// The left operand of a product in the order the kernel reads it:
// [row block][contraction block][row tile][k][6].
class PackedRows {
 public:
  // `block_size` must be a multiple of kRowTile. Without a team the caller packs alone, as an item
  // of a running team must.
  void pack(int64_t rows, int64_t contract, MatrixView source, int64_t block_size,
            ThreadTeam* team) {
    rows_ = rows;
    contract_ = contract;
    block_size_ = block_size;
    float* packed = buffer_.reserve(padded(rows) * contract);
    const int64_t steps = (contract + cpu::kContract - 1) / cpu::kContract;
    const auto pack_item = [&](int64_t item, int) {
      const int64_t block = item / steps;
      const int64_t k_begin = item % steps * cpu::kContract;
      const int64_t k_count = std::min(cpu::kContract, contract - k_begin);
      cpu::kernels().pack_rows(
          block_rows(block), k_count,
          source.data + block * block_size * source.row_stride + k_begin * source.col_stride,
          source.row_stride, source.col_stride, packed + offset(block, k_begin));
    };
    const int64_t items = blocks() * steps;
    // Waking a team costs more than packing a few rows.
    if (team == nullptr || rows * contract <= 32768) {
      for (int64_t item = 0; item < items; ++item) pack_item(item, 0);
    } else {
      team->run(items, pack_item);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t contract() const { return contract_; }
  int64_t blocks() const { return (rows_ + block_size_ - 1) / block_size_; }
  int64_t block_rows(int64_t block) const {
    return std::min(block_size_, rows_ - block * block_size_);
  }

  // Packed rows of a block from contraction index k_begin (a multiple of kContract).
  const float* at(int64_t block, int64_t k_begin) const {
    return buffer_.data() + offset(block, k_begin);
  }

 private:
  static int64_t padded(int64_t rows) {
    return (rows + cpu::kRowTile - 1) / cpu::kRowTile * cpu::kRowTile;
  }
  int64_t offset(int64_t block, int64_t k_begin) const {
    return block * block_size_ * contract_ + padded(block_rows(block)) * k_begin;
  }

  AlignedBuffer buffer_;
  int64_t rows_ = 0;
  int64_t contract_ = 0;
  int64_t block_size_ = kRowBlock;
};

}  // namespace alignpro::ops
