#pragma once

// What a kernel body asks of the thread block that runs it. Bodies are ordinary SIMT code over a
// `Block`; a kernel instantiates them with DeviceBlock (device_block.h), the C++ tests with a block
// of fibers (tests/cpp/host_block.h), so that the CPU runs the same lines. A Block has
//
//   int thread(), threads()
//   void sync()                               barrier of the block
//   T shuffle_xor(T value, int mask)          of the warp: the value of lane ^ mask
//   void copy16(void* shared, const void* global, bool live)
//                                             starts a copy of 16 bytes, or writes zeros
//   void commit(), wait<kPending>()           closes a group of copies; waits until at most so many
//                                             groups of this thread are under way
//   void load_matrices(uint32_t (&to)[4], const void* row)
//   void load_transposed(uint32_t (&to)[4], const void* row)
//                                             four 8x8 matrices of 16 bits; lane l names row l % 8
//                                             of matrix l / 8 (ldmatrix .x4, .trans)
//   uint32_t round_pair(float low, float high)
//                                             two bfloat16 in one register, rounded to nearest
//   void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
//                                             c += a b, bfloat16 16x16 by 16x8 (mma.m16n8k16)
//
// Every warp is whole, and calls of its 32 threads to anything but thread() come together.

#include <cstdint>

#include "alignpro/core/float_bits.h"
#include "alignpro/core/host_device.h"

#if defined(__CUDACC__)
#define ALIGNPRO_BODY __device__ inline
#else
#define ALIGNPRO_BODY inline
#endif

namespace alignpro::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;

// Sixteen bytes, as they are loaded and stored.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

struct Add {
  template <typename T>
  ALIGNPRO_HOST_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
// A NaN in b does not count.
struct Larger {
  ALIGNPRO_HOST_DEVICE float operator()(float a, float b) const { return b > a ? b : a; }
};
struct Smaller {
  ALIGNPRO_HOST_DEVICE int operator()(int a, int b) const { return b < a ? b : a; }
};

// Two neighbours, the first at a multiple of both.
template <typename Block>
ALIGNPRO_BODY void store_pair(Block& block, Bfloat16* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = block.round_pair(first, second);
}
template <typename Block>
ALIGNPRO_BODY void store_pair(Block&, float* to, float first, float second) {
  to[0] = first;
  to[1] = second;
}

// Over aligned groups of `width` lanes, in a butterfly: each lane gets the same bits.
template <typename Block, typename T, typename Op>
ALIGNPRO_BODY T reduce_lanes(Block& block, T value, int width, Op op) {
  for (int mask = width / 2; mask > 0; mask /= 2) value = op(value, block.shuffle_xor(value, mask));
  return value;
}

// Over the block: warps by butterfly, then warps in ascending order; every thread gets the result.
// scratch: shared, kMaxWarps values.
template <typename Block, typename T, typename Op>
ALIGNPRO_BODY T reduce_block(Block& block, T value, T* scratch, Op op) {
  value = reduce_lanes(block, value, kWarp, op);
  if (block.thread() % kWarp == 0) scratch[block.thread() / kWarp] = value;
  block.sync();
  T result = scratch[0];
  for (int warp = 1; warp < block.threads() / kWarp; ++warp) result = op(result, scratch[warp]);
  block.sync();  // scratch may be written again
  return result;
}

}  // namespace alignpro::cuda
