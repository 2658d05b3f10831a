// The tiles of linear with the weight read the other way round; first dy B, which is as wide
// as the adapter's rank, then dx with the adapter's product in the same pass.

#include "checks.h"
#include "linear_tiles.h"
#include "vocabulary_tiles.h"

namespace alignpro::cuda {

void linear_backward(const Matrix& dy, const Matrix& weight, const LinearBackwardExtras& extras,
                     const Matrix& dx, Stream stream) {
  constexpr const char* kOp = "linear_backward";
  const int64_t rows = dy.rows, rank = extras.d_lora_down.cols;
  const bool with_lora = extras.d_lora_down.data != nullptr, with_dx = dx.data != nullptr;
  const bool with_residual = extras.residual.data != nullptr;
  check_matrix(kOp, "dy", dy, rows, dy.cols, dy.dtype);
  if (with_dx) {
    check_matrix(kOp, "weight", weight, dy.cols, dx.cols, dy.dtype);
    check_matrix(kOp, "dx", dx, rows, weight.cols, dy.dtype);
  }
  if (with_residual) check_matrix(kOp, "residual", extras.residual, rows, dx.cols, dy.dtype);
  if (with_lora) {
    check_matrix(kOp, "d_lora_down", extras.d_lora_down, rows, extras.lora_up.cols, dy.dtype);
    check_matrix(kOp, "lora_up", extras.lora_up, dy.cols, rank, dy.dtype);
    if (with_dx) check_matrix(kOp, "lora_down", extras.lora_down, rank, dx.cols, dy.dtype);
  }
  require(with_lora || with_dx, kOp, ": expected d_lora_down or dx to write, got neither");
  dispatch(kOp, dy.dtype, [&](auto type) {
    using T = decltype(type);
    if (with_lora) {
      launch_linear<T, true>(kOp,
                             {operand<T>(dy),
                              columns<T>(extras.lora_up),
                              extras.lora_scale,
                              {},
                              {},
                              0.0f,
                              nullptr,
                              {nullptr, 0},
                              rows_as<T>(extras.d_lora_down)},
                             false, stream);
    }
    if (!with_dx) return;
    launch_linear<T, true>(kOp,
                           {operand<T>(dy), columns<T>(weight), 1.0f,
                            operand<T>(extras.d_lora_down), columns<T>(extras.lora_down), 1.0f,
                            nullptr, rows_as<const T>(extras.residual), rows_as<T>(dx)},
                           with_lora, stream);
  });
}

}  // namespace alignpro::cuda
