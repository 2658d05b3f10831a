// A block a row, 16 bytes a thread; the activation is computed again. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(int64_t n, Rows<const T> gate_up, Rows<const T> dh, Rows<T> d_gate_up) {
  DeviceBlock block;
  swiglu_backward_row(block, int64_t{blockIdx.x}, n, gate_up, dh, d_gate_up);
}

}  // namespace

void swiglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up,
                     Stream stream) {
  constexpr const char* kOp = "swiglu_backward";
  check_matrix(kOp, "dh", dh, dh.rows, dh.cols, dh.dtype);
  check_matrix(kOp, "gate_up", gate_up, dh.rows, 2 * dh.cols, dh.dtype);
  check_matrix(kOp, "d_gate_up", d_gate_up, dh.rows, 2 * dh.cols, dh.dtype);
  dispatch(kOp, dh.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, swiglu_backward_kernel<T>, count(dh.rows), kThreads, 0, stream, dh.cols,
           rows_as<const T>(gate_up), rows_as<const T>(dh), rows_as<T>(d_gate_up));
  });
}

}  // namespace alignpro::cuda
