#include "alignpro/ops/mix_rows.h"

#include <vector>

namespace alignpro::ops {

void mix_rows(const RowSums& sums, int64_t cols, const float* x, int64_t ldx, float* out,
              int64_t ldo) {
  std::vector<double> total(static_cast<size_t>(cols));
  for (int64_t i = 0; i < sums.count(); ++i) {
    total.assign(total.size(), 0.0);
    const int32_t end = sums.begins[static_cast<size_t>(i) + 1];
    for (int32_t t = sums.begins[static_cast<size_t>(i)]; t < end; ++t) {
      const float* row = x + sums.rows[static_cast<size_t>(t)] * ldx;
      const double weight = sums.weights[static_cast<size_t>(t)];
      for (size_t c = 0; c < total.size(); ++c) total[c] += weight * row[c];
    }
    for (size_t c = 0; c < total.size(); ++c) {
      out[i * ldo + static_cast<int64_t>(c)] = static_cast<float>(total[c]);
    }
  }
}

}  // namespace alignpro::ops
