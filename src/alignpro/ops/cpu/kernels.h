#pragma once

#include <cstdint>

#include "alignpro/core/cpu_isa.h"
#include "alignpro/core/dtype.h"
#include "alignpro/ops/shared/tile_stats.h"

namespace alignpro::ops::cpu {

// Tile of the matrix products. kRowTile x kPanel float accumulators fill the AVX2 register file
// (6 x 2 vectors, two of B, one broadcast of A).
inline constexpr int64_t kRowTile = 6;
inline constexpr int64_t kPanel = 16;
// Contraction block: a B sub-panel (kContract x kPanel) stays in L1.
inline constexpr int64_t kContract = 192;

// Rows and panels at a time of gemv.
inline constexpr int64_t kGemvRows = 4;
inline constexpr int64_t kGemvPanels = 4;
// At most so many rows read stored panels without expanding them.
inline constexpr int64_t kQuantizedGemvRows = 16;

// Multiply-adds in one step of fma_chains, whole rounds of its independent vectors.
inline constexpr int64_t kFmaPerStep = 192;

// The leaves: pointers and sizes, one table an instruction set. Every function computes each output
// in one fixed order, whatever the number of rows beside it.
struct Kernels {
  const char* name;

  // c[m][n] = (accumulate ? c[m][n] : 0) + sum_k a(m, k) b[k][n], the sum started from zero and run
  // in ascending k. a: packed row tiles [k_count][6], a_stride floats apart; b: [k_count]
  // rows of 16, ldb apart; c: [rows][16]. Where `stream` is set what follows b is fetched.
  void (*gemm_panel)(int64_t rows, int64_t k_count, const float* a, int64_t a_stride,
                     const float* b, int64_t ldb, float* c, bool accumulate, bool stream);

  // The same for up to kGemvRows rows of one packed tile and several b, panel by panel, which gives
  // few rows enough chains: c[m * c_row + p * c_panel + n].
  void (*gemv)(int64_t rows, int64_t k_count, const float* a, const float* const* b, int64_t panels,
               int64_t ldb, float* c, int64_t c_row, int64_t c_panel, bool accumulate);

  // Panels in storage formats (panel_layout.h). expand_panel writes columns [k_begin, k_begin +
  // k_count) as floats [k_count][16]; of a quantised format both are multiples of 16. stream_panels
  // multiplies up to kQuantizedGemvRows rows of x [cols], x_stride apart, by `panels` of them,
  // `stride` bytes apart, without expanding them: out [panels][rows][16], the bits that gemm_panel
  // gives over blocks of kContract.
  void (*expand_panel)(DType dtype, const void* panel, int64_t cols, int64_t k_begin,
                       int64_t k_count, float* out);
  void (*stream_panels)(DType dtype, const void* panel, int64_t stride, int64_t panels,
                        int64_t cols, int64_t rows, const float* x, int64_t x_stride, float* out);
  // Whether stream_panels is the faster one for so many rows of quantised panels.
  bool (*prefers_stream)(int64_t rows);

  // Integer products (panel_layout.h). quantize_rows writes one tile of up to kInt8TileRows rows;
  // int8_gemm multiplies rows by a panel, adding up groups in ascending order: c [rows][16],
  // tiles of x lying x_stride bytes apart.
  void (*quantize_rows)(int64_t rows, int64_t cols, const float* x, int64_t row_stride,
                        uint8_t* out);
  void (*int8_gemm)(DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
                    const void* panel, float* c);

  // Packs rows [rows][k_count] of a matrix with element (m, k) at m * row_stride + k * col_stride
  // into [ceil(rows / 6)][k_count][6]; missing rows of the last tile are zero.
  void (*pack_rows)(int64_t rows, int64_t k_count, const float* source, int64_t row_stride,
                    int64_t col_stride, float* packed);

  // out[n][j] = panels[n / 16][k_begin + j][n % 16] for n < n_count, j < 16 (zero past k_total):
  // a [n_count][16] sub-panel of the transposed weight, from panels [.][k_total][16].
  void (*transpose_panels)(const float* panels, int64_t k_total, int64_t n_count, int64_t k_begin,
                           float* out);

  // out[k][n] = source[n * row_stride + k] for n < rows <= 16, else 0: a panel [k_count][16].
  void (*pack_panel)(const float* source, int64_t row_stride, int64_t rows, int64_t k_count,
                     float* out);

