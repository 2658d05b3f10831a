#include "alignpro/ops/packed_matrix.h"

#include <algorithm>

#include "alignpro/core/error.h"
#include "alignpro/ops/cpu/panel_layout.h"
#include "alignpro/ops/quantized_panel.h"

namespace alignpro::ops {
namespace {

// The rows as Q8_0, in `bytes`; `wide` holds one of them.
std::vector<QuantizedRow> to_q8_0(std::span<const QuantizedRow> rows, int64_t cols, float* wide,
                                  std::vector<std::byte>& bytes) {
  const int64_t size = row_bytes(DType::kQ8_0, cols);
  bytes.resize(rows.size() * static_cast<size_t>(size));
  std::vector<QuantizedRow> converted;
  std::byte* to = bytes.data();
  for (const QuantizedRow& row : rows) {
    dequantize(row.dtype, row.data, cols, wide);
    quantize_q8_0(wide, cols, to);
    converted.push_back({to, DType::kQ8_0});
    to += size;
  }
  return converted;
}

using cpu::kPanel;

std::span<const QuantizedRow> rows_of_panel(std::span<const QuantizedRow> rows, int64_t p) {
  const auto count = static_cast<int64_t>(rows.size());
  return rows.subspan(static_cast<size_t>(p * kPanel),
                      static_cast<size_t>(std::min(kPanel, count - p * kPanel)));
}

}  // namespace

PackedMatrix::PackedMatrix(int64_t cols, std::span<const DType> panel_types, int64_t rows)
    : rows_(rows), cols_(cols) {
  for (const DType dtype : panel_types) {
    panels_.push_back({dtype, bytes_});
    // Whole cache lines: a panel's first load is aligned.
    bytes_ += (cpu::panel_bytes(dtype, cols) + 63) / 64 * 64;
    is_float32_ = is_float32_ && dtype == DType::kF32;
    is_quantized_ = is_quantized_ && block_values(dtype) > 1;
  }
}

PackedMatrix PackedMatrix::plan(std::span<const QuantizedRow> rows, int64_t cols,
                                Arithmetic arithmetic) {
  const bool integers = arithmetic == Arithmetic::kInt8;
  require(!integers || cols % cpu::kGroup == 0, "compute int8: expected rows in multiples of ",
          cpu::kGroup, " columns, got ", cols, "; use float32 for this model");
  std::vector<DType> types;
  for (int64_t p = 0; p * kPanel < static_cast<int64_t>(rows.size()); ++p) {
    const auto of_panel = rows_of_panel(rows, p);
    const DType first = cpu::panel_type(of_panel.front().dtype);
    const bool alike = std::all_of(
        of_panel.begin(), of_panel.end(),
        [first](const QuantizedRow& row) { return cpu::panel_type(row.dtype) == first; });
    if (integers) {
      types.push_back(alike && cpu::is_quantized(first) ? first : DType::kQ8_0);
    } else {
      types.push_back(alike ? first : DType::kF32);
    }
  }
  PackedMatrix planned(cols, types, static_cast<int64_t>(rows.size()));
  planned.arithmetic_ = arithmetic;
  return planned;
}

PackedMatrix PackedMatrix::pack(std::span<const QuantizedRow> rows, int64_t cols, ThreadPool& pool,
                                Arithmetic arithmetic) {
  const bool integers = arithmetic == Arithmetic::kInt8;
  PackedMatrix packed = plan(rows, cols, arithmetic);
  packed.data_.reserve(packed.bytes_ / static_cast<int64_t>(sizeof(float)));
  struct Scratch {
    AlignedBuffer wide;
    std::vector<std::byte> bytes;
  };
  std::vector<Scratch> scratch(static_cast<size_t>(pool.size()));
  pool.run(packed.panels(), [&](int64_t p, int worker) {
    const Panel& panel = packed.panels_[static_cast<size_t>(p)];
    const auto of_panel = rows_of_panel(rows, p);
    Scratch& own = scratch[static_cast<size_t>(worker)];
    if (integers && std::any_of(of_panel.begin(), of_panel.end(), [&](const QuantizedRow& row) {
          return cpu::panel_type(row.dtype) != panel.dtype;
        })) {
      const auto converted = to_q8_0(of_panel, cols, own.wide.reserve(cols), own.bytes);
      pack_quantized_panel(panel.dtype, converted, cols, packed.at(panel));
      return;
    }
    if (panel.dtype != DType::kF32) {
      pack_quantized_panel(panel.dtype, of_panel, cols, packed.at(panel));
      return;
    }
    float* wide = own.wide.reserve(kPanel * cols);
    int64_t live = 0;
    for (const QuantizedRow& row : of_panel) {
      dequantize(row.dtype, row.data, cols, wide + live++ * cols);
    }
    cpu::kernels().pack_panel(wide, cols, live, cols, reinterpret_cast<float*>(packed.at(panel)));
  });
  return packed;
}

PackedMatrix PackedMatrix::pack(int64_t rows, int64_t cols, const float* source) {
  const std::vector<DType> types(static_cast<size_t>((rows + kPanel - 1) / kPanel), DType::kF32);
  PackedMatrix packed(cols, types, rows);
  packed.data_.reserve(packed.bytes_ / static_cast<int64_t>(sizeof(float)));
  for (int64_t p = 0; p < packed.panels(); ++p) {
    cpu::kernels().pack_panel(
        source + p * kPanel * cols, cols, std::min(kPanel, rows - p * kPanel), cols,
        reinterpret_cast<float*>(packed.at(packed.panels_[static_cast<size_t>(p)])));
  }
  return packed;
}

void PackedMatrix::transposed_block(int64_t n_begin, int64_t n_count, int64_t k_begin,
                                    float* scratch, float* out) const {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t first = n_begin / kPanel;
  if (is_float32_) {
    k.transpose_panels(reinterpret_cast<const float*>(at(panels_[static_cast<size_t>(first)])),
                       cols_, n_count, k_begin, out);
    return;
  }
  const int64_t width = std::min(kPanel, cols_ - k_begin);
  for (int64_t p = 0; p * kPanel < n_count; ++p) {
    const Panel& panel = panels_[static_cast<size_t>(first + p)];
    k.expand_panel(panel.dtype, at(panel), cols_, k_begin, width, scratch + p * kPanel * width);
  }
  k.transpose_panels(scratch, width, n_count, 0, out);
}

void PackedMatrix::multiply_rows(int64_t p_begin, int64_t count, int64_t rows, const float* x,
                                 int64_t x_stride, float* out) const {
  const int64_t end = p_begin + count;
  while (p_begin < end) {
    const Panel& first = panels_[static_cast<size_t>(p_begin)];
    int64_t stop = p_begin + 1;  // panels of one format lie at equal distances
    while (stop < end && panels_[static_cast<size_t>(stop)].dtype == first.dtype) ++stop;
    const int64_t stride =
        stop > p_begin + 1 ? panels_[static_cast<size_t>(p_begin + 1)].offset - first.offset : 0;
    cpu::kernels().stream_panels(first.dtype, at(first), stride, stop - p_begin, cols_, rows, x,
                                 x_stride, out);
    out += (stop - p_begin) * rows * kPanel;
    p_begin = stop;
  }
}

void PackedMatrix::int8_gemm(int64_t p, int64_t live, const uint8_t* x, int64_t x_stride,
                             float* out) const {
  const Panel& panel = panels_[static_cast<size_t>(p)];
  cpu::kernels().int8_gemm(panel.dtype, live, cols_, x, x_stride, at(panel), out);
}

void PackedMatrix::read_row(int64_t row, float* out) const {
  float scratch[cpu::kContract * kPanel];
  for (int64_t k_begin = 0; k_begin < cols_; k_begin += cpu::kContract) {
    const int64_t count = std::min(cpu::kContract, cols_ - k_begin);
    const float* from = block(row / kPanel, k_begin, count, scratch) + row % kPanel;
    for (int64_t k = 0; k < count; ++k) out[k_begin + k] = from[k * kPanel];
  }
}

}  // namespace alignpro::ops
