#pragma once

// A tile of C = A B^T: 128 x 128 by 256 threads, warps in 2 x 4, the contraction in slices that are
// copied ahead. bfloat16 multiplies in the tensor cores (m16n8k16, float32 sums), float32 by fused
// multiply-adds. An element sums its products in ascending order of the contraction, wherever in a
// tile it lies: the number of rows decides no bit.

#include <cmath>
#include <cstdint>

#include "block.h"

namespace alignpro::cuda {

inline constexpr int kTile = 128;
inline constexpr int kTileThreads = 256;

// An operand: element (r, k) lies at r * ld + k, or, where kDepthMajor, at k * ld + r. What is
// past `rows` or `depth` counts as zero; the contiguous one of them is a multiple of a Pack.
template <typename T, bool kDepthMajor_ = false>
struct Operand {
  using Type = T;
  static constexpr bool kDepthMajor = kDepthMajor_;
  const T* data;
  int64_t ld, rows, depth;
};

template <typename T>
struct Slices;
template <>
struct Slices<Bfloat16> {
  static constexpr int kDepth = 32, kStages = 3;
};
template <>
struct Slices<float> {
  static constexpr int kDepth = 16, kStages = 2;
};

// A slice in shared memory. Rows are a Pack longer than they need be: the eight rows that a matrix
// load touches at once then lie in different banks.
template <typename T, bool kDepthMajor>
struct Slice {
  static constexpr int kDepth = Slices<T>::kDepth;
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kLength = (kDepthMajor ? kTile : kDepth) + kPack;
  T* data;

  ALIGNPRO_HOST_DEVICE T* at(int r, int k) const {
    return kDepthMajor ? data + k * kLength + r : data + r * kLength + k;
  }
};
// Elements of a slice, either way round.
template <typename T>
inline constexpr int kSliceSize = kTile * (Slices<T>::kDepth + Pack<T>::kSize);
template <typename T>
inline constexpr int kProductBytes =
    static_cast<int>(sizeof(T)) * 2 * Slices<T>::kStages * kSliceSize<T>;

template <typename Block, typename Op>
ALIGNPRO_BODY void copy_slice(Block& block, const Op& operand, int64_t row, int64_t depth,
                              Slice<typename Op::Type, Op::kDepthMajor> to) {
  using To = Slice<typename Op::Type, Op::kDepthMajor>;
  constexpr int kAcross = (Op::kDepthMajor ? kTile : To::kDepth) / To::kPack;
  constexpr int kPieces = kTile * To::kDepth / To::kPack;
  static_assert(kPieces % kTileThreads == 0);
#pragma unroll
  for (int i = 0; i < kPieces / kTileThreads; ++i) {
    const int piece = i * kTileThreads + block.thread();
    const int line = piece / kAcross, along = piece % kAcross * To::kPack;
    const int r = Op::kDepthMajor ? along : line, k = Op::kDepthMajor ? line : along;
    const bool live = row + r < operand.rows && depth + k < operand.depth;
    const int64_t at =
        Op::kDepthMajor ? (depth + k) * operand.ld + row + r : (row + r) * operand.ld + depth + k;
    block.copy16(to.at(r, k), operand.data + (live ? at : 0), live);
  }
}

// A thread's share of a tile: sums[i][j][2 h + e] is element
//   row = 64 (warp / 4) + 16 i + 8 h + lane / 4,  column = 32 (warp % 4) + 8 j + 2 (lane % 4) + e.
struct Share {
  int row, column;  // of i = h = 0, j = e = 0
  int warp_column;  // warp % 4

