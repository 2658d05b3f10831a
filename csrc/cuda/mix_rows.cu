// A block a sum, 16 bytes a thread. Bound by memory: a few rows of it, once a step.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mix_rows_kernel(Rows<const T> x, int64_t cols, const int32_t* begins, const int32_t* rows,
                    const float* weights, Rows<T> out) {
  DeviceBlock block;
  mix_rows_row<T>(block, int64_t{blockIdx.x}, cols, x, begins, rows, weights, out);
}

}  // namespace

void mix_rows(const Matrix& x, const int32_t* begins, const int32_t* rows, const float* weights,
              const Matrix& out, Stream stream) {
  constexpr const char* kOp = "mix_rows";
  check_matrix(kOp, "x", x, x.rows, x.cols, x.dtype);
  check_matrix(kOp, "out", out, out.rows, x.cols, x.dtype);
  dispatch(kOp, x.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, mix_rows_kernel<T>, count(out.rows), kThreads, 0, stream,
           Rows<const T>{static_cast<const T*>(x.data), x.ld}, x.cols, begins, rows, weights,
           rows_as<T>(out));
  });
}

}  // namespace alignpro::cuda
