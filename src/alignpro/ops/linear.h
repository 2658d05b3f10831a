#pragma once

#include <cstdint>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/matrix_view.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::ops {

// What happens to a finished product before it is stored.
struct Epilogue {
  float scale = 1.0f;               // multiplies the product
  const float* bias = nullptr;      // [columns], added
  const float* residual = nullptr;  // same layout as the output (may be the output), added last
};

// y [rows, W.rows] (row stride ldy) = scale * x W^T + bias + residual, x [rows, W.cols].
void linear(int64_t rows, MatrixView x, const PackedMatrix& w, float* y, int64_t ldy,
            const Epilogue& epilogue, ThreadTeam& team);

// dx [rows, W.cols] (row stride ldx) = scale * dy W + residual, dy [rows, W.rows].
void linear_backward(int64_t rows, MatrixView dy, const PackedMatrix& w, float* dx, int64_t ldx,
                     const Epilogue& epilogue, ThreadTeam& team);

// c [m, n] (row stride ldc) = scale * a b + residual, a [m, k], b [k, n] with rows ldb apart.
// The gradient of LoRA matrices is such a product over the rows of a batch.
void matmul(int64_t m, int64_t n, int64_t k, MatrixView a, const float* b, int64_t ldb, float* c,
            int64_t ldc, const Epilogue& epilogue, ThreadTeam& team);

}  // namespace alignpro::ops
