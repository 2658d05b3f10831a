#include "alignpro/ops/rope.h"

#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/row_parallel.h"

namespace alignpro::ops {

void rope(int64_t rows, float* x, int64_t ldx, int64_t heads, int64_t head_dim, int64_t rotary_dim,
          const float* cos, const float* sin, ThreadPool& pool) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t half = rotary_dim / 2;
  row_parallel(rows, heads * head_dim, pool, [&](int64_t row) {
    for (int64_t head = 0; head < heads; ++head) {
      k.rope_row(x + row * ldx + head * head_dim, cos + row * half, sin + row * half, half);
    }
  });
}

}  // namespace alignpro::ops