  explicit ALIGNPRO_HOST_DEVICE Share(int thread)
      : row(thread / 128 * 64 + thread % kWarp / 4),
        column(thread / kWarp % 4 * 32 + thread % 4 * 2),
        warp_column(thread / kWarp % 4) {}
};
using Sums = float[4][4][4];

template <typename Block, bool kA, bool kB>
ALIGNPRO_BODY void multiply_slices(Block& block, Slice<Bfloat16, kA> a, Slice<Bfloat16, kB> b,
                                   Sums& sums) {
  const int warp = block.thread() / kWarp, lane = block.thread() % kWarp;
  const int row = warp / 4 * 64, column = warp % 4 * 32;
  const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < Slices<Bfloat16>::kDepth; k += 16) {
    uint32_t left[4][4], right[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kA) {
        block.load_transposed(left[i], a.at(row + 16 * i + middle, k + low + high));
      } else {
        block.load_matrices(left[i], a.at(row + 16 * i + low + middle, k + high));
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (kB) {
        block.load_transposed(right[j], b.at(column + 16 * j + high, k + low + middle));
      } else {
        block.load_matrices(right[j], b.at(column + 16 * j + low + high, k + middle));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        block.multiply(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

template <typename Block, bool kA, bool kB>
ALIGNPRO_BODY void multiply_slices(Block& block, Slice<float, kA> a, Slice<float, kB> b,
                                   Sums& sums) {
  const Share share(block.thread());
#pragma unroll 1
  for (int k = 0; k < Slices<float>::kDepth; ++k) {
    float right[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 2; ++e) right[j][e] = *b.at(share.column + 8 * j + e, k);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float left = *a.at(share.row + 16 * i + 8 * h, k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            sums[i][j][2 * h + e] = std::fma(left, right[j][e], sums[i][j][2 * h + e]);
          }
        }
      }
    }
  }
}

// sums = rows [a_row, a_row + 128) of A times rows [b_row, b_row + 128) of B. shared:
// kProductBytes<T>, free for other use afterwards.
template <typename Block, typename A, typename B>
ALIGNPRO_BODY void tile_product(Block& block, const A& a, int64_t a_row, const B& b, int64_t b_row,
                                void* shared, Sums& sums) {
  using T = typename A::Type;
  constexpr int kStages = Slices<T>::kStages, kDepth = Slices<T>::kDepth;
  T* memory = static_cast<T*>(shared);
  const auto slice_a = [&](int64_t step) {
    return Slice<T, A::kDepthMajor>{memory + step % kStages * 2 * kSliceSize<T>};
  };
  const auto slice_b = [&](int64_t step) {
    return Slice<T, B::kDepthMajor>{memory + (step % kStages * 2 + 1) * kSliceSize<T>};
  };
  const int64_t steps = (a.depth + kDepth - 1) / kDepth;
  const auto copy = [&](int64_t step) {
    if (step < steps) {
      copy_slice(block, a, a_row, step * kDepth, slice_a(step));
      copy_slice(block, b, b_row, step * kDepth, slice_b(step));
    }
    block.commit();  // empty ones too: the wait counts groups
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
    }
  }
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int64_t step = 0; step < steps; ++step) {
    block.template wait<kStages - 2>();
    block.sync();  // the step's slices are there for all, and the one before is read by all
    copy(step + kStages - 1);
    multiply_slices(block, slice_a(step), slice_b(step), sums);
  }
  block.template wait<0>();
  block.sync();
}

// fn(row, column, i, j, e) for every element of the thread's share.
template <typename Fn>
ALIGNPRO_BODY void for_share(const Share& share, const Fn& fn) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        fn(share.row + 16 * i + e / 2 * 8, share.column + 8 * j + e % 2, i, j, e);
      }
    }
  }
}

// The product itself: out [a.rows, b.rows] float32, overwritten or added to.
template <typename Block, typename A, typename B>
ALIGNPRO_BODY void store_product_tile(Block& block, const A& a, int64_t a_row, const B& b,
                                      int64_t b_row, int64_t out_rows, int64_t out_cols, float* out,
                                      int64_t ld, bool accumulate, void* shared) {
  Sums sums;
  tile_product(block, a, a_row, b, b_row, shared, sums);
  for_share(Share(block.thread()), [&](int r, int c, int i, int j, int e) {
    if (a_row + r >= out_rows || b_row + c >= out_cols) return;
    float* to = out + (a_row + r) * ld + b_row + c;
    *to = (accumulate ? *to : 0.0f) + sums[i][j][e];
  });
}

}  // namespace alignpro::cuda
