#pragma once

// A tile of C = A B^T in bfloat16 for sm_90a. Threads come in warpgroups of 128. A thread of the
// last one, the producer, copies slices of both operands by TMA into a ring of stages; the
// consumers, 64 rows each, multiply what has landed by wgmma (m64nNk16, float32 sums). An element
// is one chain of products of 16, in ascending order of the contraction, in every tile: neither
// the number of rows nor the tile decides a bit.
//
// Beside what block.h lists, a Block has
//
//   Map                                       a matrix as TMA sees it, read in boxes of 64 values
//   uint32_t shared_address(const void*)
//   void init_barrier(uint64_t* barrier, int arrivals), publish_barriers()
//   void arrive(uint64_t* barrier)
//   void expect(uint64_t* barrier, int bytes) arrives; the phase lasts until so many have landed
//   void wait_phase(uint64_t* barrier, uint32_t parity)
//                                             until the phase of that parity is over
//   void load_box(void* shared, const Map&, int64_t depth, int64_t row, uint64_t* barrier)
//                                             starts a copy, swizzled by 128 bytes; zeros outside
//   void begin_products(sums)                 before the first product and after each commit
//   void multiply_group(float (&sums)[N / 8][4], uint64_t a, uint64_t b)
//                                             starts sums += a b^T, 64 x 16 by N x 16; a and b
//                                             describe slices in shared memory
//   void commit_products(), wait_products<kPending>(sums)
//   void lower_registers<n>(), raise_registers<n>()
//
// called by whole warpgroups from begin_products on.

#include <cstdint>

#include "block.h"

namespace alignpro::cuda {

inline constexpr int kGroupThreads = 128, kGroupRows = 64;
// Of the contraction, a stage: 128 bytes, the width that is swizzled.
inline constexpr int kStageDepth = 64;
inline constexpr int kStageRowBytes = 128;
// Eight such rows, of which each is shuffled in its own way; slices begin at a multiple.
inline constexpr int kSwizzleBytes = 1024;

// kSets: how many A's share a B, each with sums of its own.
template <int kGroups_, int kColumns_, int kStages_, int kSets_ = 1>
struct WgmmaTile {
  static constexpr int kGroups = kGroups_, kColumns = kColumns_, kStages = kStages_, kSets = kSets_;
  static constexpr int kRows = kGroupRows * kGroups;
  static constexpr int kThreads = kGroupThreads * (kGroups + 1);
  static constexpr int kBytesA = kRows * kStageRowBytes, kBytesB = kColumns * kStageRowBytes;
  static constexpr int kStageBytes = kSets * kBytesA + kBytesB;
  // Slices, barriers, and what it takes to begin at a multiple.
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kSwizzleBytes;
  // A thread's share: [j][2 h + e] is element
  //   row = 64 warpgroup + 16 (warp % 4) + 8 h + lane / 4,  column = 8 j + 2 (lane % 4) + e.
  using Sums = float[kColumns / 8][4];
};

// Rows of A's box: eight at least, no more than there are. What lies below in a slice is never
// written, and neither are its sums.
template <typename Tile>
constexpr int box_rows(int64_t rows) {
  return rows >= Tile::kRows ? Tile::kRows : static_cast<int>((rows + 7) / 8 * 8);
}

template <typename Tile>
struct WgmmaShare {
  bool produces, copies;  // of the producer; its one thread that works
  int row, column;        // of j = h = e = 0

  explicit ALIGNPRO_HOST_DEVICE WgmmaShare(int thread)
      : produces(thread >= Tile::kGroups * kGroupThreads),
        copies(thread == Tile::kGroups * kGroupThreads),
        row(thread / kWarp * 16 + thread % kWarp / 4),
        column(thread % 4 * 2) {}
};

// Where a thread stands in the ring. `full` tells consumers that a stage has landed, `empty` the
// producer that every consumer's warp has read it.
template <typename Tile>
struct Ring {
  unsigned char* slices;
  uint64_t* barriers;
  int stage = 0;
  uint32_t parity = 0;

