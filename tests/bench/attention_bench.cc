// Attention of one layer of SmolLM2-135M, as a share of this machine's FMA peak and read bandwidth,
// both measured in the same run: decoding at growing contexts, each sequence with keys of its own
// or all behind one prefix, and prefill. Medians of kRepeats.
//
//   cmake -S . -B build -DALIGNPRO_PYTHON=OFF -DALIGNPRO_TESTS=ON && cmake --build build
//   build/tests/bench/attention_bench

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "alignpro/core/parallel.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/ops/attention.h"
#include "alignpro/ops/cpu_ops.h"
#include "alignpro/ops/machine_limits.h"
#include "timing.h"

namespace {

using alignpro::ThreadPool;
using alignpro::model::KvPool;
using alignpro::ops::AttentionPlan;
using alignpro::ops::AttentionShape;
using alignpro::ops::KvWrite;
using alignpro::ops::Segment;
constexpr int64_t kKvBlock = alignpro::ops::kKvBlock;

// Layers' worth of keys that are visited in turn, so that they come from memory as in a step.
constexpr int64_t kLayers = 6;
const AttentionShape kShape{9, 3, 64, 0, 0.125f};

// `batch` sequences, of which positions [context - rows, context) are computed; the leading
// `shared` positions of all lie in the same blocks.
struct Case {
  const char* name;
  int64_t batch, context, rows, shared;
};

struct Machine {
  double peak, bandwidth;
};

void measure(const Case& c, const Machine& machine, ThreadPool& pool) {
  const int64_t blocks = (c.context + kKvBlock - 1) / kKvBlock;
  const int64_t common = c.shared / kKvBlock, own = blocks - common;
  const auto device = alignpro::ops::make_cpu_device(1);
  const auto ops = device->make_ops();
  KvPool kv_pool(*ops, kLayers, kShape.num_kv_heads, kShape.head_dim, common + c.batch * own,
                 alignpro::DType::kF32);
  std::vector<std::vector<int32_t>> tables(static_cast<size_t>(c.batch));
  std::vector<Segment> segments;
  std::vector<KvWrite> writes;
  for (int64_t s = 0; s < c.batch; ++s) {
    auto& table = tables[static_cast<size_t>(s)];
    for (int64_t b = 0; b < blocks; ++b) {
      table.push_back(static_cast<int32_t>(b < common ? b : b + s * own));
    }
    segments.push_back({s * c.rows, c.rows, c.context - c.rows, table});
    for (int64_t position = 0; position < c.context; ++position) {
      writes.push_back({0, table[static_cast<size_t>(position / kKvBlock)],
                        static_cast<int32_t>(position % kKvBlock)});
    }
  }
  std::mt19937 generator(1);
  std::normal_distribution<float> draw(0.0f, 1.0f);
  std::vector<float> qkv(static_cast<size_t>(c.batch * c.rows * kShape.qkv_size()));
  for (float& v : qkv) v = draw(generator);
  for (int64_t l = 0; l < kLayers; ++l)
    kv_write(kShape, qkv.data(), writes, kv_pool.layer(l), pool);
  std::vector<float> out(static_cast<size_t>(c.batch * c.rows * kShape.q_size()));
  const double seconds =
      median_seconds([&] {
        const AttentionPlan plan(kShape, segments, pool.size());
        for (int64_t l = 0; l < kLayers; ++l) {
          attention(kShape, qkv.data(), plan, kv_pool.layer(l), out.data(), pool);
        }
      }) /
      kLayers;
  const double before = static_cast<double>(c.context - c.rows), rows = static_cast<double>(c.rows);
  const double pairs = static_cast<double>(c.batch) * (rows * before + rows * (rows + 1) / 2);
  const double gflops = 4 * pairs * static_cast<double>(kShape.q_size()) / seconds / 1e9;
  const double bytes =
      static_cast<double>((common + c.batch * own) *
                          KvPool::block_bytes(kLayers, kShape.num_kv_heads, kShape.head_dim,
                                              alignpro::DType::kF32)) /
      kLayers;
  std::printf("%-22s %5ld %7ld %9.3f %8.1f %11.0f%% %8.1f %12.0f%%\n", c.name,
              static_cast<long>(c.batch), static_cast<long>(c.context), seconds * 1e3, gflops,
              100 * gflops / machine.peak, bytes / seconds / 1e9,
              100 * bytes / seconds / 1e9 / machine.bandwidth);
}

}  // namespace

int main() {
  ThreadPool pool(0);
  const Machine machine{alignpro::ops::fma_peak_gflops(pool),
                        alignpro::ops::read_bandwidth_gbps(pool)};
  std::printf("%d threads; FMA peak %.0f GFLOP/s; read bandwidth %.1f GB/s\n", pool.size(),
              machine.peak, machine.bandwidth);
  std::printf("GB/s counts every block once: beyond the bandwidth it came from cache\n");
  std::printf("%-22s %5s %7s %9s %8s %12s %8s %13s\n", "", "batch", "context", "ms/layer",
              "GFLOP/s", "of FMA peak", "GB/s", "of bandwidth");
  for (const int64_t batch : {1, 16}) {
    for (const int64_t context : {128, 512, 2048, 8192}) {
      measure({"decode", batch, context, 1, 0}, machine, pool);
    }
  }
  for (const int64_t context : {128, 512, 2048, 8192}) {
    measure({"decode, shared prefix", 16, context, 1, context - 32}, machine, pool);
  }
  for (const int64_t context : {256, 2048, 8192}) {
    measure({"prefill, whole", 1, context, context, 0}, machine, pool);
  }
  measure({"prefill, last 256", 1, 8192, 256, 0}, machine, pool);
  measure({"prefill, shared prefix", 16, 2048, 16, 2032}, machine, pool);
}
