#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/attention_shape.h"
#include "alignpro/ops/kv_view.h"

namespace alignpro::ops {

// Positions whose softmax is taken at once. A row's chunks begin at multiples of it and are merged
// in ascending order, so they may be computed anywhere and bound the scores held.
inline constexpr int64_t kKvChunk = 512;

// Which rows of a batch look at which blocks together, and the pieces of work. Made once for the
// layers of a pass; it decides what is read how often, never a bit of the result. Points into the
// segments' blocks.
struct AttentionPlan {
  struct Token {
    int64_t row;  // of the batch
    int64_t position;
  };
  // Tokens [token_begin, token_end) of a tile, which all look at blocks[first_block, end_block)
  // and at no position from key_end on.
  struct Run {
    int64_t token_begin, token_end;
    const int32_t* blocks;
    int64_t first_block, end_block;
    int64_t key_end;
  };
  // Tokens that share passes over keys: of one segment, or of several with common leading blocks.
  // Its runs are in ascending order of blocks for each token.
  struct Tile {
    std::span<const Token> tokens;
    std::span<const Run> runs;
    int64_t first_block, end_block;  // of all its runs

    int64_t first_chunk() const { return first_block * kKvBlock / kKvChunk; }
    int64_t end_chunk() const { return (end_block * kKvBlock - 1) / kKvChunk + 1; }
  };
  // One KV head of a tile: all of its chunks, or a single one, whose result goes to `partial`.
  struct Item {
    const Tile* tile;
    int64_t kv_head;
    int64_t chunk;    // -1: all
    int64_t partial;  // offset in floats
  };
  // A tile and head whose chunks are computed apart.
  struct Merge {
    const Tile* tile;
    int64_t kv_head;
    int64_t partial;  // of its first chunk
  };

  AttentionPlan(const AttentionShape& shape, std::span<const Segment> segments, int threads);
  AttentionPlan(const AttentionPlan&) = delete;
  AttentionPlan& operator=(const AttentionPlan&) = delete;

  std::vector<Token> tokens;
  std::vector<Run> runs;
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::vector<Merge> merges;
  int64_t partial_floats = 0;
};

// Floats of one chunk's result for `rows` query rows: maxima, sums, and outputs in panels of 16.
int64_t attention_partial_floats(int64_t rows, int64_t head_dim);

// Copies K and V of the named rows of qkv [rows, qkv_size] into their blocks. Into float16 they are
// rounded to nearest; infinities and NaN stay what they are, and what is finite but beyond 65504
// throws NumericError.
void kv_write(const AttentionShape& shape, const float* qkv, std::span<const KvWrite> writes,
              const KvView& kv, ThreadPool& pool);

// out [rows, q_size] = softmax(scale q K^T) V, causal, over the planned segments' blocks (already
// written). A row's bits depend on its own position, window and keys alone.
void attention(const AttentionShape& shape, const float* qkv, const AttentionPlan& plan,
               const KvView& kv, float* out, ThreadPool& pool);

// For the backward: the batch rows that hold positions [0, position + row_count) of a segment, its
// own rows included (a prefix shared by several segments is named by each).
struct SegmentRows {
  int64_t row_begin;
  int64_t row_count;
  int64_t position;
  std::span<const int32_t> key_rows;  // [position + row_count]
};

// Adds to the k and v columns of dqkv [rows, qkv_size] their gradients, and overwrites its q
// columns, given out and dout of a forward over the same rows. Probabilities are computed again.
// `workspace` holds attention_backward_floats: keys shared by segments are summed afterwards, in
// order, whatever the pool.
void attention_backward(const AttentionShape& shape, const float* qkv, const float* out,
                        const float* dout, std::span<const SegmentRows> segments, float* dqkv,
                        float* workspace, ThreadPool& pool);
int64_t attention_backward_floats(const AttentionShape& shape,
                                  std::span<const SegmentRows> segments);

}  // namespace alignpro::ops
