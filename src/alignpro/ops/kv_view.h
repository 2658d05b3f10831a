#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "alignpro/core/dtype.h"

namespace alignpro::ops {

// Positions per KV block. Blocks are aligned to absolute position: position p lives in slot
// p % kKvBlock of the sequence's block p / kKvBlock.
inline constexpr int64_t kKvBlock = 16;

// One layer of a pool of KV blocks. Keys are stored as the matrix product reads them:
// K [head_dim][kKvBlock], V [kKvBlock][head_dim]; as float32, or rounded to float16 when written
// and expanded where they are used.
struct KvView {
  std::byte* base;
  int64_t block_stride;  // these in bytes
  int64_t head_stride;
  int64_t value_offset;
  DType dtype;  // kF32 or kF16

  template <typename T>
  T* keys(int64_t block, int64_t head) const {
    return reinterpret_cast<T*>(base + block * block_stride + head * head_stride);
  }
  template <typename T>
  T* values(int64_t block, int64_t head) const {
    return reinterpret_cast<T*>(keys<std::byte>(block, head) + value_offset);
  }
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
