// The matrix products of one pass over SmolLM2-135M's layers, as a share of this machine's FMA peak
// and read bandwidth, both measured in the same run. Medians of kRepeats.
//
//   cmake -S . -B build -DALIGNPRO_PYTHON=OFF -DALIGNPRO_TESTS=ON && cmake --build build
//   build/tests/bench/linear_bench

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/machine_limits.h"

namespace {

using alignpro::ThreadTeam;
using alignpro::ops::PackedMatrix;

constexpr int kRepeats = 7;

double median_seconds(const std::function<void()>& work) {
  work();  // warm-up
  std::vector<double> seconds;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
  return seconds[kRepeats / 2];
}

}  // namespace

int main() {
  ThreadTeam team(0);
  const double peak = alignpro::ops::fma_peak_gflops(team);
  const double bandwidth = alignpro::ops::read_bandwidth_gbps(team);
  std::printf("%d threads; FMA peak %.0f GFLOP/s; read bandwidth %.1f GB/s\n", team.size(), peak,
              bandwidth);

  struct Shape {
    int64_t outputs, inputs;
  };
  const std::vector<Shape> shapes = {{960, 576}, {576, 576}, {3072, 576}, {576, 1536}};
  const std::vector<float> source(3072 * 1536, 0.01f);
  std::vector<PackedMatrix> weights;  // distinct for each of 30 layers: they come from memory
  double floats = 0;
  for (int layer = 0; layer < 30; ++layer) {
    for (const Shape& s : shapes) {
      weights.push_back(PackedMatrix::pack(s.outputs, s.inputs, source.data()));
      floats += static_cast<double>(s.outputs * s.inputs);
    }
  }
  std::printf("%6s %10s %10s %12s %12s\n", "rows", "ms", "GFLOP/s", "of FMA peak", "of bandwidth");
  for (const int64_t rows : {1, 4, 16, 64, 256, 1024}) {
    const std::vector<float> x(static_cast<size_t>(rows * 1536), 0.5f);
    std::vector<float> y(static_cast<size_t>(rows * 3072));
    const double seconds = median_seconds([&] {
      for (const PackedMatrix& w : weights) {
        alignpro::ops::linear(rows, {x.data(), w.cols()}, w, y.data(), w.rows(), {}, team);
      }
    });
    const double gflops = 2 * static_cast<double>(rows) * floats / seconds / 1e9;
    std::printf("%6ld %10.2f %10.1f %11.0f%% %11.0f%%\n", static_cast<long>(rows), seconds * 1e3,
                gflops, 100 * gflops / peak, 100 * 4 * floats / seconds / 1e9 / bandwidth);
  }
}
