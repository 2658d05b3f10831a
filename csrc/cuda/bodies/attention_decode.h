#pragma once

// One block a row, 16 query heads of a KV head and chunk of 512 positions; chunks are joined in
// ascending order. The arithmetic is attention_tiles.h's: four warps share a tile's keys for the
// scores, and then the columns of V, which changes no element's order.

#include <cmath>
#include <cstdint>

#include "attention_tiles.h"

namespace alignpro::cuda {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeWarps = kDecodeThreads / kWarp;
inline constexpr int kDecodeStages = 3;

template <typename T>
struct AttentionDecode {
  Rows<const T> q;
  KvBlocks<T> kv;
  const int32_t* block_table;
  int64_t table_ld;
  const int32_t* positions;
  int group, num_kv_heads;
  int64_t sliding_window;
  float scale;
  float* partial;  // [rows][kv heads][max_chunks][group][2 + head_dim]: maximum, sum, output
  int64_t max_chunks;
  Rows<T> out;

  ALIGNPRO_HOST_DEVICE float* partial_of(int64_t row, int64_t kv_head, int64_t chunk,
                                         int64_t g) const {
    const int64_t unit = (row * num_kv_heads + kv_head) * max_chunks + chunk;
    return partial + (unit * group + g) * (2 + kv.head_dim);
  }
  // Blocks of 16 query heads a KV head.
  ALIGNPRO_HOST_DEVICE int head_tiles() const { return (group + kQueryRows - 1) / kQueryRows; }
};

template <typename T, int kDim>
struct DecodeShared {
  using Tile = KeyTile<T, kDim>;
  alignas(16) T stages[kDecodeStages][2 * Tile::kSize];
  alignas(16) T q[kQueryRows * Tile::kLength];
  alignas(16) T weights[kQueryRows * Tile::kWeights];
  float max[kQueryRows][kDecodeWarps];
};

template <int kDim, typename T, typename Block>
ALIGNPRO_BODY void attention_decode_chunk(Block& block, int64_t row, int64_t kv_head, int head_tile,
                                          int64_t chunk, const AttentionDecode<T>& args,
                                          DecodeShared<T, kDim>& shared) {
  using Tile = KeyTile<T, kDim>;
  constexpr int kTiles = kAttentionChunk / Tile::kKeys;
  constexpr int kColumns = (kDim / 16 + kDecodeWarps - 1) / kDecodeWarps;
  const int64_t position = args.positions[row];
  const int64_t first_key = ops::first_visible(position, args.sliding_window);
  const int64_t begin = chunk * kAttentionChunk;
  if (begin > position || begin + kAttentionChunk <= first_key) return;
  const KeySource<T> keys{args.kv, args.block_table + row * args.table_ld, kv_head, first_key,
                          position + 1};
  const int64_t first_tile = first_key > begin ? first_key / Tile::kKeys : chunk * kTiles;
  const int64_t last_tile = position / Tile::kKeys;
  const int64_t end_tile = last_tile < (chunk + 1) * kTiles ? last_tile + 1 : (chunk + 1) * kTiles;
  const auto copy = [&](int64_t tile) {
    if (tile < end_tile) {
      T* to = shared.stages[(tile - first_tile) % kDecodeStages];
      copy_key_tile<kDim, kDecodeThreads>(block, keys, tile, to);
    }
    block.commit();  // empty ones too: the wait counts groups
  };

  const int thread = block.thread(), warp = thread / kWarp, lane = thread % kWarp;
  const int d = static_cast<int>(args.kv.head_dim), heads = args.group - head_tile * kQueryRows;
  const T* q = args.q.data + row * args.q.ld + (kv_head * args.group + head_tile * kQueryRows) * d;
  constexpr int kAcross = kDim / Pack<T>::kSize;
#pragma unroll
  for (int i = thread; i < kQueryRows * kAcross; i += kDecodeThreads) {
    const int g = i / kAcross, along = i % kAcross * Pack<T>::kSize;
    const bool live = g < heads && along < d;
    block.copy16(shared.q + g * Tile::kLength + along, live ? q + g * d + along : q, live);
  }
  for (int i = 0; i < kDecodeStages - 1; ++i) copy(first_tile + i);
  block.template wait<kDecodeStages - 2>();
  block.sync();
  Queries<T, kDim> queries;
  queries.load(block, shared.q);

  RunningSoftmax run;
  float out[kColumns][2][4] = {};
  const int r = lane / 4, columns = lane % 4 * 2;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    block.template wait<kDecodeStages - 2>();
    block.sync();  // the tile is there for all, and the one before is read by all
    copy(tile + kDecodeStages - 1);
    const T* at = shared.stages[(tile - first_tile) % kDecodeStages];
    const Visible visible(position, args.sliding_window, tile * Tile::kKeys);
    float s[1][4] = {};
    float max[2] = {-INFINITY, -INFINITY};
    const bool scores = warp < Tile::kKeys / 8;
    if (scores) {
      queries.multiply(block, at + 8 * warp * Tile::kLength, s);
      for (int e = 0; e < 4; ++e) {
        s[0][e] = visible(8 * warp + columns + e % 2) ? s[0][e] * args.scale : -INFINITY;
        max[e / 2] = Larger()(max[e / 2], s[0][e]);
      }
    }
    for (int h = 0; h < 2; ++h) {
      max[h] = reduce_lanes(block, max[h], 4, Larger());
      if (lane % 4 == 0) shared.max[r + 8 * h][warp] = max[h];
    }
    block.sync();
    float keep[2];
    for (int h = 0; h < 2; ++h) {
      for (int w = 0; w < kDecodeWarps; ++w) max[h] = Larger()(max[h], shared.max[r + 8 * h][w]);
      keep[h] = run.advance(h, max[h]);
    }
    if (scores) {
      for (int h = 0; h < 2; ++h) {
        store_pair(block, shared.weights + (r + 8 * h) * Tile::kWeights + 8 * warp + columns,
                   run.weight(h, s[0][2 * h]), run.weight(h, s[0][2 * h + 1]));
      }
    }
    block.sync();
    run.rescale(keep, out);
    KeyWeights<T, kDim> weights;
    weights.load(block, shared.weights);
    weights.template multiply<kColumns, kDecodeWarps>(block, at + Tile::kSize, warp, out, run.sum);
  }

