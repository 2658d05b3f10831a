#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/kv_view.h"

namespace alignpro::ops {

// Grouped-query attention over packed rows; qkv rows are [q heads | k heads | v heads] x head_dim.
struct AttentionShape {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t sliding_window;  // positions a token sees, itself included; 0: all
  float scale;             // 1 / sqrt(head_dim)

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int64_t q_size() const { return num_heads * head_dim; }
};

// Copies K and V of the named rows of qkv [rows, qkv_size] into their blocks.
void kv_write(const AttentionShape& shape, const float* qkv, std::span<const KvWrite> writes,
              const KvView& kv, ThreadTeam& team);

// out [rows, q_size] = softmax(scale q K^T) V, causal, over the segments' blocks (already written).
// Keys are visited in blocks of absolute position, so chunking a prefill changes no bit.
void attention(const AttentionShape& shape, const float* qkv, std::span<const Segment> segments,
               const KvView& kv, float* out, ThreadTeam& team);

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
// `scratch` grows to attention_backward_floats: keys shared by segments are summed afterwards, in
// order, whatever the team.
void attention_backward(const AttentionShape& shape, const float* qkv, const float* out,
                        const float* dout, std::span<const SegmentRows> segments, float* dqkv,
                        AlignedBuffer& scratch, ThreadTeam& team);
int64_t attention_backward_floats(const AttentionShape& shape,
                                  std::span<const SegmentRows> segments);

}  // namespace alignpro::ops
