// A product a tile of the output, with all that joins it: linear_tiles.h.

#include "checks.h"
#include "linear_tiles.h"
#include "vocabulary_tiles.h"
#include "wgmma.h"

namespace alignpro::cuda {

void linear(const Matrix& x, const Matrix& weight, const LinearExtras& extras, const Matrix& out,
            Stream stream) {
  constexpr const char* kOp = "linear";
  check_linear(kOp, x, weight, extras.residual, out);
  const bool with_lora = extras.lora_x.data != nullptr;
  if (with_lora) {
    check_matrix(kOp, "lora_x", extras.lora_x, x.rows, extras.lora_up.cols, x.dtype);
    check_matrix(kOp, "lora_up", extras.lora_up, weight.rows, extras.lora_x.cols, x.dtype);
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
                         rows_as<const T>(extras.residual),
                         rows_as<T>(out)};
    if constexpr (std::is_same_v<T, Bfloat16>) {
      if (products() == Products::kWgmma) return linear_wgmma(kOp, args, with_lora, stream);
    }
    launch_linear(kOp, args, with_lora, stream);
  });
}

}  // namespace alignpro::cuda
