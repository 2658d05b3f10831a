// A block a row; the row is read twice, the second time from the cache. Squares are added by
// thread, warp and block in one tree, whatever the number of rows. qk_norm: a warp a row and head.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(int64_t cols, Rows<T> x, const T* weight, float eps, Rows<const T> residual,
                    Rows<T> y) {
  __shared__ float scratch[kMaxWarps];
  DeviceBlock block;
  rms_norm_row(block, int64_t{blockIdx.x}, cols, x, weight, eps, residual, y, scratch);
}

void launch_rms_norm(const char* op, const Matrix& x, const void* weight, float eps,
                     const Matrix& residual, const Matrix& y, Stream stream) {
  check_matrix(op, "x", x, x.rows, x.cols, x.dtype);
  check_matrix(op, "y", y, x.rows, x.cols, x.dtype);
  check_aligned(op, "weight", weight);
  dispatch(op, x.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, rms_norm_kernel<T>, count(x.rows), kThreads, 0, stream, x.cols, rows_as<T>(x),
           static_cast<const T*>(weight), eps, rows_as<const T>(residual), rows_as<T>(y));
  });
}

constexpr int kHeadThreads = 32;

template <typename T>
__global__ void __launch_bounds__(kHeadThreads)
    qk_norm_kernel(Rows<T> qkv, int64_t num_heads, int64_t head_dim, const T* q_weight,
                   const T* k_weight, float eps) {
  __shared__ float scratch[kMaxWarps];
  DeviceBlock block;
  const int64_t head = blockIdx.y;
  const Rows<T> x{qkv.data + head * head_dim, qkv.ld};
  rms_norm_row(block, int64_t{blockIdx.x}, head_dim, x, head < num_heads ? q_weight : k_weight, eps,
               Rows<const T>{}, x, scratch);
}

}  // namespace

void rms_norm(const Matrix& x, const void* weight, float eps, const Matrix& y, Stream stream) {
  launch_rms_norm("rms_norm", x, weight, eps, {}, y, stream);
}
void rms_norm_add(const Matrix& x, const void* weight, float eps, const Matrix& residual,
                  const Matrix& y, Stream stream) {
  check_matrix("rms_norm_add", "residual", residual, x.rows, x.cols, x.dtype);
  launch_rms_norm("rms_norm_add", x, weight, eps, residual, y, stream);
}

void qk_norm(const AttentionShape& shape, const Matrix& qkv, const void* q_weight,
             const void* k_weight, float eps, Stream stream) {
  constexpr const char* kOp = "qk_norm";
  check_heads(kOp, shape, qkv, "qkv");
  check_aligned(kOp, "q_weight", q_weight);
  check_aligned(kOp, "k_weight", k_weight);
  dispatch(kOp, qkv.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(count(qkv.rows), count(shape.num_heads + shape.num_kv_heads));
    launch(kOp, qk_norm_kernel<T>, grid, kHeadThreads, 0, stream, rows_as<T>(qkv), shape.num_heads,
           shape.head_dim, static_cast<const T*>(q_weight), static_cast<const T*>(k_weight), eps);
  });
}

}  // namespace alignpro::cuda
