#pragma once

// What decode and prefill share, so that a position's bits are the same from both. A row's keys go
// by chunks of 512 positions, a chunk by tiles of KeyTile::kKeys, both at fixed positions. Within a
// chunk a softmax runs over its tiles; outputs and the sum of the rounded probabilities are one
// chain of products in ascending order of keys, a key that the row does not see weighing exactly 0.
// Chunks are normalised and joined in ascending order.
//
// A warp holds 16 query rows (heads of a group, tokens) as fragments of the tensor cores lie: a
// thread has rows lane / 4 and 8 further, element e of tile j of 8 columns is
//   row = lane / 4 + 8 (e / 2),  column = 8 j + 2 (lane % 4) + e % 2.

#include <cmath>
#include <cstdint>

#include "../ops.h"
#include "alignpro/ops/shared/attention_rows.h"
#include "rows.h"

namespace alignpro::cuda {

inline constexpr int kAttentionChunk = 512;
inline constexpr int kQueryRows = 16;  // of a warp

// K or V of some positions in shared memory; kDim is head_dim and zeros. Rows are a Pack longer
// than they need be: eight of them then lie in different banks.
template <typename T, int kDim_>
struct KeyTile {
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kLength = kDim + Pack<T>::kSize;
  static constexpr int kSize = kKeys * kLength;            // of K, and of V behind it
  static constexpr int kWeights = kKeys + Pack<T>::kSize;  // a row of probabilities
};

// A sequence's keys of one head, of which [begin, end) may be read.
template <typename T>
struct KeySource {
  KvBlocks<T> kv;
  const int32_t* table;
  int64_t kv_head, begin, end;
};

// Starts copying tile `tile` to K and V; zeros for what is not there.
template <int kDim, int kThreads, typename T, typename Block>
ALIGNPRO_BODY void copy_key_tile(Block& block, const KeySource<T>& from, int64_t tile, T* to) {
  using Tile = KeyTile<T, kDim>;
  constexpr int kAcross = kDim / Pack<T>::kSize;
#pragma unroll
  for (int i = block.thread(); i < Tile::kKeys * kAcross; i += kThreads) {
    const int row = i / kAcross, along = i % kAcross * Pack<T>::kSize;
    const int64_t at = tile * Tile::kKeys + row;
    const bool live = at >= from.begin && at < from.end && along < from.kv.head_dim;
    const T* key = from.kv.base;
    if (live) {
      key = from.kv.key(from.table[at / ops::kKvBlock], from.kv_head, at % ops::kKvBlock) + along;
    }
    block.copy16(to + row * Tile::kLength + along, key, live);
    block.copy16(to + Tile::kSize + row * Tile::kLength + along,
                 key + (live ? from.kv.value_offset : 0), live);
  }
}

// A warp's 16 query rows: for the tensor cores in registers (kKept) or read again each time, in
// shared memory for FMA.
template <typename T, int kDim, bool kKept = true>
struct Queries;

template <int kDim, bool kKept>
struct Queries<Bfloat16, kDim, kKept> {
  uint32_t part[kKept ? kDim / 16 : 1][4];
  const Bfloat16* own;

  // rows: KeyTile::kLength apart.
  template <typename Block>
  ALIGNPRO_BODY void load(Block& block, const Bfloat16* rows) {
    const int lane = block.thread() % kWarp;
    const Bfloat16* at = rows + lane % 16 * KeyTile<Bfloat16, kDim>::kLength + lane / 16 * 8;
    own = at;
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) block.load_matrices(part[k], at + 16 * k);
    }
  }
  // Products with 8 kCount keys, each in ascending order of the lanes of a head.
  template <int kCount, typename Block>
  ALIGNPRO_BODY void multiply(Block& block, const Bfloat16* keys, float (&s)[kCount][4]) const {
    constexpr int kLength = KeyTile<Bfloat16, kDim>::kLength;
    const int lane = block.thread() % kWarp;
    const Bfloat16* at = keys + lane % 8 * kLength + lane / 8 * 8;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
    }
    // Registers are short where they are not kept.
    [[maybe_unused]] constexpr int kUnroll = kKept ? kDim / 32 : 1;
#pragma unroll kUnroll
    for (int k = 0; k < kDim / 32; ++k) {
      uint32_t right[kCount][4];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        block.load_matrices(right[j], at + 8 * j * kLength + 32 * k);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[4];
        if constexpr (kKept) {
#pragma unroll
          for (int i = 0; i < 4; ++i) left[i] = part[2 * k + half][i];
        } else {
          block.load_matrices(left, own + 16 * (2 * k + half));
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          block.multiply(s[j], left, right[j][2 * half], right[j][2 * half + 1]);
        }
      }
    }
  }
};

template <int kDim, bool kKept>
struct Queries<float, kDim, kKept> {
  const float* rows;

  template <typename Block>
  ALIGNPRO_BODY void load(Block&, const float* from) {
    rows = from;
  }
  template <int kCount, typename Block>
  ALIGNPRO_BODY void multiply(Block& block, const float* keys, float (&s)[kCount][4]) const {
    constexpr int kLength = KeyTile<float, kDim>::kLength;
    const int lane = block.thread() % kWarp;
    const float* q = rows + lane / 4 * kLength;
    const float* k = keys + lane % 4 * 2 * kLength;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
    }
#pragma unroll 4
    for (int i = 0; i < kDim; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[j][e] = std::fma(q[e / 2 * 8 * kLength + i], k[(8 * j + e % 2) * kLength + i], s[j][e]);
        }
      }
    }
  }
};

// Probabilities of a warp's rows for the keys of a tile, as the product with V takes them. Those of
// FMA go through `rows` [16][KeyTile::kWeights] of shared memory.
template <typename T, int kDim>
struct KeyWeights;

