#include "alignpro/model/kv_pool.h"

#include "alignpro/core/error.h"

namespace alignpro::model {
namespace {

int64_t checked_bytes(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity,
                      DType dtype) {
  require(layers > 0 && kv_heads > 0 && head_dim > 0 && capacity > 0,
          "KV pool: expected positive sizes, got ", layers, " layers, ", kv_heads, " heads of ",
          head_dim, ", ", capacity, " blocks");
  int64_t bytes = 2 * kKvBlock * alignpro::block_bytes(dtype);
  for (const int64_t factor : {layers, kv_heads, head_dim, capacity}) {
    require(!__builtin_mul_overflow(bytes, factor, &bytes), "KV pool: ", capacity,
            " blocks overflow 64 bits; lower kv_cache_bytes");
  }
  return bytes;
}

}  // namespace

KvPool::KvPool(ops::Ops& ops, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity,
               DType dtype)
    : ops_(ops),
      layers_(layers),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      dtype_(dtype),
      memory_(ops, checked_bytes(layers, kv_heads, head_dim, capacity, dtype),
              ops::Ops::Pages::kOnTouch) {}

}  // namespace alignpro::model
