#pragma once

#include <cstdint>
#include <span>

namespace alignpro::ops {

// Positions per KV block. Blocks are aligned to absolute position: position p lives in slot
// p % kKvBlock of the sequence's block p / kKvBlock.
inline constexpr int64_t kKvBlock = 16;

// One layer of a pool of KV blocks. Keys are stored as the matrix product reads them:
// K [head_dim][kKvBlock], V [kKvBlock][head_dim].
struct KvView {
  float* base;
  int64_t block_stride;
  int64_t head_stride;
  int64_t value_offset;

  float* keys(int64_t block, int64_t head) const {
    return base + block * block_stride + head * head_stride;
  }
  float* values(int64_t block, int64_t head) const { return keys(block, head) + value_offset; }
};

// Consecutive tokens of one sequence inside a batch.
struct Segment {
  int64_t row_begin;                // first row in the batch
  int64_t row_count;                // >= 1
  int64_t position;                 // absolute position of the first row
  std::span<const int32_t> blocks;  // KV blocks of positions [0, position + row_count)
};

// Where a row's K and V go. A row may be written to several blocks (copies of a shared tail).
struct KvWrite {
  int32_t row;
  int32_t block;
  int32_t slot;
};

}  // namespace alignpro::ops
