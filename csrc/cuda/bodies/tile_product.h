#pragma once

// A tile of C = A B^T by warps side by side, the contraction in slices that are copied ahead.
// bfloat16 multiplies in the tensor cores (m16n8k16, float32 sums), float32 by fused multiply-adds.
// An element sums its products in ascending order of the contraction, whatever the shape of the
// tile and wherever in it the element lies: the number of rows decides no bit.

#include <cmath>
#include <cstdint>

#include "block.h"

namespace alignpro::cuda {

// kRows of A by kColumns of B, by kWarpRows x kWarpColumns warps; slices of kLine bytes a row, of
// which kStages - 1 are on their way while one is multiplied.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kLine_, int kStages_>
struct TileShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpColumns = kWarpColumns_, kStages = kStages_;
  static constexpr int kThreads = kWarpRows_ * kWarpColumns_ * kWarp;
  // Of a warp, and how often the instruction's 16 x 8 fits into it.
  static constexpr int kOwnRows = kRows / kWarpRows_, kOwnColumns = kColumns / kWarpColumns_;
  static constexpr int kHigh = kOwnRows / 16, kWide = kOwnColumns / 8;
  static_assert(kHigh * 16 == kOwnRows && kWide * 8 == kOwnColumns);
  template <typename T>
  static constexpr int kDepth = kLine_ / static_cast<int>(sizeof(T));
};

// The one whose inputs are read least often, and the tile of everything but a linear layer.
using WideTile = TileShape<128, 128, 2, 4, 64, 3>;
inline constexpr int kTile = WideTile::kRows;
inline constexpr int kTileThreads = WideTile::kThreads;

// An operand: element (r, k) lies at r * ld + k, or, where kDepthMajor, at k * ld + r. What is
// past `rows` or `depth` counts as zero; the contiguous one of them is a multiple of a Pack.
template <typename T, bool kDepthMajor_ = false>
struct Operand {
  using Type = T;
  static constexpr bool kDepthMajor = kDepthMajor_;
  const T* data;
  int64_t ld, rows, depth;
};

// A slice in shared memory. Rows are a Pack longer than they need be: the eight rows that a matrix
// load touches at once then lie in different banks.
template <typename T, bool kDepthMajor, int kRows, int kDepth>
struct Slice {
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kLength = (kDepthMajor ? kRows : kDepth) + kPack;
  static constexpr int kSize = (kDepthMajor ? kDepth : kRows) * kLength;
  T* data;

  ALIGNPRO_HOST_DEVICE T* at(int r, int k) const {
    return kDepthMajor ? data + k * kLength + r : data + r * kLength + k;
  }
};
// What a product by the shape takes of shared memory, B either way round where so asked. (A lies
// across only in the wide one, whose slices are no larger for it.)
template <typename T, typename Shape = WideTile, bool kEitherB = false>
ALIGNPRO_HOST_DEVICE constexpr int product_bytes() {
  constexpr int kDepth = Shape::template kDepth<T>;
  constexpr int kA = Slice<T, false, Shape::kRows, kDepth>::kSize;
  constexpr int kB = Slice<T, false, Shape::kColumns, kDepth>::kSize;
  constexpr int kAcross = Slice<T, true, Shape::kColumns, kDepth>::kSize;
  constexpr int kLargest = kEitherB && kAcross > kB ? kAcross : kB;
  return static_cast<int>(sizeof(T)) * Shape::kStages * (kA + kLargest);
}
template <typename T, typename Shape = WideTile, bool kEitherB = false>
inline constexpr int kProductBytes = product_bytes<T, Shape, kEitherB>();

// A thread copies at one place of every few lines, so that only its first address is worked out.
template <int kThreads, typename Block, typename Op, int kRows, int kDepth>
ALIGNPRO_BODY void copy_slice(Block& block, const Op& operand, int64_t row, int64_t depth,
                              Slice<typename Op::Type, Op::kDepthMajor, kRows, kDepth> to) {
  constexpr int kPack = decltype(to)::kPack;
  constexpr int kLines = Op::kDepthMajor ? kDepth : kRows;
  constexpr int kAcross = kRows * kDepth / kLines / kPack, kStep = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0 && kLines % kStep == 0);
  const int first = block.thread() / kAcross, along = block.thread() % kAcross * kPack;
  const int64_t line = (Op::kDepthMajor ? depth : row) + first;
  const int64_t lines = Op::kDepthMajor ? operand.depth : operand.rows;
  const int64_t across = (Op::kDepthMajor ? row : depth) + along;
  const int64_t left = across < (Op::kDepthMajor ? operand.rows : operand.depth) ? lines - line : 0;
  const int live = static_cast<int>(left < kLines ? left : kLines);
  const auto* from = operand.data + line * operand.ld + across;
#pragma unroll
  for (int i = 0; i < kLines; i += kStep) {
    auto* at = Op::kDepthMajor ? to.at(along, first + i) : to.at(first + i, along);
    block.copy16(at, i < live ? from + i * operand.ld : operand.data, i < live);
  }
}

// A thread's share of a tile: sums[i][j][2 h + e] is element
//   row = kOwnRows (warp / kWarpColumns) + 16 i + 8 h + lane / 4,
//   column = kOwnColumns (warp % kWarpColumns) + 8 j + 2 (lane % 4) + e.
template <typename Shape = WideTile>
struct Share {
  int row, column;  // of i = h = 0, j = e = 0
  int warp_column;  // warp % kWarpColumns

