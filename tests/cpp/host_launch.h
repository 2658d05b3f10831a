#pragma once

// What the files csrc/cuda/*.cu need of CUDA, for a C++ compiler: kernels are functions, a launch
// runs the blocks of its grid one after another, each by fibers (host_block.h). So the tests run
// launchers, grids and workspaces as they are. Dynamic shared memory is poisoned before each block.

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/ops.h"
#include "host_block.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define ALIGNPRO_DYNAMIC_SHARED(name) unsigned char* name = alignpro::cuda::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 blockIdx, gridDim;

namespace alignpro::cuda {

inline constexpr int kSharedBytes = 99 << 10;  // what every GPU since sm_80 has
inline constexpr int kHopperSharedBytes = 227 << 10;

// Shared memory as the hardware addresses it, from 0 on; the dynamic part begins at a multiple of
// 16 alone.
struct SharedWindow {
  static constexpr int kBegin = 16;
  alignas(1024) unsigned char bytes[kBegin + kHopperSharedBytes];
};
inline SharedWindow& shared_window() {
  static SharedWindow window;
  return window;
}
inline unsigned char* dynamic_shared() { return shared_window().bytes + SharedWindow::kBegin; }

inline unsigned count(int64_t blocks) { return static_cast<unsigned>(blocks); }

// What a thread records instead of running it, while it records a graph (emulated/device.cc).
using Launches = std::vector<std::function<void()>>;
inline std::unique_ptr<Launches>& emulated_capture() {
  thread_local std::unique_ptr<Launches> launches;
  return launches;
}
inline int64_t& emulated_graph_launches() {
  static int64_t count = 0;
  return count;
}

// Device memory that is held, and the most there was at once (emulated/device.cc).
struct EmulatedMemory {
  std::mutex mutex;
  std::map<void*, int64_t> sizes;
  int64_t now = 0, peak = 0;
};
inline EmulatedMemory& emulated_memory() {
  static EmulatedMemory memory;
  return memory;
}

// Runs a grid; callers take turns: shared memory and blockIdx are there once.
inline void run_grid(dim3 grid, int threads, const std::function<void(HostBlock&)>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  static uint32_t seed = 0;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(dynamic_shared(), 0xff, kHopperSharedBytes);
        HostBlock::run(threads, ++seed, body);
      }
    }
  }
}

template <typename... Params, typename... Args>
void launch_any(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                int limit, const Args&... args) {
  if (shared_bytes > limit) {
    throw std::runtime_error(std::string(op) + ": more shared memory than there is");
  }
  const auto run = [=] { run_grid(grid, threads, [&](HostBlock&) { kernel(args...); }); };
  if (emulated_capture() != nullptr) {
    emulated_capture()->push_back(run);
  } else {
    run();
  }
}

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            Stream, const Args&... args) {
  launch_any(op, kernel, grid, threads, shared_bytes, kSharedBytes, args...);
}
template <typename... Params, typename... Args>
void launch_hopper(const char* op, void (*kernel)(Params...), dim3 grid, int threads,
                   int shared_bytes, Stream, const Args&... args) {
  launch_any(op, kernel, grid, threads, shared_bytes, kHopperSharedBytes, args...);
}

// What a kernel makes for its body.
class DeviceBlock {
 public:
  int thread() const { return HostBlock::current().thread(); }
  int threads() const { return HostBlock::current().threads(); }
  void sync() { HostBlock::current().sync(); }
  template <typename T>
  T shuffle_xor(T value, int mask) {
    return HostBlock::current().shuffle_xor(value, mask);
  }
  void copy16(void* shared, const void* global, bool live) {
    HostBlock::current().copy16(shared, global, live);
  }
  void commit() { HostBlock::current().commit(); }
  template <int kPending>
  void wait() {
    HostBlock::current().wait<kPending>();
  }
  void load_matrices(uint32_t (&to)[4], const void* row) {
    HostBlock::current().load_matrices(to, row);
  }
  void load_transposed(uint32_t (&to)[4], const void* row) {
    HostBlock::current().load_transposed(to, row);
  }
  uint32_t round_pair(float low, float high) { return HostBlock::current().round_pair(low, high); }
  void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    HostBlock::current().multiply(c, a, b0, b1);
  }
};

}  // namespace alignpro::cuda
