// A block a row; the row is read twice, the second time from the cache. Squares are added by
// thread, warp and block in one tree, whatever the number of rows.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(int64_t cols, Rows<T> x, const T* weight, float eps, Rows<T> y) {
  __shared__ float scratch[kMaxWarps];
  DeviceBlock block;
  rms_norm_row(block, int64_t{blockIdx.x}, cols, x, weight, eps, y, scratch);
}

}  // namespace

void rms_norm(const Matrix& x, const void* weight, float eps, const Matrix& y, Stream stream) {
  constexpr const char* kOp = "rms_norm";
  check_matrix(kOp, "x", x, x.rows, x.cols, x.dtype);
  check_matrix(kOp, "y", y, x.rows, x.cols, x.dtype);
  check_aligned(kOp, "weight", weight);
  dispatch(kOp, x.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, rms_norm_kernel<T>, count(x.rows), kThreads, 0, stream, x.cols,
           Rows<T>{static_cast<T*>(x.data), x.ld}, static_cast<const T*>(weight), eps,
           Rows<T>{static_cast<T*>(y.data), y.ld});
  });
}

}  // namespace alignpro::cuda