  explicit ALIGNPRO_HOST_DEVICE Share(int thread)
      : row(thread / kWarp / Shape::kWarpColumns * Shape::kOwnRows + thread % kWarp / 4),
        column(thread / kWarp % Shape::kWarpColumns * Shape::kOwnColumns + thread % 4 * 2),
        warp_column(thread / kWarp % Shape::kWarpColumns) {}
};
template <typename Shape>
using SumsOf = float[Shape::kHigh][Shape::kWide][4];
using Sums = SumsOf<WideTile>;

// A warp of 8 columns loads 32 of the contraction at once, a wider one 16 columns of 16.
template <typename Shape, typename Block, bool kA, bool kB, int kDepth>
ALIGNPRO_BODY void multiply_slices(Block& block, Slice<Bfloat16, kA, Shape::kRows, kDepth> a,
                                   Slice<Bfloat16, kB, Shape::kColumns, kDepth> b,
                                   SumsOf<Shape>& sums) {
  constexpr int kHigh = Shape::kHigh, kWide = Shape::kWide;
  constexpr int kStep = kWide == 1 ? 32 : 16, kLoads = kWide == 1 ? 1 : kWide / 2;
  static_assert(kDepth % kStep == 0 && (kWide == 1 || kWide % 2 == 0));
  const int warp = block.thread() / kWarp, lane = block.thread() % kWarp;
  const int row = warp / Shape::kWarpColumns * Shape::kOwnRows;
  const int column = warp % Shape::kWarpColumns * Shape::kOwnColumns;
  const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kDepth; k += kStep) {
    uint32_t right[kLoads][4];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if constexpr (kB && kWide == 1) {
        block.load_transposed(right[j], b.at(column, k + lane));
      } else if constexpr (kB) {
        block.load_transposed(right[j], b.at(column + 16 * j + high, k + low + middle));
      } else if constexpr (kWide == 1) {
        block.load_matrices(right[j], b.at(column + low, k + middle + 2 * high));
      } else {
        block.load_matrices(right[j], b.at(column + 16 * j + low + high, k + middle));
      }
    }
#pragma unroll
    for (int part = 0; part < kStep / 16; ++part) {
      uint32_t left[kHigh][4];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) {
        if constexpr (kA) {
          block.load_transposed(left[i], a.at(row + 16 * i + middle, k + 16 * part + low + high));
        } else {
          block.load_matrices(left[i], a.at(row + 16 * i + low + middle, k + 16 * part + high));
        }
      }
#pragma unroll
      for (int i = 0; i < kHigh; ++i) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const int pair = kWide == 1 ? 2 * part : j % 2 * 2;
          block.multiply(sums[i][j], left[i], right[j / 2][pair], right[j / 2][pair + 1]);
        }
      }
    }
  }
}

template <typename Shape, typename Block, bool kA, bool kB, int kDepth>
ALIGNPRO_BODY void multiply_slices(Block& block, Slice<float, kA, Shape::kRows, kDepth> a,
                                   Slice<float, kB, Shape::kColumns, kDepth> b,
                                   SumsOf<Shape>& sums) {
  const Share<Shape> share(block.thread());
#pragma unroll 1
  for (int k = 0; k < kDepth; ++k) {
    float right[Shape::kWide][2];
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j) {
      for (int e = 0; e < 2; ++e) right[j][e] = *b.at(share.column + 8 * j + e, k);
    }
#pragma unroll
    for (int i = 0; i < Shape::kHigh; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float left = *a.at(share.row + 16 * i + 8 * h, k);
#pragma unroll
        for (int j = 0; j < Shape::kWide; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            sums[i][j][2 * h + e] = std::fma(left, right[j][e], sums[i][j][2 * h + e]);
          }
        }
      }
    }
  }
}

// sums = rows [a_row, a_row + kRows) of A times rows [b_row, b_row + kColumns) of B. shared:
// kProductBytes<T, Shape, B::kDepthMajor>, free for other use afterwards.
template <typename Shape = WideTile, typename Block, typename A, typename B>
ALIGNPRO_BODY void tile_product(Block& block, const A& a, int64_t a_row, const B& b, int64_t b_row,
                                void* shared, SumsOf<Shape>& sums) {
  using T = typename A::Type;
  constexpr int kStages = Shape::kStages, kDepth = Shape::template kDepth<T>;
  using SliceA = Slice<T, A::kDepthMajor, Shape::kRows, kDepth>;
  using SliceB = Slice<T, B::kDepthMajor, Shape::kColumns, kDepth>;
  constexpr int kStage = SliceA::kSize + SliceB::kSize;
  static_assert(kStages * kStage * static_cast<int>(sizeof(T)) <=
                kProductBytes<T, Shape, B::kDepthMajor>);
  T* memory = static_cast<T*>(shared);
  const auto slice_a = [&](int step) { return SliceA{memory + step % kStages * kStage}; };
  const auto slice_b = [&](int step) {
    return SliceB{memory + step % kStages * kStage + SliceA::kSize};
  };
  const int steps = static_cast<int>((a.depth + kDepth - 1) / kDepth);
  const auto copy = [&](int step) {
    if (step < steps) {
      copy_slice<Shape::kThreads>(block, a, a_row, int64_t{step} * kDepth, slice_a(step));
      copy_slice<Shape::kThreads>(block, b, b_row, int64_t{step} * kDepth, slice_b(step));
    }
    block.commit();  // empty ones too: the wait counts groups
  };
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
    }
  }
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    block.template wait<kStages - 2>();
    block.sync();  // the step's slices are there for all, and the one before is read by all
    copy(step + kStages - 1);
    multiply_slices<Shape>(block, slice_a(step), slice_b(step), sums);
  }
  block.template wait<0>();
  block.sync();
}

// fn(row, column, i, j, e) for every element of the thread's share.
template <typename Shape, typename Fn>
ALIGNPRO_BODY void for_share(const Share<Shape>& share, const Fn& fn) {
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j) {
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
