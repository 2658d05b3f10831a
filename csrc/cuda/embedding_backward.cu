// A block a row of the table adds what was read from it, in order: no atomics. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 128;

template <typename From, typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_backward_kernel(int64_t cols, Rows<const From> d_out, const int32_t* begins,
                              const int32_t* places, Rows<T> d_table) {
  DeviceBlock block;
  embedding_backward_row(block, int64_t{blockIdx.x}, cols, d_out, begins, places, d_table);
}

}  // namespace

void embedding_backward(const Matrix& d_out, const int32_t* begins, const int32_t* places,
                        const Matrix& d_table, Stream stream) {
  constexpr const char* kOp = "embedding_backward";
  check_matrix(kOp, "d_out", d_out, d_out.rows, d_table.cols, d_out.dtype);
  check_matrix(kOp, "d_table", d_table, d_table.rows, d_table.cols, d_table.dtype);
  dispatch(kOp, d_out.dtype, [&](auto from) {
    using From = decltype(from);
    dispatch(kOp, d_table.dtype, [&](auto type) {
      using T = decltype(type);
      launch(kOp, embedding_backward_kernel<From, T>, count(d_table.rows), kThreads, 0, stream,
             d_table.cols, Rows<const From>{static_cast<const From*>(d_out.data), d_out.ld}, begins,
             places, rows_as<T>(d_table));
    });
  });
}

}  // namespace alignpro::cuda
