#include "alignpro/ops/swiglu.h"

#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/row_parallel.h"

namespace alignpro::ops {

void swiglu(int64_t rows, int64_t n, const float* gate_up, float* h, ThreadPool& pool) {
  const cpu::Kernels& k = cpu::kernels();
  row_parallel(rows, n, pool, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * n;
    k.swiglu_row(gate, gate + n, n, h + row * n);
  });
}

void swiglu_backward(int64_t rows, int64_t n, const float* gate_up, const float* dh,
                     float* dgate_up, ThreadPool& pool) {
  const cpu::Kernels& k = cpu::kernels();
  row_parallel(rows, n, pool, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * n;
    float* dgate = dgate_up + row * 2 * n;
    k.swiglu_backward_row(gate, gate + n, dh + row * n, n, dgate, dgate + n);
  });
}

}  // namespace alignpro::ops
