// A block a row, 16 bytes a thread. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(int64_t n, Rows<T> gate_up, Rows<T> h) {
  DeviceBlock block;
  swiglu_row(block, int64_t{blockIdx.x}, n, gate_up, h);
}

}  // namespace

void swiglu(const Matrix& gate_up, const Matrix& h, Stream stream) {
  constexpr const char* kOp = "swiglu";
  check_matrix(kOp, "h", h, h.rows, h.cols, h.dtype);
  check_matrix(kOp, "gate_up", gate_up, h.rows, 2 * h.cols, h.dtype);
  dispatch(kOp, h.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, swiglu_kernel<T>, count(h.rows), kThreads, 0, stream, h.cols, rows_as<T>(gate_up),
           rows_as<T>(h));
  });
}

}  // namespace alignpro::cuda
