// A block a row, 16 bytes a thread. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Gate, typename T>
__global__ void __launch_bounds__(kThreads) glu_kernel(int64_t n, Rows<T> gate_up, Rows<T> h) {
  DeviceBlock block;
  glu_row<Gate>(block, int64_t{blockIdx.x}, n, gate_up, h);
}

template <typename Gate>
void launch_glu(const char* op, const Matrix& gate_up, const Matrix& h, Stream stream) {
  check_matrix(op, "h", h, h.rows, h.cols, h.dtype);
  check_matrix(op, "gate_up", gate_up, h.rows, 2 * h.cols, h.dtype);
  dispatch(op, h.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, glu_kernel<Gate, T>, count(h.rows), kThreads, 0, stream, h.cols, rows_as<T>(gate_up),
           rows_as<T>(h));
  });
}

}  // namespace

void swiglu(const Matrix& gate_up, const Matrix& h, Stream stream) {
  launch_glu<Silu>("swiglu", gate_up, h, stream);
}
void geglu(const Matrix& gate_up, const Matrix& h, Stream stream) {
  launch_glu<Gelu>("geglu", gate_up, h, stream);
}

}  // namespace alignpro::cuda
