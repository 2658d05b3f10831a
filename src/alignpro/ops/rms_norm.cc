#include "alignpro/ops/rms_norm.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/row_parallel.h"

namespace alignpro::ops {

void rms_norm(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* weight, float eps,
              float* y, int64_t ldy, ThreadPool& pool) {
  const cpu::Kernels& k = cpu::kernels();
  row_parallel(rows, n, pool, [&](int64_t row) {
    (void)k.rms_norm_row(x + row * ldx, weight, n, eps, y + row * ldy);
  });
}

void rms_norm_add(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* weight,
                  float eps, const float* residual, int64_t ldr, float* y, int64_t ldy,
                  ThreadPool& pool) {
  const cpu::Kernels& k = cpu::kernels();
  row_parallel(rows, n, pool, [&](int64_t row) {
    thread_local std::vector<float> normed;
    normed.resize(static_cast<size_t>(n));
    (void)k.rms_norm_row(x + row * ldx, weight, n, eps, normed.data());
    const float* from = residual + row * ldr;
    std::transform(from, from + n, normed.begin(), y + row * ldy, std::plus<>());
  });
}

void rms_norm_backward(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* weight,
                       float eps, const float* dy, int64_t ldy, float* dx, int64_t lddx,
                       ThreadPool& pool) {
  const cpu::Kernels& k = cpu::kernels();
  row_parallel(rows, n, pool, [&](int64_t row) {
    thread_local std::vector<float> y;  // not wanted, but the factor that comes with it
    y.resize(static_cast<size_t>(n));
    const float factor = k.rms_norm_row(x + row * ldx, weight, n, eps, y.data());
    k.rms_norm_backward_row(x + row * ldx, weight, dy + row * ldy, factor, n, dx + row * lddx);
  });
}

}  // namespace alignpro::ops
