#pragma once

#include <cstddef>
#include <cstdint>

#include "alignpro/core/dtype.h"
#include "alignpro/ops/kv_view.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

using ops::kKvBlock;

// Raw storage of KV blocks, by integer id; who owns which block is the prefix cache's business.
// Within a block: [layer][kv head]{K, V} of kKvBlock positions each, as the device's ops lay them
// out.
class KvPool {
 public:
  // Address space for `capacity` blocks is reserved at once; on the CPU pages are touched on first
  // use. The ops outlive the pool.
  KvPool(ops::Ops& ops, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity,
         DType dtype);

  static int64_t block_bytes(int64_t layers, int64_t kv_heads, int64_t head_dim, DType dtype) {
    return layers * kv_heads * 2 * head_dim * kKvBlock * alignpro::block_bytes(dtype);
  }
  // One of the layers whose blocks lie in one piece each from `base` on.
  static ops::KvView layer_of(void* base, int64_t layers, int64_t index, int64_t kv_heads,
                              int64_t head_dim, DType dtype) {
    const int64_t half = head_dim * kKvBlock * alignpro::block_bytes(dtype);
    return {static_cast<std::byte*>(base) + index * kv_heads * 2 * half,
            layers * kv_heads * 2 * half, 2 * half, half, dtype};
  }

  ops::KvView layer(int64_t index) const {
    return layer_of(memory_.data(), layers_, index, kv_heads_, head_dim_, dtype_);
  }

  // Copies the first `slots` positions of block `from` to block `to`, all layers and heads.
  void copy_slots(int64_t from, int64_t to, int64_t slots) {
    ops_.kv_copy_slots(layer(0), layers_ * kv_heads_, head_dim_, from, to, slots);
  }

 private:
  ops::Ops& ops_;
  const int64_t layers_, kv_heads_, head_dim_;
  const DType dtype_;
  const ops::Buffer memory_;
};

}  // namespace alignpro::model
