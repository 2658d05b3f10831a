#pragma once

// One block a tile of query rows of a segment and KV head: its rows are (token, head of the group)
// pairs in order, 16 a warp, so that K and V are read once for all heads of a group. The arithmetic
// is attention_tiles.h's; a warp has all keys of a tile and all columns of V, and joins the chunks
// of its rows in registers.

#include <cmath>
#include <cstdint>

#include "../ops.h"
#include "attention_tiles.h"

namespace alignpro::cuda {

template <typename T>
inline constexpr int kPrefillWarps = sizeof(T) == 2 ? 8 : 4;
template <typename T>
inline constexpr int kPrefillThreads = kPrefillWarps<T> * kWarp;
template <typename T>
inline constexpr int kPrefillRows = kPrefillWarps<T> * kQueryRows;
inline constexpr int kPrefillStages = 2;

template <typename T>
struct AttentionPrefill {
  Rows<const T> q;
  KvBlocks<T> kv;
  const Segment* segments;
  const int32_t* block_table;
  int64_t table_ld;
  int group, num_kv_heads;
  int64_t sliding_window;
  float scale;
  Rows<T> out;
  float* lse;  // [rows][heads], or null
};

template <typename T, int kDim>
struct PrefillShared {
  using Tile = KeyTile<T, kDim>;
  static constexpr int kQ = kPrefillRows<T> * Tile::kLength * static_cast<int>(sizeof(T));
  static constexpr int kJoined = sizeof(T) == 2 ? kPrefillRows<T> * kDim * 4 : 0;
  alignas(16) T stages[kPrefillStages][2 * Tile::kSize];
  alignas(16) unsigned char rows[kQ > kJoined ? kQ : kJoined];
  alignas(16) T weights[KeyWeights<T, kDim>::kNeedsShared ? kPrefillRows<T> * Tile::kWeights : 8];

  ALIGNPRO_HOST_DEVICE T* q() { return reinterpret_cast<T*>(rows); }
  // Where queries were, once they are fragments: each thread its own floats.
  ALIGNPRO_HOST_DEVICE float* joined() { return reinterpret_cast<float*>(rows); }
};

// A thread's two rows over the chunks so far. The outputs of bfloat16 lie in shared memory, one
// access in 512 keys, since registers are few; those of float32, whose queries stay there, do not.
template <typename T, int kCount>
struct JoinedChunks {
  static constexpr bool kShared = sizeof(T) == 2;
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float own[kShared ? 1 : kCount][2][4];
  float* shared;

  ALIGNPRO_BODY float& out(int c, int half, int e) {
    if constexpr (kShared) {
      return shared[((2 * c + half) * 4 + e) * kPrefillThreads<T>];
    } else {
      return own[c][half][e];
    }
  }
  // Takes in a chunk and opens the next.
  ALIGNPRO_BODY void close(RunningSoftmax* run, float (&chunk)[kCount][2][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float next = run->sum[2 * h], inverse = run->inverse(h);
      const bool first = sum[h] == 0.0f;
      const ops::SoftmaxJoin join = ops::join_softmax(max[h], sum[h], run->max[h], next);
      max[h] = join.max;
      sum[h] = join.sum;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& from = chunk[c][e / 2][2 * h + e % 2];
          float& to = out(c, e / 2, 2 * h + e % 2);
          if (next != 0.0f) to = join.keep * (first ? 0.0f : to) + join.add * (from * inverse);
          from = 0.0f;
        }
      }
    }
    *run = RunningSoftmax();
  }
};

