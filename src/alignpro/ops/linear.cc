// Matrix products. One driver packs the left operand, walks (row block, column panels) items in
// parallel and asks a provider for 16-column sub-panels of the right operand.
//
// Every output is the sum, in ascending order, of per-block partial sums over kContract terms, each
// run from zero in ascending k. Neither the row count, the blocking over rows nor the team's size
// enters, so a row's bits are its own (contract 2). The two-level sum is also the more accurate
// one: 1536 terms err like 192 + 8.

#include "alignpro/ops/linear.h"

#include <algorithm>

#include "alignpro/ops/packed_rows.h"

namespace alignpro::ops {
namespace {

using cpu::kContract;
using cpu::kPanel;

struct Workspace {
  AlignedBuffer tile;
  AlignedBuffer panel;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// provider(column panel, k_begin, k_count, scratch) -> [k_count][16]
template <typename Provider>
void multiply(int64_t rows, int64_t columns, int64_t contract, MatrixView a, float* c, int64_t ldc,
              const Epilogue& epilogue, ThreadTeam& team, const Provider& provider) {
  if (rows == 0 || columns == 0) return;
  const cpu::Kernels& k = cpu::kernels();
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  thread_local PackedRows packed;
  for (int64_t first = 0; first < rows; first += kRowChunk) {
    const int64_t live = std::min(kRowChunk, rows - first);
    const MatrixView chunk{a.data + first * a.row_stride, a.row_stride, a.col_stride};
    packed.pack(live, contract, chunk, kRowBlock, &team);
    PackedRows& shared = packed;  // workers must see this thread's instance, not their own
    const int64_t row_blocks = shared.blocks();
    const int64_t wanted_items = 8 * team.size();
    const int64_t group =
        std::max<int64_t>(1, panels / std::max<int64_t>(1, wanted_items / row_blocks));
    const int64_t groups = (panels + group - 1) / group;
    team.run(row_blocks * groups, [&](int64_t item, int) {
      const int64_t block = item / groups;
      const int64_t row = block * kRowBlock;
      const int64_t block_rows = shared.block_rows(block);
      const int64_t panel_end = std::min(panels, (item % groups + 1) * group);
      Workspace& own = workspace();
      float* tile = own.tile.reserve(kRowBlock * kPanel);
      float* scratch = own.panel.reserve(kContract * kPanel);
      for (int64_t p = item % groups * group; p < panel_end; ++p) {
        for (int64_t k_begin = 0; k_begin < contract; k_begin += kContract) {
          const int64_t k_count = std::min(kContract, contract - k_begin);
          const float* b = provider(p, k_begin, k_count, scratch);
          k.gemm_panel(block_rows, k_count, shared.at(block, k_begin), b, kPanel, tile,
                       k_begin > 0);
        }
        const int64_t column = p * kPanel;
        const int64_t width = std::min(kPanel, columns - column);
        for (int64_t m = 0; m < block_rows; ++m) {
          const float* from = tile + m * kPanel;
          const int64_t at = (first + row + m) * ldc + column;
          float* to = c + at;
          for (int64_t n = 0; n < width; ++n) {
            float value = from[n] * epilogue.scale;
            if (epilogue.bias != nullptr) value += epilogue.bias[column + n];
            if (epilogue.residual != nullptr) value += epilogue.residual[at + n];
            to[n] = value;
          }
        }
      }
    });
  }
}

}  // namespace

void linear(int64_t rows, MatrixView x, const PackedMatrix& w, float* y, int64_t ldy,
            const Epilogue& epilogue, ThreadTeam& team) {
  multiply(
      rows, w.rows(), w.cols(), x, y, ldy, epilogue, team,
      [&w](int64_t p, int64_t k_begin, int64_t, float*) { return w.panel(p) + k_begin * kPanel; });
}

void linear_backward(int64_t rows, MatrixView dy, const PackedMatrix& w, float* dx, int64_t ldx,
                     const Epilogue& epilogue, ThreadTeam& team) {
  // The contraction runs over W's rows: kContract is a multiple of kPanel, so a block starts at a
  // panel. The transposed copy is rebuilt for every row block, about a tenth of the work.
  static_assert(kContract % kPanel == 0);
  multiply(rows, w.cols(), w.rows(), dy, dx, ldx, epilogue, team,
           [&w](int64_t p, int64_t n_begin, int64_t n_count, float* scratch) {
             cpu::kernels().transpose_panels(w.panel(n_begin / kPanel), w.cols(), n_count,
                                             p * kPanel, scratch);
             return static_cast<const float*>(scratch);
           });
}

void matmul(int64_t m, int64_t n, int64_t k, MatrixView a, const float* b, int64_t ldb, float* c,
            int64_t ldc, const Epilogue& epilogue, ThreadTeam& team) {
  multiply(m, n, k, a, c, ldc, epilogue, team,
           [b, ldb, n](int64_t p, int64_t k_begin, int64_t k_count, float* scratch) {
             const int64_t width = std::min(kPanel, n - p * kPanel);
             for (int64_t i = 0; i < k_count; ++i) {
               const float* from = b + (k_begin + i) * ldb + p * kPanel;
               for (int64_t j = 0; j < kPanel; ++j) {
                 scratch[i * kPanel + j] = j < width ? from[j] : 0.0f;
               }
             }
             return static_cast<const float*>(scratch);
           });
}

}  // namespace alignpro::ops
