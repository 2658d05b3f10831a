#include "alignpro/ops/swiglu.h"

#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/row_parallel.h"

namespace alignpro::ops {

namespace {

using Kernels = cpu::Kernels;

void glu(decltype(Kernels::swiglu_row) kernel, int64_t rows, int64_t n, const float* gate_up,
         float* h, ThreadPool& pool) {
  row_parallel(rows, n, pool, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * n;
    kernel(gate, gate + n, n, h + row * n);
  });
}

void glu_backward(decltype(Kernels::swiglu_backward_row) kernel, int64_t rows, int64_t n,
                  const float* gate_up, const float* dh, float* dgate_up, ThreadPool& pool) {
  row_parallel(rows, n, pool, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * n;
    float* dgate = dgate_up + row * 2 * n;
    kernel(gate, gate + n, dh + row * n, n, dgate, dgate + n);
  });
}

}  // namespace

void swiglu(int64_t rows, int64_t n, const float* gate_up, float* h, ThreadPool& pool) {
  glu(cpu::kernels().swiglu_row, rows, n, gate_up, h, pool);
}
void geglu(int64_t rows, int64_t n, const float* gate_up, float* h, ThreadPool& pool) {
  glu(cpu::kernels().geglu_row, rows, n, gate_up, h, pool);
}

void swiglu_backward(int64_t rows, int64_t n, const float* gate_up, const float* dh,
                     float* dgate_up, ThreadPool& pool) {
  glu_backward(cpu::kernels().swiglu_backward_row, rows, n, gate_up, dh, dgate_up, pool);
}
void geglu_backward(int64_t rows, int64_t n, const float* gate_up, const float* dh, float* dgate_up,
                    ThreadPool& pool) {
  glu_backward(cpu::kernels().geglu_backward_row, rows, n, gate_up, dh, dgate_up, pool);
}

}  // namespace alignpro::ops
