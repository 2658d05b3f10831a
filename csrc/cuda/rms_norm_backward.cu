// A block a row: two sums in the tree of rms_norm, then the row again, from the cache.
// qk_norm_backward: a warp a row and head.

#include <algorithm>

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(int64_t cols, Rows<const T> x, const T* weight, float eps,
                             Rows<const T> dy, Rows<T> dx) {
  __shared__ float scratch[kMaxWarps];
  DeviceBlock block;
  rms_norm_backward_row<true>(block, int64_t{blockIdx.x}, cols, x, weight, eps, dy, dx, scratch);
}

constexpr int kHeadThreads = 32;

// A lane reads what it overwrites.
template <typename T>
__global__ void __launch_bounds__(kHeadThreads)
    qk_norm_backward_kernel(Rows<const T> qkv, int64_t num_heads, int64_t head_dim,
                            const T* q_weight, const T* k_weight, float eps, Rows<T> d_qkv) {
  __shared__ float scratch[kMaxWarps];
  DeviceBlock block;
  const int64_t head = blockIdx.y, at = head * head_dim;
  rms_norm_backward_row<false>(
      block, int64_t{blockIdx.x}, head_dim, Rows<const T>{qkv.data + at, qkv.ld},
      head < num_heads ? q_weight : k_weight, eps, Rows<const T>{d_qkv.data + at, d_qkv.ld},
      Rows<T>{d_qkv.data + at, d_qkv.ld}, scratch);
}

}  // namespace

void rms_norm_backward(const Matrix& x, const void* weight, float eps, const Matrix& dy,
                       const Matrix& dx, Stream stream) {
  constexpr const char* kOp = "rms_norm_backward";
  check_matrix(kOp, "x", x, x.rows, x.cols, x.dtype);
  check_matrix(kOp, "dy", dy, x.rows, x.cols, x.dtype);
  check_matrix(kOp, "dx", dx, x.rows, x.cols, x.dtype);
  check_aligned(kOp, "weight", weight);
  dispatch(kOp, x.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, rms_norm_backward_kernel<T>, count(x.rows), kThreads, 0, stream, x.cols,
           rows_as<const T>(x), static_cast<const T*>(weight), eps, rows_as<const T>(dy),
           rows_as<T>(dx));
  });
}

void qk_norm_backward(const AttentionShape& shape, const Matrix& qk, const void* q_weight,
                      const void* k_weight, float eps, const Matrix& d_qkv, Stream stream) {
  constexpr const char* kOp = "qk_norm_backward";
  check_heads(kOp, shape, d_qkv, "d_qkv");
  check_matrix(kOp, "qk", qk, d_qkv.rows, std::max(qk.cols, shape.qk_size()), d_qkv.dtype);
  check_aligned(kOp, "q_weight", q_weight);
  check_aligned(kOp, "k_weight", k_weight);
  dispatch(kOp, qk.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(count(qk.rows), count(shape.num_heads + shape.num_kv_heads));
    launch(kOp, qk_norm_backward_kernel<T>, grid, kHeadThreads, 0, stream, rows_as<const T>(qk),
           shape.num_heads, shape.head_dim, static_cast<const T*>(q_weight),
           static_cast<const T*>(k_weight), eps, rows_as<T>(d_qkv));
  });
}

}  // namespace alignpro::cuda
