#pragma once

#include <cstddef>
#include <cstdint>

#include "alignpro/core/dtype.h"
#include "alignpro/ops/kv_view.h"

namespace alignpro::model {

using ops::kKvBlock;

// Raw storage of KV blocks, by integer id; who owns which block is the prefix cache's business.
// Address space for `capacity` blocks is reserved at once, pages are touched on first use.
// Within a block: [layer][kv head]{ K as [head_dim][kKvBlock], V as [kKvBlock][head_dim] }, float32
// or float16.
class KvPool {
 public:
  // `layers` may be 1 for a pass that does not outlive a layer (scoring): every layer then maps to
  // the same storage.
  KvPool(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity,
         DType dtype = DType::kF32);
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  static int64_t block_bytes(int64_t layers, int64_t kv_heads, int64_t head_dim, DType dtype) {
    return layers * kv_heads * 2 * head_dim * kKvBlock * alignpro::block_bytes(dtype);
  }

  int64_t capacity() const { return capacity_; }
  int64_t block_bytes() const { return block_bytes_; }

  // All blocks of one layer, as the ops take them.
  ops::KvView layer(int64_t index) const {
    return {base_ + (layers_ == 1 ? 0 : index) * kv_heads_ * 2 * half_bytes_, block_bytes_,
            2 * half_bytes_, half_bytes_, dtype_};
  }

  // Copies the first `slots` positions of block `from` to block `to`, all layers and heads.
  void copy_slots(int64_t from, int64_t to, int64_t slots);

 private:
  int64_t layers_, kv_heads_, head_dim_, capacity_;
  DType dtype_;
  int64_t half_bytes_, block_bytes_;  // half: K or V of one layer and head
  std::byte* base_ = nullptr;
  size_t mapped_bytes_ = 0;
};

}  // namespace alignpro::model
