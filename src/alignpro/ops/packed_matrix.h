#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/quantized_matrix.h"

namespace alignpro::ops {

// How products with a matrix are computed: float32, or integer dot products of its codes with rows
// quantised in groups of 32.
enum class Arithmetic { kFloat32, kInt8 };

// An output-major matrix W [rows, cols] (y = W x), packed once for the matrix products: panels of
// 16 rows that stream through memory in the order the kernels read them. A panel keeps the storage
// format of its rows (float32 where they differ) and is expanded, exactly, where it is used. Rows
// past the end of the last panel are zero.
class PackedMatrix {
 public:
  PackedMatrix() = default;

  // kInt8 stores floats, and rows of a panel that differ, as Q8_0, and needs cols in multiples of
  // 32 (InvalidArgument).
  static PackedMatrix pack(std::span<const QuantizedRow> rows, int64_t cols, ThreadPool& pool,
                           Arithmetic arithmetic = Arithmetic::kFloat32);
  static PackedMatrix pack(int64_t rows, int64_t cols, const float* source);
  // What pack() would make of such rows, without values: the rows' types alone are looked at.
  static PackedMatrix plan(std::span<const QuantizedRow> rows, int64_t cols,
                           Arithmetic arithmetic = Arithmetic::kFloat32);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t panels() const { return static_cast<int64_t>(panels_.size()); }
  int64_t bytes() const { return bytes_; }
  bool is_float32() const { return is_float32_; }
  bool is_quantized() const { return is_quantized_; }  // every panel
  Arithmetic arithmetic() const { return arithmetic_; }

  // Columns [k_begin, k_begin + k_count) of panel p as [k_count][16]; both multiples of 16, or the
  // end. Points into the matrix where that is float32, otherwise to `scratch` of that size.
  const float* block(int64_t p, int64_t k_begin, int64_t k_count, float* scratch) const {
    const Panel& panel = panels_[static_cast<size_t>(p)];
    if (panel.dtype == DType::kF32) {
      return reinterpret_cast<const float*>(at(panel)) + k_begin * cpu::kPanel;
    }
    cpu::kernels().expand_panel(panel.dtype, at(panel), cols_, k_begin, k_count, scratch);
    return scratch;
  }

  // Rows [n_begin, n_begin + n_count) and columns [k_begin, k_begin + 16) transposed: out
  // [n_count][16], zero past the columns' end. n_begin is a multiple of 16; scratch holds
  // n_count rounded up to whole panels times 16 floats.
  void transposed_block(int64_t n_begin, int64_t n_count, int64_t k_begin, float* scratch,
                        float* out) const;

  // Whether multiply_rows() is the faster one for so many rows. Plain floats are bound by memory up
  // to four rows in either way.
  bool streams(int64_t rows) const {
    return is_quantized_ ? cpu::kernels().prefers_stream(rows) : rows <= cpu::kGemvRows;
  }

  // x W^T for up to cpu::kQuantizedGemvRows rows of x [cols], x_stride apart, by `count` panels
  // from p_begin on: out [count][rows][16]. The bits are those of the products by block.
  void multiply_rows(int64_t p_begin, int64_t count, int64_t rows, const float* x, int64_t x_stride,
                     float* out) const;

  // Panel p times quantised rows: out [live][16]. Tiles of x lie x_stride bytes apart.
  void int8_gemm(int64_t p, int64_t live, const uint8_t* x, int64_t x_stride, float* out) const;

  // Copies row `row` to out [cols].
  void read_row(int64_t row, float* out) const;

 private:
  struct Panel {
    DType dtype;
    int64_t offset;  // bytes
  };

  PackedMatrix(int64_t cols, std::span<const DType> panel_types, int64_t rows);

  const std::byte* at(const Panel& panel) const {
    return reinterpret_cast<const std::byte*>(data_.data()) + panel.offset;
  }
  std::byte* at(const Panel& panel) {
    return reinterpret_cast<std::byte*>(data_.data()) + panel.offset;
  }

  int64_t rows_ = 0;
  int64_t cols_ = 0;
  bool is_float32_ = true, is_quantized_ = true;
  Arithmetic arithmetic_ = Arithmetic::kFloat32;
  std::vector<Panel> panels_;
  int64_t bytes_ = 0;
  AlignedBuffer data_;
};

}  // namespace alignpro::ops
