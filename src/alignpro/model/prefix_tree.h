#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/model/batch.h"
#include "alignpro/ops/attention.h"

namespace alignpro::model {

// Sequences packed without repetition: a tree whose nodes are runs of tokens, each run one segment
// of a batch. A token shared by several sequences is one row.
class PrefixTree {
 public:
  // Inputs are the first size - 1 tokens of each sequence (the last one is only predicted).
  PrefixTree(std::span<const std::span<const int32_t>> sequences);

  // tokens, positions, segments and KV writes; adapters and output rows are the caller's. Spans
  // point into this object.
  const Batch& batch() const { return batch_; }
  std::span<const ops::SegmentRows> segment_rows() const { return segment_rows_; }
  int64_t blocks() const { return next_block_; }  // KV blocks named by the segments

  // The batch row that holds input `position` of a sequence.
  int32_t row(int64_t sequence, int64_t position) const {
    return nodes_[static_cast<size_t>(leaf_[static_cast<size_t>(sequence)])]
        .path_rows[static_cast<size_t>(position)];
  }

 private:
  struct Node {
    int64_t row_begin, row_count, position;
    std::vector<int32_t> path_rows;    // rows of positions [0, position + row_count)
    std::vector<int32_t> path_blocks;  // KV blocks of the same positions
  };

  void grow(std::span<const std::span<const int32_t>> sequences, std::span<const int64_t> sorted,
            int64_t depth, int64_t parent);
  int64_t add_node(std::span<const int32_t> tokens, int64_t position, int64_t parent);

  std::vector<Node> nodes_;
  std::vector<int64_t> leaf_;  // per sequence, the node that holds its last input
  Batch batch_;
  std::vector<ops::SegmentRows> segment_rows_;
  int32_t next_block_ = 0;
};

}  // namespace alignpro::model
