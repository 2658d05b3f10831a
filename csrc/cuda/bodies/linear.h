#pragma once

// A linear layer by tiles: out = scale x W^T + lora_scale (x_lora B^T) + bias + residual. The
// adapter's second product joins in the same pass, while the tile is in registers; x_lora = x A^T
// comes before. Backward is the same with dy for x, d_lora_down for x_lora, and W and A read the
// other way round: dx = dy W + d_lora_down A + residual.

#include <cmath>
#include <cstdint>

#include "rows.h"
#include "tile_product.h"

namespace alignpro::cuda {

template <typename T, bool kDepthMajor = false>
struct Linear {
  Operand<T> x;
  Operand<T, kDepthMajor> weight;
  float scale;
  Operand<T> lora_x;  // where kLora
  Operand<T, kDepthMajor> lora_up;
  float lora_scale;
  const T* bias;           // [out features], or null
  Rows<const T> residual;  // of out's shape, or null
  Rows<T> out;
};

// Tiles for few rows, beside WideTile: those of 16 have a chain of products a warp, 8 columns each.
using Rows16 = TileShape<16, 32, 1, 4, 256, 6>;
using Rows64 = TileShape<64, 64, 2, 2, 128, 4>;
using Rows64Narrow = TileShape<64, 32, 2, 2, 128, 6>;

template <typename Shape, bool kLora, typename T, bool kDepthMajor, typename Block>
ALIGNPRO_BODY void linear_tile(Block& block, const Linear<T, kDepthMajor>& args, int64_t row,
                               int64_t column, void* shared) {
  SumsOf<Shape> sums, lora;
  tile_product<Shape>(block, args.x, row, args.weight, column, shared, sums);
  if constexpr (kLora) {
    tile_product<Shape>(block, args.lora_x, row, args.lora_up, column, shared, lora);
  }
  for_share(Share<Shape>(block.thread()), [&](int m, int n, int i, int j, int e) {
    const int64_t r = row + m, c = column + n;
    if (r >= args.x.rows || c >= args.weight.rows) return;
    // Plus zero: a sum that is -0 stays it or not by how many zeros a slice ends with.
    float value = std::fma(args.scale, sums[i][j][e], 0.0f);
    if constexpr (kLora) value = std::fma(args.lora_scale, lora[i][j][e], value);
    if (args.bias != nullptr) value += to_float(args.bias[c]);
    if (args.residual.data != nullptr) {
      value += to_float(args.residual.data[r * args.residual.ld + c]);
    }
    args.out.data[r * args.out.ld + c] = stored<T>(value);
  });
}

// A chunk's share of a sum over rows: partial [chunks][out_rows][out_cols] receives a tile of
// A^T B over rows [kSumRows chunk, ...) of both, A [rows, out_rows] and B [rows, out_cols].
inline constexpr int64_t kSumRows = 1024;

template <typename T>
struct RowSums {
  Operand<T, true> a, b;  // depth: all rows
  float* partial;
};

template <typename T, typename Block>
ALIGNPRO_BODY void row_sums_tile(Block& block, const RowSums<T>& args, int64_t row, int64_t column,
                                 int64_t chunk, void* shared) {
  Operand<T, true> a = args.a, b = args.b;
  const int64_t first = chunk * kSumRows, left = a.depth - first;
  a.data += first * a.ld;
  b.data += first * b.ld;
  a.depth = b.depth = left < kSumRows ? left : kSumRows;
  store_product_tile(block, a, row, b, column, a.rows, b.rows,
                     args.partial + chunk * a.rows * b.rows, b.rows, false, shared);
}

// out [rows, cols] = scale times the chunks' partial sums, in ascending order; a thread an element.
ALIGNPRO_HOST_DEVICE inline void join_row_sums(int64_t i, const float* partial, int64_t chunks,
                                               int64_t rows, int64_t cols, float scale, float* out,
                                               int64_t ld) {
  if (i >= rows * cols) return;
  float sum = partial[i];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += partial[chunk * rows * cols + i];
  out[i / cols * ld + i % cols] = scale * sum;
}

}  // namespace alignpro::cuda
