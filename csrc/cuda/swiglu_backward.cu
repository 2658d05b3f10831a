// A block a row, 16 bytes a thread; the activation is computed again. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Gate, typename T>
__global__ void __launch_bounds__(kThreads)
    glu_backward_kernel(int64_t n, Rows<const T> gate_up, Rows<const T> dh, Rows<T> d_gate_up) {
  DeviceBlock block;
  glu_backward_row<Gate>(block, int64_t{blockIdx.x}, n, gate_up, dh, d_gate_up);
}

template <typename Gate>
void launch_glu_backward(const char* op, const Matrix& gate_up, const Matrix& dh,
                         const Matrix& d_gate_up, Stream stream) {
  check_matrix(op, "dh", dh, dh.rows, dh.cols, dh.dtype);
  check_matrix(op, "gate_up", gate_up, dh.rows, 2 * dh.cols, dh.dtype);
  check_matrix(op, "d_gate_up", d_gate_up, dh.rows, 2 * dh.cols, dh.dtype);
  dispatch(op, dh.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, glu_backward_kernel<Gate, T>, count(dh.rows), kThreads, 0, stream, dh.cols,
           rows_as<const T>(gate_up), rows_as<const T>(dh), rows_as<T>(d_gate_up));
  });
}

}  // namespace

void swiglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up,
                     Stream stream) {
  launch_glu_backward<Silu>("swiglu_backward", gate_up, dh, d_gate_up, stream);
}
void geglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up,
                    Stream stream) {
  launch_glu_backward<Gelu>("geglu_backward", gate_up, dh, d_gate_up, stream);
}

}  // namespace alignpro::cuda
