#pragma once

#include <cstdint>
#include <span>

namespace alignpro::ops {

// Sums of rows by weight: sum i is that of weights[t] x row rows[t], t in [begins[i],
// begins[i + 1]).
struct RowSums {
  std::span<const int32_t> begins, rows;
  std::span<const float> weights;

  int64_t count() const { return begins.empty() ? 0 : static_cast<int64_t>(begins.size()) - 1; }
};

// out [sums, cols] from x's rows of `ld` floats. Products are exact in double, summed there in the
// order of the terms and rounded once: one row of weight 1 keeps its bits.
void mix_rows(const RowSums& sums, int64_t cols, const float* x, int64_t ldx, float* out,
              int64_t ldo);

}  // namespace alignpro::ops
