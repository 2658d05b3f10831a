#include "alignpro/model/kv_pool.h"

#include <sys/mman.h>

#include <algorithm>

#include "alignpro/core/error.h"

namespace alignpro::model {

KvPool::KvPool(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), capacity_(capacity) {
  require(layers > 0 && kv_heads > 0 && head_dim > 0 && capacity > 0,
          "KV pool: expected positive sizes, got ", layers, " layers, ", kv_heads, " heads of ",
          head_dim, ", ", capacity, " blocks");
  int64_t bytes = 0;
  const bool overflow = __builtin_mul_overflow(head_dim, kKvBlock, &half_floats_) ||
                        __builtin_mul_overflow(layers, kv_heads, &block_floats_) ||
                        __builtin_mul_overflow(block_floats_, 2 * half_floats_, &block_floats_) ||
                        __builtin_mul_overflow(block_floats_, capacity, &bytes) ||
                        __builtin_mul_overflow(bytes, int64_t{sizeof(float)}, &bytes);
  require(!overflow, "KV pool: ", capacity, " blocks overflow 64 bits; lower kv_cache_bytes");
  // Slack: the attention kernel reads whole vectors, also past the last head_dim lanes.
  mapped_bytes_ = static_cast<size_t>(bytes) + 64;
  void* mapped = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Unavailable(cat("KV pool: cannot reserve ", bytes, " bytes; lower kv_cache_bytes"));
  }
  base_ = static_cast<float*>(mapped);
}

KvPool::~KvPool() { munmap(base_, mapped_bytes_); }

void KvPool::copy_slots(int64_t from, int64_t to, int64_t slots) {
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (int64_t head = 0; head < kv_heads_; ++head) {
      const float* source = keys(from, layer, head);
      float* target = keys(to, layer, head);
      for (int64_t lane = 0; lane < head_dim_; ++lane) {  // K is [head_dim][kKvBlock]
        std::copy_n(source + lane * kKvBlock, slots, target + lane * kKvBlock);
      }
      std::copy_n(values(from, layer, head), slots * head_dim_, values(to, layer, head));
    }
  }
}

}  // namespace alignpro::model
