#pragma once

// The kernel of linear and linear_backward, and which tile it goes by. Blocks beside each other
// share a tile of the weight, which is then read once for up to a wave of rows. Few rows are bound
// by that reading: their tiles are narrow, so that there is a block for every multiprocessor, with
// some 30 KB on the way to each (5 TB/s at 800 ns over 132 of them). An element's sum is the same
// chain in every tile, so that a row's bits do not depend on the choice.

#include "bodies/linear.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {

template <typename Shape, bool kLora, typename T, bool kDepthMajor>
__global__ void __launch_bounds__(Shape::kThreads) linear_kernel(Linear<T, kDepthMajor> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  linear_tile<Shape, kLora>(block, args, int64_t{blockIdx.x} * Shape::kRows,
                            int64_t{blockIdx.y} * Shape::kColumns, shared);
}

// fn(shape) of the largest that leaves few multiprocessors without a block.
template <typename Fn>
void with_shape(int64_t rows, int64_t cols, const Fn& fn) {
  const auto blocks = [&](auto shape) {
    using Shape = decltype(shape);
    return ((rows + Shape::kRows - 1) / Shape::kRows) *
           ((cols + Shape::kColumns - 1) / Shape::kColumns);
  };
  if (rows > Rows64::kRows && blocks(WideTile()) >= 128) return fn(WideTile());
  if (rows > Rows16::kRows && blocks(Rows64()) >= 128) return fn(Rows64());
  // Fewer still, as an adapter's x A^T has: rather read a weight four times.
  if (rows > Rows16::kRows && blocks(Rows64Narrow()) >= 64) return fn(Rows64Narrow());
  fn(Rows16());
}

template <typename T, bool kDepthMajor>
void launch_linear(const char* op, const Linear<T, kDepthMajor>& args, bool with_lora,
                   Stream stream) {
  const int64_t rows = args.x.rows, cols = args.weight.rows;
  with_shape(rows, cols, [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(count((rows + Shape::kRows - 1) / Shape::kRows),
                    count((cols + Shape::kColumns - 1) / Shape::kColumns));
    const auto kernel = with_lora ? linear_kernel<Shape, true, T, kDepthMajor>
                                  : linear_kernel<Shape, false, T, kDepthMajor>;
    launch(op, kernel, grid, Shape::kThreads, kProductBytes<T, Shape, kDepthMajor>, stream, args);
  });
}

}  // namespace alignpro::cuda
