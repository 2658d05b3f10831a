#pragma once

// What linear_logprob and head_sample share: logits of a block of rows against one vocabulary tile,
// and the merge of per-tile statistics. One definition, so that a log-probability recorded while
// sampling is the one the scorer computes, to the bit (contracts 1 and 2).

#include <algorithm>
#include <cstdint>

#include "alignpro/ops/int8_rows.h"
#include "alignpro/ops/packed_matrix.h"
#include "alignpro/ops/packed_rows.h"
#include "alignpro/ops/shared/row_softmax.h"

namespace alignpro::ops {

// Columns of a vocabulary tile. 96 rows x 256 logits are 98 KB: they stay in L2.
inline constexpr int64_t kVocabTile = 256;
inline constexpr int64_t kTilePanels = kVocabTile / cpu::kPanel;

inline int64_t vocab_tiles(int64_t vocab) { return (vocab + kVocabTile - 1) / kVocabTile; }
inline int64_t tile_panels(int64_t vocab, int64_t tile) {
  const int64_t panels = (vocab + cpu::kPanel - 1) / cpu::kPanel;
  return std::min(kTilePanels, panels - tile * kTilePanels);
}

// Logits of one row block against one panel [cols][16] of the weight: out [rows][16], unscaled.
inline void panel_logits(const PackedRows& rows, int64_t block, const float* panel, bool stream,
                         float* out) {
  for (int64_t k_begin = 0; k_begin < rows.contract(); k_begin += cpu::kContract) {
    cpu::kernels().gemm_panel(rows.block_rows(block), rows.k_count(k_begin),
                              rows.at(block, k_begin), rows.tile_stride(k_begin),
                              panel + k_begin * cpu::kPanel, cpu::kPanel, out, k_begin > 0, stream);
  }
}

// Rows of hidden states ready for logits by either arithmetic.
class LogitRows : public PackedRows {
 public:
  void pack(int64_t rows, int64_t cols, MatrixView source, int64_t block_size, ThreadPool* pool,
            Arithmetic arithmetic) {
    static_assert(kRowBlock % cpu::kInt8TileRows == 0, "a block begins at a tile of codes");
    if (arithmetic == Arithmetic::kFloat32) {
      PackedRows::pack(rows, cols, source, block_size, pool);
    } else {
      layout(rows, cols, block_size, {});
      codes_.pack(rows, cols, source, pool);
    }
  }
  // Integer products of a block with panel p: out [rows][16].
  void int8_gemm(int64_t block, const PackedMatrix& weight, int64_t p, float* out) const {
    weight.int8_gemm(p, block_rows(block), codes_.at(block_row(block)), codes_.stride(), out);
  }

 private:
  Int8Rows codes_;
};

// The same against one tile: out [panels][rows][16]. `values` [rows, cols] is the block unpacked.
inline void tile_logits(const LogitRows& rows, int64_t block, const PackedMatrix& weight,
                        int64_t tile, const float* values, float* out) {
  const int64_t first = tile * kTilePanels, panels = tile_panels(weight.rows(), tile);
  const int64_t panel_floats = rows.block_rows(block) * cpu::kPanel;
  if (weight.arithmetic() == Arithmetic::kInt8) {
    for (int64_t p = 0; p < panels; ++p) {
      rows.int8_gemm(block, weight, first + p, out + p * panel_floats);
    }
    return;
  }
  if (weight.streams(rows.block_rows(block))) {
    weight.multiply_rows(first, panels, rows.block_rows(block), values, weight.cols(), out);
    return;
  }
  float scratch[cpu::kContract * cpu::kPanel];
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t k_begin = 0; k_begin < rows.contract(); k_begin += cpu::kContract) {
      const float* b = weight.block(first + p, k_begin, rows.k_count(k_begin), scratch);
      cpu::kernels().gemm_panel(rows.block_rows(block), rows.k_count(k_begin),
                                rows.at(block, k_begin), rows.tile_stride(k_begin), b, cpu::kPanel,
                                out + p * panel_floats, k_begin > 0, b != scratch);
    }
  }
}

// Temperature and the vocabulary's end, applied to one row of a tile.
inline void finish_tile_row(int64_t vocab, int64_t tile, float* logits, int64_t rows, int64_t row,
                            float inv_temperature) {
  cpu::kernels().scale_tile_row(logits, rows, row, tile_panels(vocab, tile),
                                vocab - tile * kVocabTile, inv_temperature);
}

template <typename Float>  // float or const float
Float& tile_value(Float* logits, int64_t rows, int64_t row, int64_t column) {
  return logits[(column / cpu::kPanel * rows + row) * cpu::kPanel + column % cpu::kPanel];
}

}  // namespace alignpro::ops