template <int kDim>
struct KeyWeights<Bfloat16, kDim> {
  using Tile = KeyTile<Bfloat16, kDim>;
  static constexpr bool kNeedsShared = false;
  uint32_t part[Tile::kKeys / 16][4];

  template <typename Block>
  ALIGNPRO_BODY void take(Block& block, const float (&p)[Tile::kKeys / 8][4], Bfloat16*) {
#pragma unroll
    for (int t = 0; t < Tile::kKeys / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        part[t][i] = block.round_pair(p[2 * t + i / 2][i % 2 * 2], p[2 * t + i / 2][i % 2 * 2 + 1]);
      }
    }
  }
  template <typename Block>
  ALIGNPRO_BODY void load(Block& block, const Bfloat16* rows) {
    const int lane = block.thread() % kWarp;
    const Bfloat16* at = rows + lane % 16 * Tile::kWeights + lane / 16 * 8;
#pragma unroll
    for (int t = 0; t < Tile::kKeys / 16; ++t) block.load_matrices(part[t], at + 16 * t);
  }
  // out[c] += of columns 16 (first + kStep c), and the sum of the weights, if wanted, to sum[0] and
  // sum[2].
  template <int kCount, int kStep, bool kSum = true, typename Block>
  ALIGNPRO_BODY void multiply(Block& block, const Bfloat16* values, int first,
                              float (&out)[kCount][2][4], float (&sum)[4]) const {
    constexpr uint32_t kOnes = 0x3f803f80u;
    const int lane = block.thread() % kWarp;
    const Bfloat16* at = values + lane % 16 * Tile::kLength + lane / 16 * 8 + 16 * first;
#pragma unroll
    for (int t = 0; t < Tile::kKeys / 16; ++t) {
      if constexpr (kSum) block.multiply(sum, part[t], kOnes, kOnes);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (first + kStep * c >= kDim / 16) break;
        uint32_t right[4];
        block.load_transposed(right, at + 16 * (t * Tile::kLength + kStep * c));
        block.multiply(out[c][0], part[t], right[0], right[1]);
        block.multiply(out[c][1], part[t], right[2], right[3]);
      }
    }
  }
};

template <int kDim>
struct KeyWeights<float, kDim> {
  using Tile = KeyTile<float, kDim>;
  static constexpr bool kNeedsShared = true;
  const float* rows;

  template <typename Block>
  ALIGNPRO_BODY void take(Block& block, const float (&p)[Tile::kKeys / 8][4], float* to) {
    const int lane = block.thread() % kWarp;
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[(lane / 4 + e / 2 * 8) * Tile::kWeights + 8 * j + lane % 4 * 2 + e % 2] = p[j][e];
      }
    }
    block.sync();
    rows = to;
  }
  template <typename Block>
  ALIGNPRO_BODY void load(Block&, const float* from) {
    rows = from;
  }
  template <int kCount, int kStep, bool kSum = true, typename Block>
  ALIGNPRO_BODY void multiply(Block& block, const float* values, int first,
                              float (&out)[kCount][2][4], float (&sum)[4]) const {
    const int lane = block.thread() % kWarp;
    const float* own = rows + lane / 4 * Tile::kWeights;
#pragma unroll 2
    for (int key = 0; key < Tile::kKeys; ++key) {
      const float p[2] = {own[key], own[8 * Tile::kWeights + key]};
      if constexpr (kSum) {
        for (int h = 0; h < 2; ++h) sum[2 * h] += p[h];
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (first + kStep * c >= kDim / 16) break;
        const float* v = values + key * Tile::kLength + 16 * (first + kStep * c) + lane % 4 * 2;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          out[c][e / 4][e % 4] = std::fma(p[e % 4 / 2], v[e / 4 * 8 + e % 2], out[c][e / 4][e % 4]);
        }
      }
    }
  }
};

// The softmax of a thread's two rows over the tiles of a chunk so far.
struct RunningSoftmax {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[4] = {};  // of row h in [2 h]

  // What the outputs so far are multiplied by, now that `next` joins row h's scores.
  ALIGNPRO_BODY float advance(int h, float next) {
    const float top = Larger()(max[h], next);
    const float keep = top == -INFINITY ? 1.0f : std::exp(max[h] - top);
    max[h] = top;
    return keep;
  }
  ALIGNPRO_BODY float weight(int h, float score) const {
    return score == -INFINITY ? 0.0f : std::exp(score - max[h]);
  }
  // Takes the factors of both rows to the sums and `out`.
  template <int kCount>
  ALIGNPRO_BODY void rescale(const float (&keep)[2], float (&out)[kCount][2][4]) {
    if (keep[0] == 1.0f && keep[1] == 1.0f) return;  // a factor of 1 changes no bit
    for (int h = 0; h < 2; ++h) sum[2 * h] *= keep[h];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
#pragma unroll
      for (int e = 0; e < 8; ++e) out[c][e / 4][e % 4] *= keep[e % 4 / 2];
    }
  }
  ALIGNPRO_BODY float inverse(int h) const { return sum[2 * h] == 0.0f ? 0.0f : 1.0f / sum[2 * h]; }
};

// Keys that a row sees: [first, last], relative to a tile.
struct Visible {
  int first;
  unsigned span;  // last - first

  ALIGNPRO_HOST_DEVICE Visible(int64_t position, int64_t sliding_window, int64_t tile_key) {
    const int64_t from = ops::first_visible(position, sliding_window);
    first = static_cast<int>(from - tile_key);
    span = static_cast<unsigned>(position - from);
  }
  ALIGNPRO_HOST_DEVICE bool operator()(int key) const {
    return static_cast<unsigned>(key - first) <= span;
  }
};

}  // namespace alignpro::cuda