  // The end of a product: out[m][n] = tile[m][n] * scale + bias[n] + residual[m][n] for n < columns
  // <= 16; tile: [rows][16]; out and residual: rows ldc apart. bias and residual may be null.
  void (*store_tile)(const float* tile, int64_t rows, int64_t columns, float scale,
                     const float* bias, const float* residual, float* out, int64_t ldc);

  // y = x * w / sqrt(mean(x^2) + eps); returns the factor 1 / sqrt(...).
  float (*rms_norm_row)(const float* x, const float* w, int64_t n, float eps, float* y);
  // dx += gradient of rms_norm_row at x, given dy and the factor it returned.
  void (*rms_norm_backward_row)(const float* x, const float* w, const float* dy, float factor,
                                int64_t n, float* dx);

  // h = silu(gate) * up
  void (*swiglu_row)(const float* gate, const float* up, int64_t n, float* h);
  // dgate, dup from dh; may not alias the inputs.
  void (*swiglu_backward_row)(const float* gate, const float* up, const float* dh, int64_t n,
                              float* dgate, float* dup);
  // The same of gelu(gate) * up, by the tanh that approximates it.
  void (*geglu_row)(const float* gate, const float* up, int64_t n, float* h);
  void (*geglu_backward_row)(const float* gate, const float* up, const float* dh, int64_t n,
                             float* dgate, float* dup);

  // Rotates lanes (i, i + half) of x by the angles (cos, sin)[i], i < half.
  void (*rope_row)(float* x, const float* cos, const float* sin, int64_t half);

  // In place over scores [count padded to 16]: entries outside [first, count) become 0, the others
  // exp(scale * s - m) with m their maximum. Returns m and the sum, lanes summed in fixed order;
  // where every score is -inf, m is -inf and all else 0.
  void (*softmax_row)(float* scores, int64_t first, int64_t count, float scale, float* max,
                      float* sum);

  // To half floats, nearest and ties to even; false where a finite value became infinite. And back,
  // exactly.
  bool (*to_halves)(const float* x, int64_t n, uint16_t* out);
  void (*from_halves)(const uint16_t* x, int64_t n, float* out);

  float (*dot)(const float* a, const float* b, int64_t n);
  // y += alpha * x
  void (*axpy)(float alpha, const float* x, int64_t n, float* y);

  // Multiplies the row of logits in tile [panels][rows][16] by inv_temperature; columns at or past
  // `columns` become -inf.
  void (*scale_tile_row)(float* tile, int64_t rows, int64_t row, int64_t panels, int64_t columns,
                         float inv_temperature);
  // Statistics of one row of scaled logits; ref_tile may be null.
  void (*tile_stats_row)(const float* tile, const float* ref_tile, int64_t rows, int64_t row,
                         int64_t panels, TileStats* stats);
  // For sums of rows of W weighted by p: overwrites one row of scaled logits by e = exp(z - max),
  // and the reference's, unless null, by e ((z - center) - (z_ref - ref_center)).
  void (*tile_weights_row)(float* tile, float* ref_tile, int64_t rows, int64_t row, int64_t panels,
                           float max, float center, float ref_center);
  // Sums over one row of a tile of max(0, p - q), and of p where p > q.
  void (*tile_variation_row)(const float* tile, const float* ref_tile, int64_t rows, int64_t row,
                             int64_t panels, const RowGradient* row_statistics, float* variation,
                             float* mass_above);
  // Overwrites one row of scaled logits by dz (see RowGradient), times inv_temperature.
  void (*tile_gradient_row)(float* tile, const float* ref_tile, int64_t rows, int64_t row,
                            int64_t panels, int64_t first_column, const RowGradient* gradient,
                            float inv_temperature);
  // e[j] = exp(tile row j - max) for j < panels * 16.
  void (*tile_exp_row)(const float* tile, int64_t rows, int64_t row, int64_t panels, float max,
                       float* e);

  // For the machine's limits: `steps` times kFmaPerStep multiply-adds in registers, and
  // reading n floats (a multiple of 32).
  void (*fma_chains)(int64_t steps);
  void (*read_memory)(const float* p, int64_t n);
};

namespace generic {
extern const Kernels kKernels;
}
namespace neon {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
extern const Kernels kAmxKernels;  // with the integer products of many rows in AMX's tiles
}  // namespace avx512

// One of compiled_isas().
const Kernels& kernels_of(CpuIsa isa);

// The table for this machine (core/cpu_isa.h decides, once).
const Kernels& kernels();

}  // namespace alignpro::ops::cpu
