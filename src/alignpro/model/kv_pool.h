#pragma once

#include <cstddef>
#include <cstdint>

#include "alignpro/ops/kv_view.h"

namespace alignpro::model {

using ops::kKvBlock;

// Raw storage of KV blocks, by integer id; who owns which block is the prefix cache's business.
// Address space for `capacity` blocks is reserved at once, pages are touched on first use.
// Within a block: [layer][kv head]{ K as [head_dim][kKvBlock], V as [kKvBlock][head_dim] } float32.
class KvPool {
 public:
  // `layers` may be 1 for a pass that does not outlive a layer (scoring): every layer then maps to
  // the same storage.
  KvPool(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity);
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  int64_t capacity() const { return capacity_; }
  int64_t block_bytes() const { return block_floats_ * static_cast<int64_t>(sizeof(float)); }

  // K and V of one block, layer and head; each head_dim * kKvBlock floats.
  float* keys(int64_t block, int64_t layer, int64_t head) const {
    return base_ + block * block_floats_ +
           ((layers_ == 1 ? 0 : layer) * kv_heads_ + head) * 2 * half_floats_;
  }
  float* values(int64_t block, int64_t layer, int64_t head) const {
    return keys(block, layer, head) + half_floats_;
  }

  // All blocks of one layer, as the ops take them.
  ops::KvView layer(int64_t index) const {
    return {keys(0, index, 0), block_floats_, 2 * half_floats_, half_floats_};
  }

  // Copies the first `slots` positions of block `from` to block `to`, all layers and heads.
  void copy_slots(int64_t from, int64_t to, int64_t slots);

 private:
  int64_t layers_, kv_heads_, head_dim_, capacity_, half_floats_, block_floats_;
  float* base_ = nullptr;
  size_t mapped_bytes_ = 0;
};

}  // namespace alignpro::model
