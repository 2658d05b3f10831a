#pragma once

// A linear layer by tiles: out = x W^T + scale (x_lora B^T) + bias + residual. The adapter's second
// product joins in the same pass, while the tile is in registers; x_lora = x A^T comes before.

#include <cmath>
#include <cstdint>

#include "rows.h"
#include "tile_product.h"

namespace alignpro::cuda {

template <typename T>
struct Linear {
  Operand<T> x, weight;
  Operand<T> lora_x, lora_up;  // where kLora
  float lora_scale;
  const T* bias;           // [out features], or null
  Rows<const T> residual;  // of out's shape, or null
  Rows<T> out;
};

template <bool kLora, typename T, typename Block>
ALIGNPRO_BODY void linear_tile(Block& block, const Linear<T>& args, int64_t row, int64_t column,
                               void* shared) {
  Sums sums, lora;
  tile_product(block, args.x, row, args.weight, column, shared, sums);
  if constexpr (kLora) tile_product(block, args.lora_x, row, args.lora_up, column, shared, lora);
  for_share(Share(block.thread()), [&](int m, int n, int i, int j, int e) {
    const int64_t r = row + m, c = column + n;
    if (r >= args.x.rows || c >= args.weight.rows) return;
    float value = sums[i][j][e];
    if constexpr (kLora) value = std::fma(args.lora_scale, lora[i][j][e], value);
    if (args.bias != nullptr) value += to_float(args.bias[c]);
    if (args.residual.data != nullptr) {
      value += to_float(args.residual.data[r * args.residual.ld + c]);
    }
    args.out.data[r * args.out.ld + c] = stored<T>(value);
  });
}

}  // namespace alignpro::cuda
