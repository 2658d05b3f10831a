// A block a row: two sums in the tree of rms_norm, then the row again, from the cache.

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
  rms_norm_backward_row(block, int64_t{blockIdx.x}, cols, x, weight, eps, dy, dx, scratch);
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
           Rows<const T>{static_cast<const T*>(x.data), x.ld}, static_cast<const T*>(weight), eps,
           Rows<const T>{static_cast<const T*>(dy.data), dy.ld},
           Rows<T>{static_cast<T*>(dx.data), dx.ld});
  });
}

}  // namespace alignpro::cuda
