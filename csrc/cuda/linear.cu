// Tiles of the output; blocks beside each other share a tile of the weight, which is then read once
// for up to a wave of rows. Few rows are bound by that reading: their tiles are narrow, so that
// there is a block for every multiprocessor, with some 30 KB on the way to each (5 TB/s at 800 ns
// over 132 of them). An element's sum is the same chain in every tile, so that a row's bits do not
// depend on the choice.

#include "bodies/linear.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"

namespace alignpro::cuda {
namespace {

template <typename Shape, typename T, bool kLora>
__global__ void __launch_bounds__(Shape::kThreads) linear_kernel(Linear<T> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  linear_tile<Shape, kLora>(block, args, int64_t{blockIdx.x} * Shape::kRows,
                            int64_t{blockIdx.y} * Shape::kColumns, shared);
}

template <typename Shape>
dim3 grid_of(int64_t rows, int64_t cols) {
  return dim3(count((rows + Shape::kRows - 1) / Shape::kRows),
              count((cols + Shape::kColumns - 1) / Shape::kColumns));
}

// fn(shape) of the largest that leaves few multiprocessors without a block.
template <typename Fn>
void with_shape(int64_t rows, int64_t cols, const Fn& fn) {
  const auto fills = [&](auto shape) {
    const dim3 grid = grid_of<decltype(shape)>(rows, cols);
    return int64_t{grid.x} * grid.y >= 128;
  };
  if (rows <= Rows16::kRows) return fn(Rows16());
  if (rows > Rows64::kRows && fills(WideTile())) return fn(WideTile());
  if (fills(Rows64())) return fn(Rows64());
  fn(Rows64Narrow());
}

}  // namespace

void linear(const Matrix& x, const Matrix& weight, const LinearExtras& extras, const Matrix& out,
            Stream stream) {
  constexpr const char* kOp = "linear";
  const int64_t rows = x.rows, cols = weight.rows;
  check_matrix(kOp, "x", x, rows, weight.cols, x.dtype);
  check_matrix(kOp, "weight", weight, cols, x.cols, x.dtype);
  check_matrix(kOp, "out", out, rows, cols, x.dtype);
  const bool with_residual = extras.residual.data != nullptr;
  const bool with_lora = extras.lora_x.data != nullptr;
  if (with_residual) check_matrix(kOp, "residual", extras.residual, rows, cols, x.dtype);
  if (with_lora) {
    check_matrix(kOp, "lora_x", extras.lora_x, rows, extras.lora_up.cols, x.dtype);
    check_matrix(kOp, "lora_up", extras.lora_up, cols, extras.lora_x.cols, x.dtype);
  }
  dispatch(kOp, x.dtype, [&](auto type) {
    using T = decltype(type);
    const Linear<T> args{operand<T>(x),
                         operand<T>(weight),
                         1.0f,
                         operand<T>(extras.lora_x),
                         operand<T>(extras.lora_up),
                         extras.lora_scale,
                         static_cast<const T*>(extras.bias),
                         {static_cast<const T*>(extras.residual.data), extras.residual.ld},
                         {static_cast<T*>(out.data), out.ld}};
    with_shape(rows, cols, [&](auto shape) {
      using Shape = decltype(shape);
      launch(kOp, with_lora ? linear_kernel<Shape, T, true> : linear_kernel<Shape, T, false>,
             grid_of<Shape>(rows, cols), Shape::kThreads, kProductBytes<T, Shape>, stream, args);
    });
  });
}

}  // namespace alignpro::cuda
