#pragma once

#include <algorithm>
#include <cstring>

#include "alignpro/core/aligned.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/vocabulary.h"

namespace alignpro::ops {

// One worker's view of one tile of a vocabulary weight, in the two orders that the products read.
class WeightTile {
 public:
  void open(const VocabularyWeight& weight, int64_t tile) {
    packed_ = weight.packed;
    tile_ = tile;
    vocab_ = weight.rows();
    cols_ = weight.cols();
    live_ = std::min(kVocabTile, vocab_ - tile * kVocabTile);
    if (packed_ != nullptr) return;
    const QuantizedMatrix& stored = weight.stored;
    const int64_t row_size = row_bytes(stored.dtype, cols_);
    const std::byte* from = stored.data + tile * kVocabTile * row_size;
    if (stored.dtype == DType::kF32 && reinterpret_cast<uintptr_t>(from) % alignof(float) == 0) {
      values_ = reinterpret_cast<const float*>(from);
    } else {
      float* wide = wide_.reserve(kVocabTile * cols_);
      dequantize(stored.dtype, from, live_ * cols_, wide);
      values_ = wide;
    }
  }

  int64_t panels() const { return tile_panels(vocab_, tile_); }
  int64_t rows() const { return panels() * cpu::kPanel; }  // the last ones may be padding

  // Whether panels lie one behind the other in memory.
  bool streams() const { return packed_ != nullptr && packed_->is_float32(); }

  // Rows [16 p, 16 p + 16) of the tile as [cols][16]. Valid until the next call.
  const float* panel(int64_t p) {
    if (streams()) return packed_->block(tile_ * kTilePanels + p, 0, cols_, nullptr);
    float* out = panel_.reserve(cols_ * cpu::kPanel);
    if (packed_ != nullptr) return packed_->block(tile_ * kTilePanels + p, 0, cols_, out);
    cpu::kernels().pack_panel(values_ + p * cpu::kPanel * cols_, cols_,
                              std::min(cpu::kPanel, live_ - p * cpu::kPanel), cols_, out);
    return out;
  }

  // Whether logits are integer products.
  bool has_int8() const { return packed_ != nullptr && packed_->arithmetic() == Arithmetic::kInt8; }

  // Unscaled logits of a block of rows against panel p, [rows][16]; `panel` is panel(p), which
  // integer products do without.
  void logits(const LogitRows& rows, int64_t block, int64_t p, const float* panel,
              float* out) const {
    if (has_int8()) {
      rows.int8_gemm(block, *packed_, tile_ * kTilePanels + p, out);
    } else {
      panel_logits(rows, block, panel, streams(), out);
    }
  }

  // Columns [16 c, 16 c + 16) of the tile as [rows()][16], zero in the padding. Valid until the
  // next call.
  const float* columns(int64_t c) {
    float* out = columns_.reserve(kVocabTile * cpu::kPanel);
    if (packed_ != nullptr) {
      float* wide = streams() ? nullptr : wide_.reserve(kVocabTile * cpu::kPanel);
      packed_->transposed_block(tile_ * kVocabTile, rows(), c * cpu::kPanel, wide, out);
      return out;
    }
    const int64_t begin = c * cpu::kPanel, width = std::min(cpu::kPanel, cols_ - begin);
    for (int64_t v = 0; v < live_; ++v) {
      std::memcpy(out + v * cpu::kPanel, values_ + v * cols_ + begin,
                  static_cast<size_t>(width) * sizeof(float));
      std::fill(out + v * cpu::kPanel + width, out + (v + 1) * cpu::kPanel, 0.0f);
    }
    std::fill(out + live_ * cpu::kPanel, out + rows() * cpu::kPanel, 0.0f);
    return out;
  }

 private:
  const PackedMatrix* packed_ = nullptr;
  const float* values_ = nullptr;  // [live][cols] when the weight is not packed
  int64_t tile_ = 0, vocab_ = 0, cols_ = 0, live_ = 0;
  AlignedBuffer wide_, panel_, columns_;
};

}  // namespace alignpro::ops
