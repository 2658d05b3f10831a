// A block a row: turns its queries in place, its keys on their way into the pool, copies its
// values. Angles come from a table, so that a graph of a decode step reads positions from memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rope_kv_write_kernel(RopeKvWrite<T> args) {
  DeviceBlock block;
  rope_kv_write_row(block, int64_t{blockIdx.x}, args);
}

}  // namespace

void rope_kv_write(const AttentionShape& shape, const Matrix& qkv, int64_t rotary_dim,
                   const float* cos, const float* sin, const int32_t* positions,
                   const int32_t* blocks, const PagedKv& kv, Stream stream) {
  constexpr const char* kOp = "rope_kv_write";
  check_attention(kOp, shape, qkv, kv);
  check_rotary(kOp, shape, rotary_dim);
  dispatch(kOp, qkv.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, rope_kv_write_kernel<T>, count(qkv.rows), kThreads, 0, stream,
           RopeKvWrite<T>{rows_as<T>(qkv), shape.num_heads, shape.num_kv_heads, rotary_dim, cos,
                          sin, positions, blocks, kv_blocks<T>(kv, shape)});
  });
}

}  // namespace alignpro::cuda
