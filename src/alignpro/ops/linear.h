#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/lora_stack.h"
#include "alignpro/ops/matrix_view.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::ops {

// What happens to a finished product before it is stored.
struct Epilogue {
  float scale = 1.0f;               // multiplies the product
  const float* bias = nullptr;      // [columns], added
  const float* residual = nullptr;  // same layout as the output (may be the output), added last
};

// The low-rank updates of one fused weight W [outputs, inputs], as one pair of stacked matrices:
// W + scale B A, A [ranks, inputs], B [outputs, ranks]. Several modules at one weight (q, k and v)
// own consecutive ranks; B is zero where a module does not reach.
struct LowRank {
  PackedMatrix a;
  PackedMatrix b;
  float scale = 1.0f;
  // By panel of 16 outputs the ranks, and by panel of 16 ranks the outputs, where B may be nonzero.
  std::vector<std::pair<int64_t, int64_t>> ranks_of_outputs, outputs_of_ranks;
  std::vector<LoraStack::Module> modules;

  static LowRank pack(const LoraStack& matrices);
  int64_t ranks() const { return a.rows(); }
};

// An update in force for rows [row_begin, row_end); lora_down [row_end - row_begin, ranks] receives
// scale x A^T.
struct LowRankRows {
  int64_t row_begin, row_end;
  const LowRank* update;
  float* lora_down;
};

// y [rows, W.rows] (row stride ldy) = scale * (x W^T + lora_down B^T) + bias + residual,
// x [rows, W.cols]. `updates` ascend and do not overlap; rows in none have no second term.
void linear(int64_t rows, MatrixView x, const PackedMatrix& w, float* y, int64_t ldy,
            const Epilogue& epilogue, ThreadPool& pool, std::span<const LowRankRows> updates = {});

// dx [rows, W.cols] (row stride ldx) = scale * (dy W + d_lora_down A) + residual, dy [rows,
// W.rows], where d_lora_down [rows, ranks] = update scale * dy B is written as well. Without an
// update there is no second term; without dx, d_lora_down alone is computed.
void linear_backward(int64_t rows, MatrixView dy, const PackedMatrix& w, float* dx, int64_t ldx,
                     const Epilogue& epilogue, ThreadPool& pool, const LowRank* update = nullptr,
                     float* d_lora_down = nullptr);

// c [m, n] (row stride ldc) = scale * a b + residual, a [m, k], b [k, n] with rows ldb apart.
// The gradient of LoRA matrices is such a product over the rows of a batch.
void matmul(int64_t m, int64_t n, int64_t k, MatrixView a, const float* b, int64_t ldb, float* c,
            int64_t ldc, const Epilogue& epilogue, ThreadPool& pool);

}  // namespace alignpro::ops
