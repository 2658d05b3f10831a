#pragma once

// The gradients of attention_prefill, probabilities computed again from the logarithms of the
// softmaxes' sums. Two passes, and no sum between blocks: one over tiles of query rows gives dq,
// one over tiles of keys, in whose products keys and queries change places, dk and dv. Both are
// built of attention_tiles.h; every sum is one chain in ascending order of what it runs over.

#include <cmath>
#include <cstdint>

#include "../ops.h"
#include "attention_tiles.h"

namespace alignpro::cuda {

template <typename T>
inline constexpr int kBackwardThreads = sizeof(T) == 2 ? 128 : 64;
template <typename T>
inline constexpr int kBackwardRows = kBackwardThreads<T> / kWarp * kQueryRows;
inline constexpr int kBackwardStages = 2;

template <typename T>
struct AttentionBackward {
  Rows<const T> q, out, dout;  // q: its columns of qkv
  const float* lse;            // [rows][heads]
  float* delta;                // [rows][heads], out . dout
  KvBlocks<T> kv;
  const Segment* segments;
  const int32_t *child_begin, *children;  // null: each segment sees its own rows alone
  const int32_t* block_table;
  int64_t table_ld;
  int group, num_kv_heads;
  int64_t sliding_window;
  float scale;
  Rows<T> d_qkv;

  ALIGNPRO_HOST_DEVICE int64_t heads() const { return int64_t{group} * num_kv_heads; }
};

template <typename T, int kDim>
struct BackwardShared {
  using Tile = KeyTile<T, kDim>;
  static constexpr int kWeights =
      KeyWeights<T, kDim>::kNeedsShared ? kBackwardRows<T> * Tile::kWeights : 8;
  alignas(16) T stages[kBackwardStages][2 * Tile::kSize];
  alignas(16) T rows[2][kBackwardRows<T> * Tile::kLength];
  alignas(16) T weights[2][kWeights];
  float lse[kBackwardStages][Tile::kKeys], delta[kBackwardStages][Tile::kKeys];
  int position[kBackwardStages][Tile::kKeys];

  // Of a warp's 16 rows.
  ALIGNPRO_HOST_DEVICE T* own_weights(int which, int warp) {
    if (!KeyWeights<T, kDim>::kNeedsShared) return nullptr;
    return weights[which] + warp * kQueryRows * Tile::kWeights;
  }
};

// Query rows of a segment and KV head: row r is token r / group, head r % group.
template <typename T>
struct QueryRows {
  Segment own;
  int group;
  int64_t kv_head, head_dim;

  ALIGNPRO_HOST_DEVICE int count() const { return own.row_count * group; }
  ALIGNPRO_HOST_DEVICE int position(int row) const { return own.position + row / group; }
  ALIGNPRO_HOST_DEVICE int64_t row_of(int row) const { return own.row_begin + row / group; }
  ALIGNPRO_HOST_DEVICE int64_t head_of(int row) const { return kv_head * group + row % group; }
  template <typename U>
  ALIGNPRO_HOST_DEVICE U* at(const Rows<U>& rows, int row) const {
    return rows.data + row_of(row) * rows.ld + head_of(row) * head_dim;
  }
};

// A warp a head: delta = out . dout.
template <typename T, typename Block>
ALIGNPRO_BODY void attention_delta_row(Block& block, int64_t row,
                                       const AttentionBackward<T>& args) {
  const int64_t d = args.kv.head_dim;
  const int lane = block.thread() % kWarp;
  for (int64_t head = block.thread() / kWarp; head < args.heads();
       head += block.threads() / kWarp) {
    const T* a = args.out.data + row * args.out.ld + head * d;
    const T* b = args.dout.data + row * args.dout.ld + head * d;
    float sum = 0.0f;
    for (int64_t i = lane; i < d; i += kWarp) sum = std::fma(to_float(a[i]), to_float(b[i]), sum);
    sum = reduce_lanes(block, sum, kWarp, Add());
    if (lane == 0) args.delta[row * args.heads() + head] = sum;
  }
}

// Starts copying rows [first, first + kCount) of q and dout; zeros past the last.
template <int kDim, int kCount, typename T, typename Block>
ALIGNPRO_BODY void copy_query_rows(Block& block, const AttentionBackward<T>& args,
                                   const QueryRows<T>& rows, int first, T* q, T* dout) {
  constexpr int kAcross = kDim / Pack<T>::kSize, kLength = KeyTile<T, kDim>::kLength;
#pragma unroll
  for (int i = block.thread(); i < kCount * kAcross; i += kBackwardThreads<T>) {
    const int r = i / kAcross, along = i % kAcross * Pack<T>::kSize;
    const bool live = first + r < rows.count() && along < rows.head_dim;
    block.copy16(q + r * kLength + along, live ? rows.at(args.q, first + r) + along : args.q.data,
                 live);
    block.copy16(dout + r * kLength + along,
                 live ? rows.at(args.dout, first + r) + along : args.dout.data, live);
  }
}

// A warp's 16 rows of sums to rows `to(r)` of memory, r counted in the block; null: no such row.
template <int kCount, typename T, typename Block, typename To>
ALIGNPRO_BODY void store_head_rows(Block& block, const float (&sums)[kCount][2][4],
                                   int64_t head_dim, const To& to) {
  const int lane = block.thread() % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    T* row = to(block.thread() / kWarp * kQueryRows + lane / 4 + 8 * h);
    if (row == nullptr) continue;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * c + 8 * half + lane % 4 * 2;
        if (column < head_dim) {
          store_pair(block, row + column, sums[c][half][2 * h], sums[c][half][2 * h + 1]);
        }
      }
    }
  }
}

