#pragma once

#include <cstdint>

#include "alignpro/ops/shared/attention_rows.h"

namespace alignpro::ops {

// Grouped-query attention over packed rows; qkv rows are [q heads | k heads | v heads] x head_dim.
struct AttentionShape {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t sliding_window;  // positions a token sees, itself included; 0: all
  float scale;             // of scores: 1 / sqrt(head_dim), or a family's own

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int64_t q_size() const { return num_heads * head_dim; }
  int64_t qk_size() const { return (num_heads + num_kv_heads) * head_dim; }
  // First position that a token at `position` sees.
  int64_t first_visible(int64_t position) const {
    return ops::first_visible(position, sliding_window);
  }
};

}  // namespace alignpro::ops
