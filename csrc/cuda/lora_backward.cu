// Sums over rows in chunks of 1024, each by tiles of 128 x 128, and then over the chunks in
// ascending order: ranks are few, so it is the chunks that fill the machine.

#include "bodies/linear.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kTileThreads) row_sums_kernel(RowSums<T> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  row_sums_tile(block, args, int64_t{blockIdx.x} * kTile, int64_t{blockIdx.y} * kTile,
                int64_t{blockIdx.z}, shared);
}

__global__ void __launch_bounds__(kThreads)
    join_row_sums_kernel(const float* partial, int64_t chunks, int64_t rows, int64_t cols,
                         float scale, float* out, int64_t ld) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + DeviceBlock().thread();
  join_row_sums(i, partial, chunks, rows, cols, scale, out, ld);
}

int64_t chunks_of(int64_t rows) { return (rows + kSumRows - 1) / kSumRows; }

// out = scale A^T B.
template <typename T>
void sum_rows(const char* op, const Matrix& a, const Matrix& b, float scale, const Matrix& out,
              void* workspace, Stream stream) {
  const int64_t chunks = chunks_of(a.rows);
  auto* partial = static_cast<float*>(workspace);
  launch(
      op, row_sums_kernel<T>,
      dim3(count((a.cols + kTile - 1) / kTile), count((b.cols + kTile - 1) / kTile), count(chunks)),
      kTileThreads, kProductBytes<T>, stream, RowSums<T>{columns<T>(a), columns<T>(b), partial});
  launch(op, join_row_sums_kernel, count((a.cols * b.cols + kThreads - 1) / kThreads), kThreads, 0,
         stream, partial, chunks, a.cols, b.cols, scale, static_cast<float*>(out.data), out.ld);
}

}  // namespace

int64_t lora_backward_bytes(int64_t rows, int64_t inputs, int64_t outputs, int64_t rank) {
  return chunks_of(rows) * rank * (inputs > outputs ? inputs : outputs) * 4;
}

void lora_backward(const LoraBackwardInput& in, const Matrix& d_a, const Matrix& d_b,
                   void* workspace, Stream stream) {
  constexpr const char* kOp = "lora_backward";
  const int64_t rows = in.x.rows, rank = in.lora_x.cols;
  const DType dtype = in.x.dtype;
  check_matrix(kOp, "x", in.x, rows, in.x.cols, dtype);
  check_matrix(kOp, "lora_x", in.lora_x, rows, rank, dtype);
  check_matrix(kOp, "dy", in.dy, rows, in.dy.cols, dtype);
  check_matrix(kOp, "d_lora_down", in.d_lora_down, rows, rank, dtype);
  check_matrix(kOp, "d_a", d_a, rank, in.x.cols, DType::kF32);
  check_matrix(kOp, "d_b", d_b, in.dy.cols, rank, DType::kF32);
  check_aligned(kOp, "workspace", workspace);
  require(rows >= 1, kOp, ": expected at least one row, got none");
  dispatch(kOp, dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows<T>(kOp, in.d_lora_down, in.x, 1.0f, d_a, workspace, stream);
    sum_rows<T>(kOp, in.dy, in.lora_x, in.lora_scale, d_b, workspace, stream);
  });
}

}  // namespace alignpro::cuda