template <int kDim, typename T, typename Block>
ALIGNPRO_BODY void attention_backward_queries(Block& block, int64_t segment, int64_t kv_head,
                                              int64_t tile_from_end,
                                              const AttentionBackward<T>& args,
                                              BackwardShared<T, kDim>& shared) {
  using Tile = KeyTile<T, kDim>;
  constexpr int kRows = kBackwardRows<T>, kTiles = Tile::kKeys / 8;
  const QueryRows<T> rows{args.segments[segment], args.group, kv_head, args.kv.head_dim};
  const int tiles = (rows.count() + kRows - 1) / kRows;
  if (tile_from_end >= tiles) return;
  const int first = (tiles - 1 - static_cast<int>(tile_from_end)) * kRows;
  const int live = rows.count() - first < kRows ? rows.count() - first : kRows;
  const int64_t last_position = rows.position(first + live - 1);
  const KeySource<T> keys{args.kv, args.block_table + segment * args.table_ld, kv_head,
                          ops::first_visible(rows.position(first), args.sliding_window),
                          last_position + 1};
  const int64_t first_tile = keys.begin / Tile::kKeys, end_tile = last_position / Tile::kKeys + 1;
  const auto copy = [&](int64_t tile) {
    if (tile < end_tile) {
      copy_key_tile<kDim, kBackwardThreads<T>>(
          block, keys, tile, shared.stages[(tile - first_tile) % kBackwardStages]);
    }
    block.commit();
  };
  copy_query_rows<kDim, kRows>(block, args, rows, first, shared.rows[0], shared.rows[1]);
  for (int i = 0; i < kBackwardStages - 1; ++i) copy(first_tile + i);
  block.template wait<kBackwardStages - 2>();
  block.sync();
  const int thread = block.thread(), warp = thread / kWarp, lane = thread % kWarp;
  Queries<T, kDim> q, dout;
  q.load(block, shared.rows[0] + warp * kQueryRows * Tile::kLength);
  dout.load(block, shared.rows[1] + warp * kQueryRows * Tile::kLength);
  float lse[2], delta[2];
  int64_t position[2];
  for (int h = 0; h < 2; ++h) {
    const int r = warp * kQueryRows + lane / 4 + 8 * h, row = first + (r < live ? r : live - 1);
    const int64_t at = rows.row_of(row) * args.heads() + rows.head_of(row);
    lse[h] = args.lse[at];
    delta[h] = args.delta[at];
    position[h] = rows.position(row);
  }
  float dq[kDim / 16][2][4] = {}, unused[4];
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    block.template wait<kBackwardStages - 2>();
    block.sync();  // the tile is there for all, and the one before is read by all
    copy(tile + kBackwardStages - 1);
    const T* at = shared.stages[(tile - first_tile) % kBackwardStages];
    float s[kTiles][4], ds[kTiles][4];
    q.multiply(block, at, s);
    dout.multiply(block, at + Tile::kSize, ds);
    const Visible visible[2] = {{position[0], args.sliding_window, tile * Tile::kKeys},
                                {position[1], args.sliding_window, tile * Tile::kKeys}};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, key = 8 * j + lane % 4 * 2 + e % 2;
        const float p = std::exp(s[j][e] * args.scale - lse[h]);
        ds[j][e] = visible[h](key) ? p * (ds[j][e] - delta[h]) * args.scale : 0.0f;
      }
    }
    KeyWeights<T, kDim> weights;
    weights.take(block, ds, shared.own_weights(0, warp));
    weights.template multiply<kDim / 16, 1, false>(block, at, 0, dq, unused);
  }
  store_head_rows<kDim / 16, T>(block, dq, args.kv.head_dim, [&](int r) -> T* {
    return r < live ? rows.at(args.d_qkv, first + r) : nullptr;
  });
}