  ALIGNPRO_HOST_DEVICE unsigned char* a(int set = 0) const {
    return slices + stage * Tile::kStageBytes + set * Tile::kBytesA;
  }
  ALIGNPRO_HOST_DEVICE unsigned char* b() const { return a(Tile::kSets); }
  ALIGNPRO_HOST_DEVICE uint64_t* full() const { return barriers + stage; }
  ALIGNPRO_HOST_DEVICE uint64_t* empty(int of) const { return barriers + Tile::kStages + of; }
  ALIGNPRO_HOST_DEVICE void advance() {
    if (++stage < Tile::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// shared: Tile::kSharedBytes.
template <typename Tile, typename Block>
ALIGNPRO_BODY Ring<Tile> make_ring(Block& block, unsigned char* shared) {
  const auto past = static_cast<int>(block.shared_address(shared) % kSwizzleBytes);
  Ring<Tile> ring;
  ring.slices = shared + (past == 0 ? 0 : kSwizzleBytes - past);
  ring.barriers = reinterpret_cast<uint64_t*>(ring.slices + Tile::kStages * Tile::kStageBytes);
  if (block.thread() == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      block.init_barrier(ring.barriers + stage, 1);
      block.init_barrier(ring.empty(stage), Tile::kGroups * kGroupThreads / kWarp);
    }
    block.publish_barriers();
  }
  block.sync();
  return ring;
}

// Of rows [column, ...) of B and rows [row, ...) of each A. box_a: rows of A's box.
template <typename Tile, typename Block, typename... Maps>
ALIGNPRO_BODY void copy_operands(Block& block, Ring<Tile>& ring, int64_t row, int64_t column,
                                 int64_t depth, int box_a, const typename Block::Map& b,
                                 const Maps&... a) {
  static_assert(sizeof...(a) == Tile::kSets);
  for (int64_t k = 0; k < depth; k += kStageDepth) {
    block.wait_phase(ring.empty(ring.stage), ring.parity ^ 1);  // over at once in the first round
    block.expect(ring.full(), Tile::kSets * box_a * kStageRowBytes + Tile::kBytesB);
    int set = 0;
    (block.load_box(ring.a(set++), a, k, row, ring.full()), ...);
    block.load_box(ring.b(), b, k, column, ring.full());
    ring.advance();
  }
}

// A slice as wgmma takes it, of a contraction that lies along its rows, swizzled by 128 bytes: the
// address, the distance of eight rows, both by 16, and the swizzle's number.
ALIGNPRO_HOST_DEVICE inline uint64_t describe_slice(uint32_t address) {
  return uint64_t{address >> 4} | uint64_t{1} << 16 | uint64_t{kSwizzleBytes >> 4} << 32 |
         uint64_t{1} << 62;
}

// sums += what copy_operands brings, in the same order of calls; one for each A.
template <typename Tile, typename Block, typename... Sums>
ALIGNPRO_BODY void multiply_operands(Block& block, Ring<Tile>& ring, int64_t depth, Sums&... sums) {
  static_assert(sizeof...(sums) == Tile::kSets);
  const int rows_above = block.thread() / kGroupThreads * kGroupRows;
  const bool leads = block.thread() % kWarp == 0;
  int before = -1;  // the stage that the products under way read
  for (int64_t k = 0; k < depth; k += kStageDepth) {
    block.wait_phase(ring.full(), ring.parity);
    const uint64_t a = describe_slice(block.shared_address(ring.a()) + rows_above * kStageRowBytes);
    const uint64_t b = describe_slice(block.shared_address(ring.b()));
    (block.begin_products(sums), ...);
#pragma unroll
    for (int step = 0; step < kStageDepth / 16; ++step) {  // each 32 bytes on; by 16
      int set = 0;
      (block.multiply_group(sums, a + set++ * (Tile::kBytesA >> 4) + 2 * step, b + 2 * step), ...);
    }
    block.commit_products();
    (block.template wait_products<1>(sums), ...);
    if (leads && before >= 0) block.arrive(ring.empty(before));
    before = ring.stage;
    ring.advance();
  }
  (block.template wait_products<0>(sums), ...);
  if (leads && before >= 0) block.arrive(ring.empty(before));
}

template <typename Sums>
ALIGNPRO_BODY void clear(Sums& sums) {
#pragma unroll
  for (auto& four : sums) {
#pragma unroll
    for (float& sum : four) sum = 0.0f;
  }
}

// Tiles in the order in which a grid takes them: 16 tiles of rows beside each other share a tile of
// columns, so that what a wave reads is small in both.
struct TileOrder {
  int64_t row_tiles, column_tiles;

  ALIGNPRO_HOST_DEVICE int64_t count() const { return row_tiles * column_tiles; }
  ALIGNPRO_HOST_DEVICE void at(int64_t tile, int64_t* row, int64_t* column) const {
    constexpr int64_t kBeside = 16;
    const int64_t first = tile / (kBeside * column_tiles) * kBeside;
    const int64_t left = row_tiles - first, beside = left < kBeside ? left : kBeside;
    const int64_t within = tile - first * column_tiles;
    *row = first + within % beside;
    *column = within / beside;
  }
};

// Of a kernel with two consumers, whose sums need more than a third of the registers each.
template <typename Tile, typename Block>
ALIGNPRO_BODY void share_registers(Block& block, bool produces) {
  if constexpr (Tile::kGroups == 2) {
    if (produces) {
      block.template lower_registers<40>();
    } else {
      block.template raise_registers<232>();
    }
  }
}

}  // namespace alignpro::cuda
