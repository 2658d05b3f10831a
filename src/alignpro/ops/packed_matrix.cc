#include "alignpro/ops/packed_matrix.h"

#include <algorithm>
#include <vector>

namespace alignpro::ops {

using cpu::kPanel;

PackedMatrix::PackedMatrix(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {
  data_.reserve(panels() * cols_ * kPanel);
}

void PackedMatrix::pack_panel(int64_t p, const float* source) {
  cpu::kernels().pack_panel(source, cols_, std::min(kPanel, rows_ - p * kPanel), cols_,
                            data_.data() + p * cols_ * kPanel);
}

PackedMatrix PackedMatrix::pack(
    int64_t rows, int64_t cols,
    const std::function<void(int64_t begin, int64_t end, float* out)>& read, ThreadTeam& team) {
  PackedMatrix packed(rows, cols);
  std::vector<AlignedBuffer> scratch(static_cast<size_t>(team.size()));
  team.run(packed.panels(), [&](int64_t p, int worker) {
    float* source = scratch[static_cast<size_t>(worker)].reserve(kPanel * cols);
    read(p * kPanel, std::min(rows, (p + 1) * kPanel), source);
    packed.pack_panel(p, source);
  });
  return packed;
}

PackedMatrix PackedMatrix::pack(int64_t rows, int64_t cols, const float* source) {
  PackedMatrix packed(rows, cols);
  for (int64_t p = 0; p < packed.panels(); ++p) {
    packed.pack_panel(p, source + p * kPanel * cols);
  }
  return packed;
}

void PackedMatrix::read_row(int64_t row, float* out) const {
  const float* from = panel(row / kPanel) + row % kPanel;
  for (int64_t k = 0; k < cols_; ++k) out[k] = from[k * kPanel];
}

}  // namespace alignpro::ops
