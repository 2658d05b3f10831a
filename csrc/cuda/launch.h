#pragma once

#if !defined(__CUDACC__)
#include "host_launch.h"  // of the C++ tests, which run the launchers on the CPU
#else

#include <cuda_runtime.h>

#include "alignpro/core/error.h"
#include "ops.h"

// Shared memory whose size the launch gives.
#define ALIGNPRO_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace alignpro::cuda {

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  throw Unavailable(cat("cuda: ", op, ": ", cudaGetErrorString(status), " (",
                        cudaGetErrorName(status),
                        "); see alignpro.native.core.cuda.unavailable_reason()"));
}

// The one way to start a kernel: an empty grid is nothing to do, and every launch is checked.
template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            Stream stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          op);
  }
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), op);
}

inline unsigned count(int64_t blocks) { return static_cast<unsigned>(blocks); }

}  // namespace alignpro::cuda

#endif
