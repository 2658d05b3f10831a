#pragma once

#include <cstdint>

#include "alignpro/core/parallel.h"

namespace alignpro::ops {

// y = weight * x / sqrt(mean(x^2) + eps) over each row of `n` floats (Zhang and Sennrich 2019).
// y may be x. Rows are ldx (ldy) apart.
void rms_norm(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* weight, float eps,
              float* y, int64_t ldy, ThreadPool& pool);

// y = residual + rms_norm(x), where y may be the residual or x.
void rms_norm_add(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* weight,
                  float eps, const float* residual, int64_t ldr, float* y, int64_t ldy,
                  ThreadPool& pool);

// dx += gradient at x, given dy. dx may not be dy.
void rms_norm_backward(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* weight,
                       float eps, const float* dy, int64_t ldy, float* dx, int64_t lddx,
                       ThreadPool& pool);

}  // namespace alignpro::ops
