#include "alignpro/ops/linear_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/ops/vocabulary.h"

namespace alignpro::ops {
namespace {

using cpu::kPanel;
using cpu::kRowTile;

struct Workspace {
  AlignedBuffer tile;
  AlignedBuffer ref_tile;
  AlignedBuffer packed;
  AlignedBuffer panel;
  AlignedBuffer result;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

MatrixView rows_from(const float* hidden, int64_t first, int64_t cols) {
  return {hidden + first * cols, cols, 1};
}

}  // namespace

void linear_logprob(const LogprobInput& in, const LogprobOutput& out, ThreadTeam& team) {
  const PackedMatrix& weight = *in.weight;
  const int64_t tiles = vocab_tiles(weight), cols = weight.cols();
  const float inv_temperature = 1.0f / in.temperature;
  const bool with_ref = in.ref_hidden != nullptr;
  PackedRows packed, ref_packed;
  std::vector<cpu::TileStats> stats;
  std::vector<float> token_logit(static_cast<size_t>(in.rows));
  std::vector<float> ref_token_logit(static_cast<size_t>(with_ref ? in.rows : 0));
  for (int64_t first = 0; first < in.rows; first += kRowChunk) {
    const int64_t live = std::min(kRowChunk, in.rows - first);
    packed.pack(live, cols, rows_from(in.hidden, first, cols), kRowBlock, team);
    if (with_ref) {
      ref_packed.pack(live, cols, rows_from(in.ref_hidden, first, cols), kRowBlock, team);
    }
    stats.resize(static_cast<size_t>(live * tiles));
    team.run(packed.blocks() * tiles, [&](int64_t item, int) {
      const int64_t tile = item / packed.blocks(), block = item % packed.blocks();
      const int64_t rows = packed.block_rows(block);
      Workspace& own = workspace();
      float* logits = own.tile.reserve(kRowBlock * kVocabTile);
      float* ref_logits = with_ref ? own.ref_tile.reserve(kRowBlock * kVocabTile) : nullptr;
      tile_logits(packed, block, weight, tile, logits);
      if (with_ref) tile_logits(ref_packed, block, weight, tile, ref_logits);
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t row = block * kRowBlock + m;
        finish_tile_row(weight, tile, logits, rows, m, inv_temperature);
        if (with_ref) finish_tile_row(weight, tile, ref_logits, rows, m, inv_temperature);
        cpu::kernels().tile_stats_row(logits, ref_logits, rows, m, tile_panels(weight, tile),
                                      &stats[static_cast<size_t>(row * tiles + tile)]);
        const int64_t column = in.tokens[static_cast<size_t>(first + row)] - tile * kVocabTile;
        if (column >= 0 && column < kVocabTile) {
          const auto at = static_cast<size_t>(first + row);
          token_logit[at] = tile_value(logits, rows, m, column);
          if (with_ref) ref_token_logit[at] = tile_value(ref_logits, rows, m, column);
        }
      }
    });
    for (int64_t row = 0; row < live; ++row) {
      const RowStats merged = merge_tiles({stats.data() + row * tiles, static_cast<size_t>(tiles)});
      const int64_t at = first + row;
      if (!merged.valid() || (with_ref && !std::isfinite(merged.ref_lse))) {
        throw NumericError(
            cat("linear_logprob: row ", at,
                " has no finite softmax (NaN or infinite logits); check the weights, "
                "the adapter and the learning rate"));
      }
      out.logprob[at] = static_cast<float>(token_logit[static_cast<size_t>(at)] - merged.lse);
      out.entropy[at] = static_cast<float>(std::max(0.0, merged.lse - merged.mean_z));
      out.lse[at] = static_cast<float>(merged.lse);
      if (with_ref) {
        out.kl[at] =
            static_cast<float>(std::max(0.0, merged.mean_cross - merged.lse + merged.ref_lse));
        out.ref_logprob[at] =
            static_cast<float>(ref_token_logit[static_cast<size_t>(at)] - merged.ref_lse);
        out.ref_lse[at] = static_cast<float>(merged.ref_lse);
      }
    }
  }
}

void linear_logprob_backward(const LogprobInput& in, const LogprobOutput& forward,
                             const float* d_logprob, const float* d_entropy, const float* d_kl,
                             float* d_hidden, ThreadTeam& team) {
  if (in.rows == 0) return;
  const PackedMatrix& weight = *in.weight;
  const int64_t tiles = vocab_tiles(weight), cols = weight.cols();
  const int64_t column_panels = (cols + kPanel - 1) / kPanel;
  const float inv_temperature = 1.0f / in.temperature;
  const bool with_ref = in.ref_hidden != nullptr && d_kl != nullptr;
  // Two row blocks a worker where there are rows enough; the blocking changes no bit.
  const int64_t share = (in.rows + 2 * team.size() - 1) / (2 * team.size());
  const int64_t block_size =
      std::clamp((share + kRowTile - 1) / kRowTile * kRowTile, kRowTile, kRowBlock);
  PackedRows packed, ref_packed;
  for (int64_t first = 0; first < in.rows; first += kRowChunk) {
    const int64_t live = std::min(kRowChunk, in.rows - first);
    packed.pack(live, cols, rows_from(in.hidden, first, cols), block_size, team);
    if (with_ref) {
      ref_packed.pack(live, cols, rows_from(in.ref_hidden, first, cols), block_size, team);
    }
    team.run(packed.blocks(), [&](int64_t block, int) {
      const cpu::Kernels& k = cpu::kernels();
      const int64_t rows = packed.block_rows(block);
      Workspace& own = workspace();
      float* dz = own.tile.reserve(kRowBlock * kVocabTile);
      float* ref_logits = with_ref ? own.ref_tile.reserve(kRowBlock * kVocabTile) : nullptr;
      float* dz_packed = own.packed.reserve(kRowBlock * kVocabTile);
      float* weight_rows = own.panel.reserve(kVocabTile * kPanel);
      float* result = own.result.reserve(column_panels * kRowBlock * kPanel);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t panels = tile_panels(weight, tile);
        const int64_t count = panels * kPanel;
        tile_logits(packed, block, weight, tile, dz);
        if (with_ref) tile_logits(ref_packed, block, weight, tile, ref_logits);
        for (int64_t m = 0; m < rows; ++m) {
          const int64_t row = first + block * block_size + m;
          finish_tile_row(weight, tile, dz, rows, m, inv_temperature);
          if (with_ref) finish_tile_row(weight, tile, ref_logits, rows, m, inv_temperature);
          const cpu::RowGradient gradient{
              .lse = forward.lse[row],
              .ref_lse = with_ref ? forward.ref_lse[row] : 0.0f,
              .entropy = forward.entropy[row],
              .kl = with_ref ? forward.kl[row] : 0.0f,
              .d_logprob = d_logprob[row],
              .d_entropy = d_entropy != nullptr ? d_entropy[row] : 0.0f,
              .d_kl = with_ref ? d_kl[row] : 0.0f,
              .token = in.tokens[static_cast<size_t>(row)],
          };
          k.tile_gradient_row(dz, ref_logits, rows, m, panels, tile * kVocabTile, &gradient,
                              inv_temperature);
        }
        // dz [panels][rows][16] is the left operand of dz W; panel by panel it packs to k = 16
        // each.
        for (int64_t m = 0; m < rows; m += kRowTile) {
          float* to = dz_packed + m * count;
          for (int64_t p = 0; p < panels; ++p) {
            k.pack_rows(std::min(kRowTile, rows - m), kPanel, dz + (p * rows + m) * kPanel, kPanel,
                        1, to + p * kPanel * kRowTile);
          }
        }
        // Rows past the vocabulary's end are zero in the packed weight and in dz.
        for (int64_t c = 0; c < column_panels; ++c) {
          k.transpose_panels(weight.panel(tile * kTilePanels), cols, count, c * kPanel,
                             weight_rows);
          k.gemm_panel(rows, count, dz_packed, weight_rows, kPanel, result + c * rows * kPanel,
                       tile > 0);
        }
      }
      for (int64_t m = 0; m < rows; ++m) {
        float* to = d_hidden + (first + block * block_size + m) * cols;
        for (int64_t c = 0; c < column_panels; ++c) {
          const int64_t width = std::min(kPanel, cols - c * kPanel);
          std::memcpy(to + c * kPanel, result + (c * rows + m) * kPanel,
                      static_cast<size_t>(width) * sizeof(float));
        }
      }
    });
  }
}

}  // namespace alignpro::ops
