#include "alignpro/model/kv_pool.h"

#include <sys/mman.h>

#include <cstring>

#include "alignpro/core/error.h"

namespace alignpro::model {

KvPool::KvPool(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity, DType dtype)
    : layers_(layers),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      capacity_(capacity),
      dtype_(dtype) {
  require(layers > 0 && kv_heads > 0 && head_dim > 0 && capacity > 0,
          "KV pool: expected positive sizes, got ", layers, " layers, ", kv_heads, " heads of ",
          head_dim, ", ", capacity, " blocks");
  require(dtype == DType::kF32 || dtype == DType::kF16, "KV pool: expected F32 or F16, got ",
          dtype_name(dtype));
  int64_t bytes = 0;
  const bool overflow =
      __builtin_mul_overflow(head_dim, kKvBlock * alignpro::block_bytes(dtype), &half_bytes_) ||
      __builtin_mul_overflow(layers, kv_heads, &block_bytes_) ||
      __builtin_mul_overflow(block_bytes_, 2 * half_bytes_, &block_bytes_) ||
      __builtin_mul_overflow(block_bytes_, capacity, &bytes);
  require(!overflow, "KV pool: ", capacity, " blocks overflow 64 bits; lower kv_cache_bytes");
  // Slack: the attention kernel reads whole vectors, also past the last head_dim lanes.
  mapped_bytes_ = static_cast<size_t>(bytes) + 64;
  void* mapped = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Unavailable(cat("KV pool: cannot reserve ", bytes, " bytes; lower kv_cache_bytes"));
  }
  base_ = static_cast<std::byte*>(mapped);
}

KvPool::~KvPool() { munmap(base_, mapped_bytes_); }

void KvPool::copy_slots(int64_t from, int64_t to, int64_t slots) {
  const int64_t lane_bytes = kKvBlock * alignpro::block_bytes(dtype_);
  const auto live = static_cast<size_t>(slots * alignpro::block_bytes(dtype_));
  for (int64_t layer = 0; layer < layers_; ++layer) {
    const ops::KvView view = this->layer(layer);
    for (int64_t head = 0; head < kv_heads_; ++head) {
      const auto* source = view.keys<std::byte>(from, head);
      auto* target = view.keys<std::byte>(to, head);
      for (int64_t lane = 0; lane < head_dim_; ++lane) {  // K is [head_dim][kKvBlock]
        std::memcpy(target + lane * lane_bytes, source + lane * lane_bytes, live);
      }
      std::memcpy(view.values<std::byte>(to, head), view.values<std::byte>(from, head),
                  live * static_cast<size_t>(head_dim_));
    }
  }
}

}  // namespace alignpro::model
