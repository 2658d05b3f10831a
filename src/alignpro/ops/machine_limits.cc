#include "alignpro/ops/machine_limits.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>

#include "alignpro/core/aligned.h"
#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops {
namespace {

double median_seconds(const std::function<void()>& work) {
  work();  // warm-up
  std::array<double, 5> seconds;
  for (double& s : seconds) {
    const auto start = std::chrono::steady_clock::now();
    work();
    s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace

double fma_peak_gflops(ThreadPool& pool) {
  constexpr int64_t kSteps = 10'000'000;
  const int workers = pool.size();
  const double seconds = median_seconds(
      [&] { pool.run(workers, [](int64_t, int) { cpu::kernels().fma_chains(kSteps); }); });
  return 2.0 * workers * kSteps * cpu::kFmaPerStep / seconds / 1e9;
}

double read_bandwidth_gbps(ThreadPool& pool) {
  constexpr int64_t kFloats = int64_t{1} << 27, kChunks = 64;
  AlignedBuffer memory(kFloats);
  std::fill_n(memory.data(), kFloats, 1.0f);
  const double seconds = median_seconds([&] {
    pool.run(kChunks, [&](int64_t item, int) {
      constexpr int64_t kChunk = kFloats / kChunks;
      cpu::kernels().read_memory(memory.data() + item * kChunk, kChunk);
    });
  });
  return kFloats * sizeof(float) / seconds / 1e9;
}

}  // namespace alignpro::ops
