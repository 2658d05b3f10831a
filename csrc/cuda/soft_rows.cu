// A block a token, which copies a row of the soft prompt where the token names one, 16 bytes a
// thread. Bound by memory: a few rows of a prompt.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    soft_rows_kernel(Rows<const T> soft, int64_t soft_count, int64_t cols, const int32_t* tokens,
                     Rows<T> out) {
  DeviceBlock block;
  soft_rows_row(block, int64_t{blockIdx.x}, soft, soft_count, cols, tokens, out);
}

}  // namespace

void soft_rows(const Matrix& soft, const int32_t* tokens, const Matrix& out, Stream stream) {
  constexpr const char* kOp = "soft_rows";
  check_matrix(kOp, "soft", soft, soft.rows, soft.cols, soft.dtype);
  check_matrix(kOp, "out", out, out.rows, soft.cols, soft.dtype);
  dispatch(kOp, soft.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, soft_rows_kernel<T>, count(out.rows), kThreads, 0, stream,
           Rows<const T>{static_cast<const T*>(soft.data), soft.ld}, soft.rows, soft.cols, tokens,
           rows_as<T>(out));
  });
}

}  // namespace alignpro::cuda
