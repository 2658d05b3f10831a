// The matrix products of one pass over SmolLM2-135M's layers, by storage format and arithmetic, as
// a share of this machine's FMA peak and read bandwidth, both measured in the same run. Medians of
// kRepeats. Q6_K has whole blocks of 256 columns. ALIGNPRO_CPU_ISA compares instruction sets.
//
//   cmake -S . -B build -DALIGNPRO_PYTHON=OFF -DALIGNPRO_TESTS=ON && cmake --build build
//   build/tests/bench/linear_bench [ROWS ...]

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "alignpro/core/cpu_isa.h"
#include "alignpro/core/dtype.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/machine_limits.h"
#include "timing.h"

namespace {

using namespace alignpro;
using ops::Arithmetic;
using ops::PackedMatrix;

// Rows of small ordinary weights: every code alike, every scale 0.01.
std::vector<std::byte> rows_of(DType dtype, int64_t rows, int64_t cols) {
  std::vector<std::byte> bytes(static_cast<size_t>(rows * row_bytes(dtype, cols)), std::byte{0x35});
  const uint16_t scale = float_to_half(0.01f);
  const auto size = static_cast<size_t>(block_bytes(dtype));
  for (size_t at = 0; at < bytes.size(); at += size) {
    if (dtype == DType::kF32) {
      const float value = 0.01f;
      std::memcpy(bytes.data() + at, &value, sizeof value);
    } else {
      std::memcpy(bytes.data() + at + (dtype == DType::kQ6_K ? 208 : 0), &scale, sizeof scale);
      if (dtype == DType::kQ4_1) std::memcpy(bytes.data() + at + 2, &scale, sizeof scale);
    }
  }
  return bytes;
}

void measure(DType dtype, Arithmetic arithmetic, std::span<const int64_t> row_counts, double peak,
             double bandwidth, ThreadPool& pool) {
  struct Shape {
    int64_t outputs, inputs;
  };
  std::vector<Shape> shapes = {{960, 576}, {576, 576}, {3072, 576}, {576, 1536}};
  const int64_t block = block_values(dtype);
  for (Shape& s : shapes) s.inputs = (s.inputs + block - 1) / block * block;
  std::vector<PackedMatrix> weights;  // distinct for each of 30 layers: they come from memory
  double multiply_adds = 0, bytes = 0;
  for (const Shape& s : shapes) {
    const std::vector<std::byte> source = rows_of(dtype, s.outputs, s.inputs);
    std::vector<ops::QuantizedRow> rows;
    for (int64_t r = 0; r < s.outputs; ++r) {
      rows.push_back({source.data() + r * row_bytes(dtype, s.inputs), dtype});
    }
    for (int layer = 0; layer < 30; ++layer) {
      weights.push_back(PackedMatrix::pack(rows, s.inputs, pool, arithmetic));
      multiply_adds += static_cast<double>(s.outputs * s.inputs);
      bytes += static_cast<double>(weights.back().bytes());
    }
  }
  std::printf("%s, %s: %.0f MB\n", std::string(dtype_name(dtype)).c_str(),
              arithmetic == Arithmetic::kInt8 ? "int8" : "float32", bytes / 1e6);
  std::printf("%6s %10s %10s %12s %12s\n", "rows", "ms", "GFLOP/s", "of FMA peak", "of bandwidth");
  for (const int64_t rows : row_counts) {
    const std::vector<float> x(static_cast<size_t>(rows * 1536), 0.5f);
    std::vector<float> y(static_cast<size_t>(rows * 3072));
    const double seconds = median_seconds([&] {
      for (const PackedMatrix& w : weights) {
        ops::linear(rows, {x.data(), w.cols()}, w, y.data(), w.rows(), {}, pool);
      }
    });
    const double gflops = 2 * static_cast<double>(rows) * multiply_adds / seconds / 1e9;
    std::printf("%6ld %10.2f %10.1f %11.0f%% %11.0f%%\n", static_cast<long>(rows), seconds * 1e3,
                gflops, 100 * gflops / peak, 100 * bytes / seconds / 1e9 / bandwidth);
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<int64_t> row_counts;
  for (int i = 1; i < count; ++i) {
    row_counts.push_back(std::atol(arguments[i]));
    if (row_counts.back() < 1) {
      std::fprintf(stderr, "linear_bench: ROWS: expected 1 or more, got %s\n", arguments[i]);
      return 2;
    }
  }
  if (row_counts.empty()) row_counts = {1, 4, 16, 64, 256, 1024};
  ThreadPool pool(0);
  const double peak = ops::fma_peak_gflops(pool);
  const double bandwidth = ops::read_bandwidth_gbps(pool);
  std::printf("%s, %d threads; FMA peak %.0f GFLOP/s; read bandwidth %.1f GB/s\n",
              std::string(cpu_isa_name(cpu_isa())).c_str(), pool.size(), peak, bandwidth);
  for (const DType dtype : {DType::kF32, DType::kQ8_0, DType::kQ4_1, DType::kQ5_0, DType::kQ6_K}) {
    for (const Arithmetic arithmetic : {Arithmetic::kFloat32, Arithmetic::kInt8}) {
      if (dtype != DType::kF32 || arithmetic == Arithmetic::kFloat32) {
        measure(dtype, arithmetic, row_counts, peak, bandwidth, pool);
      }
    }
  }
}
