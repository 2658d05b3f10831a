// The matrix products of one pass over SmolLM2-135M's layers, as a share of this machine's FMA peak
// and read bandwidth, both measured in the same run. Medians of kRepeats.
//
//   cmake -S . -B build -DALIGNPRO_PYTHON=OFF -DALIGNPRO_TESTS=ON && cmake --build build
//   build/tests/bench/linear_bench

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/linear.h"

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

typedef float Lanes __attribute__((vector_size(32)));

// By name: the library's -ffp-contract=off reaches this file too.
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Twelve independent chains of multiply-adds: enough to fill two pipes of latency 4 (or 5).
double peak_gflops(ThreadTeam& team) {
  constexpr int64_t kSteps = 20'000'000;
  const double seconds = median_seconds([&] {
    team.run(team.size(), [](int64_t, int) {
      Lanes sums[12] = {};
      for (Lanes& sum : sums) __asm__ volatile("" : "+x"(sum));  // equal chains would be merged
      Lanes a = Lanes{} + 0.999f, b = Lanes{} + 0.001f;
      for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (Lanes& sum : sums) sum = multiply_add(sum, a, b);
        __asm__ volatile("" : "+x"(a), "+x"(b));
      }
      for (Lanes& sum : sums) __asm__ volatile("" : : "x"(sum));
    });
  });
  return static_cast<double>(team.size()) * kSteps * 12 * 16 / seconds / 1e9;
}

double read_gigabytes(ThreadTeam& team) {
  std::vector<float> memory(size_t{1} << 28, 1.0f);  // 1 GiB: no cache holds it
  const int64_t chunk = static_cast<int64_t>(memory.size()) / (16 * team.size());
  const double seconds = median_seconds([&] {
    team.run(16 * team.size(), [&](int64_t item, int) {
      const float* p = memory.data() + item * chunk;
      Lanes sums[4] = {};
      for (int64_t i = 0; i + 32 <= chunk; i += 32) {
        for (int k = 0; k < 4; ++k) {
          Lanes v;
          __builtin_memcpy(&v, p + i + 8 * k, sizeof(v));
          sums[k] += v;
        }
      }
      for (Lanes& sum : sums) __asm__ volatile("" : : "x"(sum));
    });
  });
  return static_cast<double>(memory.size()) * sizeof(float) / seconds / 1e9;
}

}  // namespace

int main() {
  ThreadTeam team(0);
  const double peak = peak_gflops(team), bandwidth = read_gigabytes(team);
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