// Keys are the rows of a segment, which it and its children see; children go in their order.
template <int kDim, typename T, typename Block>
ALIGNPRO_BODY void attention_backward_keys(Block& block, int64_t segment, int64_t kv_head,
                                           int64_t tile, const AttentionBackward<T>& args,
                                           BackwardShared<T, kDim>& shared) {
  using Tile = KeyTile<T, kDim>;
  constexpr int kRows = kBackwardRows<T>, kTiles = Tile::kKeys / 8;
  constexpr int kAcross = kDim / Pack<T>::kSize;
  const Segment own = args.segments[segment];
  const int first = static_cast<int>(tile) * kRows;
  if (first >= own.row_count) return;
  const int live = own.row_count - first < kRows ? own.row_count - first : kRows;
  const int first_key = own.position + first, last_key = first_key + live - 1;
  const int thread = block.thread(), warp = thread / kWarp, lane = thread % kWarp;
  const int32_t* table = args.block_table + segment * args.table_ld;
#pragma unroll
  for (int i = thread; i < kRows * kAcross; i += kBackwardThreads<T>) {
    const int r = i / kAcross, along = i % kAcross * Pack<T>::kSize;
    const bool there = r < live && along < args.kv.head_dim;
    const int64_t key = first_key + r;
    const T* from = args.kv.base;
    if (there) from = args.kv.key(table[key / ops::kKvBlock], kv_head, key % ops::kKvBlock) + along;
    block.copy16(shared.rows[0] + r * Tile::kLength + along, from, there);
    block.copy16(shared.rows[1] + r * Tile::kLength + along,
                 from + (there ? args.kv.value_offset : 0), there);
  }
  block.commit();
  block.template wait<0>();
  block.sync();
  // Of wide heads the sums of dk and dv leave no registers for K and V.
  Queries<T, kDim, kDim <= 64> k, v;
  k.load(block, shared.rows[0] + warp * kQueryRows * Tile::kLength);
  v.load(block, shared.rows[1] + warp * kQueryRows * Tile::kLength);
  float dk[kDim / 16][2][4] = {}, dv[kDim / 16][2][4] = {}, unused[4];

  const bool alone = args.children == nullptr;
  const int from = alone ? 0 : args.child_begin[segment];
  const int to = alone ? 1 : args.child_begin[segment + 1];
  for (int child = from; child < to; ++child) {
    const QueryRows<T> rows{args.segments[alone ? segment : args.children[child]], args.group,
                            kv_head, args.kv.head_dim};
    const int window = static_cast<int>(args.sliding_window), base = rows.own.position;
    const int begin = first_key > base ? first_key - base : 0;  // tokens
    int end = rows.own.row_count;
    if (window > 0 && last_key + window - base < end) end = last_key + window - base;
    if (begin >= end) continue;
    const int first_tile = begin * args.group / Tile::kKeys;
    const int end_tile = (end * args.group - 1) / Tile::kKeys + 1;
    const auto copy = [&](int t) {
      if (t < end_tile) {
        const int stage = (t - first_tile) % kBackwardStages;
        T* q = shared.stages[stage];
        copy_query_rows<kDim, Tile::kKeys>(block, args, rows, t * Tile::kKeys, q, q + Tile::kSize);
        if (thread < Tile::kKeys) {
          const int row = t * Tile::kKeys + thread;
          const bool there = row < rows.count();
          const int64_t at = there ? rows.row_of(row) * args.heads() + rows.head_of(row) : 0;
          shared.lse[stage][thread] = there ? args.lse[at] : 0.0f;
          shared.delta[stage][thread] = there ? args.delta[at] : 0.0f;
          shared.position[stage][thread] = there ? rows.position(row) : -1;  // sees nothing
        }
      }
      block.commit();
    };
    block.sync();  // the child before has been read by all
    for (int i = 0; i < kBackwardStages - 1; ++i) copy(first_tile + i);
    for (int t = first_tile; t < end_tile; ++t) {
      block.template wait<kBackwardStages - 2>();
      block.sync();  // the tile is there for all, and the one before is read by all
      copy(t + kBackwardStages - 1);
      const int stage = (t - first_tile) % kBackwardStages;
      const T* at = shared.stages[stage];
      float p[kTiles][4], ds[kTiles][4];
      k.multiply(block, at, p);
      v.multiply(block, at + Tile::kSize, ds);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 8 * j + lane % 4 * 2 + e % 2;
          const int key = first_key + warp * kQueryRows + lane / 4 + e / 2 * 8;
          const int position = shared.position[stage][column];
          const bool seen = key <= position && (window <= 0 || key > position - window);
          const float weight = std::exp(p[j][e] * args.scale - shared.lse[stage][column]);
          p[j][e] = seen ? weight : 0.0f;
          ds[j][e] = seen ? weight * (ds[j][e] - shared.delta[stage][column]) * args.scale : 0.0f;
        }
      }
      KeyWeights<T, kDim> weights;
      weights.take(block, p, shared.own_weights(0, warp));
      weights.template multiply<kDim / 16, 1, false>(block, at + Tile::kSize, 0, dv, unused);
      weights.take(block, ds, shared.own_weights(1, warp));
      weights.template multiply<kDim / 16, 1, false>(block, at, 0, dk, unused);
    }
  }
  const auto row_at = [&](int64_t head) {
    return [&args, &own, first, live, head](int r) -> T* {
      if (r >= live) return nullptr;
      return args.d_qkv.data + (own.row_begin + first + r) * args.d_qkv.ld +
             head * args.kv.head_dim;
    };
  };
  const int64_t d = args.kv.head_dim;
  store_head_rows<kDim / 16, T>(block, dk, d, row_at(args.heads() + kv_head));
  store_head_rows<kDim / 16, T>(block, dv, d, row_at(args.heads() + args.num_kv_heads + kv_head));
}

}  // namespace alignpro::cuda
