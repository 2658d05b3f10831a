// A block a row turns the gradients of its queries and keys back, in place.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rope_backward_kernel(Rows<T> d_qkv, int64_t heads, int64_t head_dim, int64_t rotary_dim,
                         const float* cos, const float* sin, const int32_t* positions) {
  DeviceBlock block;
  rope_backward_row(block, int64_t{blockIdx.x}, d_qkv, heads, head_dim, rotary_dim, cos, sin,
                    positions);
}

}  // namespace

void rope_backward(const AttentionShape& shape, const Matrix& d_qkv, int64_t rotary_dim,
                   const float* cos, const float* sin, const int32_t* positions, Stream stream) {
  constexpr const char* kOp = "rope_backward";
  check_heads(kOp, shape, d_qkv, "d_qkv");
  check_rotary(kOp, shape, rotary_dim);
  dispatch(kOp, d_qkv.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, rope_backward_kernel<T>, count(d_qkv.rows), kThreads, 0, stream, rows_as<T>(d_qkv),
           shape.num_heads + shape.num_kv_heads, shape.head_dim, rotary_dim, cos, sin, positions);
  });
}

}  // namespace alignpro::cuda