  for (int h = 0; h < 2; ++h) {
    const int g = r + 8 * h;
    if (g >= heads) continue;
    float* to = args.partial_of(row, kv_head, chunk, head_tile * kQueryRows + g);
    if (warp == 0 && lane % 4 == 0) {
      to[0] = run.max[h];
      to[1] = run.sum[2 * h];
    }
    const float inverse = run.inverse(h);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      for (int e = 0; e < 4; ++e) {
        const int column = 16 * (warp + kDecodeWarps * c) + e / 2 * 8 + columns + e % 2;
        if (column < d) to[2 + column] = out[c][e / 2][2 * h + e % 2] * inverse;
      }
    }
  }
}

// Joins a row's chunks for one KV head. No key above -inf: no softmax, NaN, as on the CPU.
template <typename T, typename Block>
ALIGNPRO_BODY void attention_decode_join(Block& block, int64_t row, int64_t kv_head,
                                         const AttentionDecode<T>& args) {
  const int64_t position = args.positions[row], d = args.kv.head_dim;
  const int64_t first = ops::first_visible(position, args.sliding_window) / kAttentionChunk;
  for (int64_t i = block.thread(); i < args.group * d; i += block.threads()) {
    const int64_t g = i / d, column = i % d;
    float max = -INFINITY, sum = 0.0f, out = 0.0f;
    for (int64_t chunk = first; chunk <= position / kAttentionChunk; ++chunk) {
      const float* part = args.partial_of(row, kv_head, chunk, g);
      const ops::SoftmaxJoin join = ops::join_softmax(max, sum, part[0], part[1]);
      max = join.max;
      sum = join.sum;
      if (part[1] != 0.0f) out = join.keep * out + join.add * part[2 + column];
    }
    args.out.data[row * args.out.ld + (kv_head * args.group + g) * d + column] =
        stored<T>(sum == 0.0f ? NAN : out);
  }
}

}  // namespace alignpro::cuda
