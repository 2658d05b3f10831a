// A product a tile of the output, with all that joins it: linear_tiles.h.

#include "checks.h"
#include "linear_tiles.h"
#include "vocabulary_tiles.h"
#include "wgmma.h"

namespace alignpro::cuda {

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
    if constexpr (std::is_same_v<T, Bfloat16>) {
      if (products() == Products::kWgmma) return linear_wgmma(kOp, args, with_lora, stream);
    }
    launch_linear(kOp, args, with_lora, stream);
  });
}

}  // namespace alignpro::cuda