template <int kDim, typename T, typename Block>
ALIGNPRO_BODY void attention_prefill_tile(Block& block, int64_t segment, int64_t kv_head,
                                          int64_t tile_from_end, const AttentionPrefill<T>& args,
                                          PrefillShared<T, kDim>& shared) {
  using Tile = KeyTile<T, kDim>;
  constexpr int kRows = kPrefillRows<T>, kThreads = kPrefillThreads<T>;
  const Segment own = args.segments[segment];
  const int group = args.group, rows = own.row_count * group;
  const int tiles = (rows + kRows - 1) / kRows;
  if (tile_from_end >= tiles) return;
  // The last tokens have the most keys: their blocks start first.
  const int first_row = (tiles - 1 - static_cast<int>(tile_from_end)) * kRows;
  const int live_rows = rows - first_row < kRows ? rows - first_row : kRows;
  const int64_t first_position = own.position + first_row / group;
  const int64_t last_position = own.position + (first_row + live_rows - 1) / group;
  const KeySource<T> keys{args.kv, args.block_table + segment * args.table_ld, kv_head,
                          ops::first_visible(first_position, args.sliding_window),
                          last_position + 1};
  const int64_t first_tile = keys.begin / Tile::kKeys, end_tile = last_position / Tile::kKeys + 1;
  const auto copy = [&](int64_t tile) {
    if (tile < end_tile) {
      copy_key_tile<kDim, kThreads>(block, keys, tile,
                                    shared.stages[(tile - first_tile) % kPrefillStages]);
    }
    block.commit();
  };

  const int thread = block.thread(), warp = thread / kWarp, lane = thread % kWarp;
  const int d = static_cast<int>(args.kv.head_dim);
  constexpr int kAcross = kDim / Pack<T>::kSize;
  for (int i = thread; i < kRows * kAcross; i += kThreads) {
    const int r = i / kAcross, along = i % kAcross * Pack<T>::kSize, row = first_row + r;
    const bool live = r < live_rows && along < d;
    const T* from = args.q.data;
    if (live) {
      from +=
          (own.row_begin + row / group) * args.q.ld + (kv_head * group + row % group) * d + along;
    }
    block.copy16(shared.q() + r * Tile::kLength + along, from, live);
  }
  for (int i = 0; i < kPrefillStages - 1; ++i) copy(first_tile + i);
  block.template wait<kPrefillStages - 2>();
  block.sync();
  Queries<T, kDim> queries;
  queries.load(block, shared.q() + warp * kQueryRows * Tile::kLength);

  // Rows past the last are copies of its position, which nobody stores.
  const int r = warp * kQueryRows + lane / 4;
  int64_t position[2];
  for (int h = 0; h < 2; ++h) {
    const int row = r + 8 * h < live_rows ? r + 8 * h : live_rows - 1;
    position[h] = own.position + (first_row + row) / group;
  }
  RunningSoftmax run;
  float out[kDim / 16][2][4] = {};
  JoinedChunks<T, kDim / 16> joined;
  joined.shared = shared.joined() + thread;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    block.template wait<kPrefillStages - 2>();
    block.sync();  // the tile is there for all, and the one before is read by all
    copy(tile + kPrefillStages - 1);
    const T* at = shared.stages[(tile - first_tile) % kPrefillStages];
    float s[Tile::kKeys / 8][4];
    queries.multiply(block, at, s);
    float max[2] = {-INFINITY, -INFINITY};
    const Visible visible[2] = {{position[0], args.sliding_window, tile * Tile::kKeys},
                                {position[1], args.sliding_window, tile * Tile::kKeys}};
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = 8 * j + lane % 4 * 2 + e % 2;
        s[j][e] = visible[e / 2](key) ? s[j][e] * args.scale : -INFINITY;
        max[e / 2] = Larger()(max[e / 2], s[j][e]);
      }
    }
    float keep[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      keep[h] = run.advance(h, reduce_lanes(block, max[h], 4, Larger()));
    }
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = run.weight(e / 2, s[j][e]);
    }
    run.rescale(keep, out);
    KeyWeights<T, kDim> weights;
    weights.take(
        block, s,
        weights.kNeedsShared ? shared.weights + warp * kQueryRows * Tile::kWeights : nullptr);
    weights.template multiply<kDim / 16, 1>(block, at + Tile::kSize, 0, out, run.sum);
    if ((tile + 1) % (kAttentionChunk / Tile::kKeys) == 0 || tile + 1 == end_tile) {
      joined.close(&run, out);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (r + 8 * h >= live_rows) continue;
    const int row = first_row + r + 8 * h;
    const int64_t to_row = own.row_begin + row / group, head = kv_head * group + row % group;
    const bool seen = joined.sum[h] != 0.0f;
    if (args.lse != nullptr && lane % 4 == 0) {
      args.lse[to_row * group * args.num_kv_heads + head] =
          seen ? joined.max[h] + std::log(joined.sum[h]) : NAN;
    }
    T* to = args.out.data + to_row * args.out.ld + head * d;
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * c + 8 * half + lane % 4 * 2;
        if (column >= d) continue;  // d is even
        store_pair(block, to + column, seen ? joined.out(c, half, 2 * h) : NAN,
                   seen ? joined.out(c, half, 2 * h + 1) : NAN);
      }
    }
  }
}

}  // namespace alignpro::cuda
