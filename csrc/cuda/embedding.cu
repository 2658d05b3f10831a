// A block a token copies its row, 16 bytes a thread. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(Rows<T> table, int64_t vocab, int64_t cols, const int32_t* tokens, float scale,
                     Rows<T> out) {
  DeviceBlock block;
  embedding_row(block, int64_t{blockIdx.x}, table, vocab, cols, tokens, scale, out);
}

}  // namespace

void embedding(const Matrix& table, const int32_t* tokens, float scale, const Matrix& out,
               Stream stream) {
  constexpr const char* kOp = "embedding";
  check_matrix(kOp, "table", table, table.rows, table.cols, table.dtype);
  check_matrix(kOp, "out", out, out.rows, table.cols, table.dtype);
  require(table.rows >= 1, kOp, ": table: expected at least one row, got none");
  dispatch(kOp, table.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, embedding_kernel<T>, count(out.rows), kThreads, 0, stream, rows_as<T>(table),
           table.rows, table.cols, tokens, scale, rows_as<T>(out));
  });
}

}  // namespace alignpro::cuda
