#pragma once

// One block a row, KV head and chunk of 512 positions; chunks begin at multiples of 512 and are
// joined in ascending order, so a row's bits depend on its position, window and keys alone.
//
// Eight lanes share a key and all the query heads of its group; then a warp takes a head's softmax;
// then strands of threads each sum every n-th value row, and are added pairwise.

#include <cmath>
#include <cstdint>

#include "../ops.h"
#include "alignpro/ops/shared/attention_rows.h"
#include "rows.h"

namespace alignpro::cuda {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeChunk = 512;
inline constexpr int kLanesPerKey = 8;

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
};

struct DecodeShared {
  float q[kMaxGroup * kMaxHeadDim];
  float scores[kMaxGroup][kDecodeChunk];
  float max[kMaxGroup], sum[kMaxGroup];
  float sums[kDecodeThreads / 2 * kMaxGroup * 8];  // half of the strands' outputs
};

template <typename T, typename Block>
ALIGNPRO_BODY void attention_decode_chunk(Block& block, int64_t row, int64_t kv_head, int64_t chunk,
                                          const AttentionDecode<T>& args, DecodeShared& shared) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t position = args.positions[row];
  const int64_t first_key = ops::first_visible(position, args.sliding_window);
  const int64_t begin = chunk * kDecodeChunk;
  if (begin > position || begin + kDecodeChunk <= first_key) return;
  const int first = static_cast<int>(first_key > begin ? first_key - begin : 0);
  const int end =
      static_cast<int>(position + 1 - begin < kDecodeChunk ? position + 1 - begin : kDecodeChunk);
  const int d = static_cast<int>(args.kv.head_dim), group = args.group, packs = d / kPack;
  const int thread = block.thread();
  const int32_t* table = args.block_table + row * args.table_ld;

  const T* q = args.q.data + row * args.q.ld + kv_head * group * d;
  for (int i = thread; i < group * d; i += kDecodeThreads) shared.q[i] = to_float(q[i]);
  block.sync();

  const int lane = thread % kLanesPerKey;
  for (int base = first / kLanesPerKey * kLanesPerKey; base < end;
       base += kDecodeThreads / kLanesPerKey) {
    const int key = base + thread / kLanesPerKey;
    const bool live = key >= first && key < end;
    float dot[kMaxGroup] = {};
    if (live) {
      const int64_t at = begin + key;
      const auto* k = reinterpret_cast<const Pack<T>*>(
          args.kv.key(table[at / ops::kKvBlock], kv_head, at % ops::kKvBlock));
      for (int p = lane; p < packs; p += kLanesPerKey) {
        const Pack<T> pack = k[p];
#pragma unroll
        for (int g = 0; g < kMaxGroup; ++g) {
          if (g >= group) break;
          const float* with = shared.q + g * d + p * kPack;
          for (int e = 0; e < kPack; ++e) {
            dot[g] = std::fma(with[e], to_float(pack.value[e]), dot[g]);
          }
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kMaxGroup; ++g) {
      const float score = reduce_lanes(block, dot[g], kLanesPerKey, Add()) * args.scale;
      if (lane == g && g < group && key < kDecodeChunk) {
        shared.scores[g][key] = live ? score : -INFINITY;
      }
    }
  }
  block.sync();

  const int from = first / kWarp * kWarp, warp_lane = thread % kWarp;
  for (int g = thread / kWarp; g < group; g += kDecodeThreads / kWarp) {
    float* scores = shared.scores[g];
    float max = -INFINITY;
    for (int j = from + warp_lane; j < end; j += kWarp) {
      if (j >= first) max = Larger()(max, scores[j]);
    }
    max = reduce_lanes(block, max, kWarp, Larger());
    const float top = max == -INFINITY ? 0.0f : max;
    float sum = 0.0f;
    for (int j = from + warp_lane; j < end; j += kWarp) {
      if (j < first) continue;
      scores[j] = std::exp(scores[j] - top);
      sum += scores[j];
    }
    sum = reduce_lanes(block, sum, kWarp, Add());
    if (warp_lane == 0) {
      shared.max[g] = max;
      shared.sum[g] = sum;
    }
  }
  block.sync();

  int strands = 1;
  while (strands * 2 * packs <= kDecodeThreads) strands *= 2;
  const int strand = thread / packs, column = thread % packs;
  float out[kMaxGroup][kPack] = {};
  if (strand < strands) {
    for (int key = first + strand; key < end; key += strands) {
      const int64_t at = begin + key;
      const Pack<T> v = reinterpret_cast<const Pack<T>*>(
          args.kv.value(table[at / ops::kKvBlock], kv_head, at % ops::kKvBlock))[column];
#pragma unroll
      for (int g = 0; g < kMaxGroup; ++g) {
        if (g >= group) break;
        const float p = shared.scores[g][key];
        for (int e = 0; e < kPack; ++e) out[g][e] = std::fma(p, to_float(v.value[e]), out[g][e]);
      }
    }
  }
  for (int half = strands / 2; half > 0; half /= 2) {
    if (strand >= half && strand < 2 * half) {
      float* to = shared.sums + ((strand - half) * packs + column) * group * kPack;
#pragma unroll
      for (int g = 0; g < kMaxGroup; ++g) {
        if (g >= group) break;
        for (int e = 0; e < kPack; ++e) to[g * kPack + e] = out[g][e];
      }
    }
    block.sync();
    if (strand < half) {
      const float* other = shared.sums + (strand * packs + column) * group * kPack;
#pragma unroll
      for (int g = 0; g < kMaxGroup; ++g) {
        if (g >= group) break;
        for (int e = 0; e < kPack; ++e) out[g][e] += other[g * kPack + e];
      }
    }
    block.sync();
  }
  if (strand != 0) return;
#pragma unroll
  for (int g = 0; g < kMaxGroup; ++g) {
    if (g >= group) break;
    float* to = args.partial_of(row, kv_head, chunk, g);
    const float sum = shared.sum[g], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (column == 0) {
      to[0] = shared.max[g];
      to[1] = sum;
    }
    for (int e = 0; e < kPack; ++e) to[2 + column * kPack + e] = out[g][e] * inverse;
  }
}

// Joins a row's chunks for one KV head. No key above -inf: no softmax, NaN, as on the CPU.
template <typename T, typename Block>
ALIGNPRO_BODY void attention_decode_join(Block& block, int64_t row, int64_t kv_head,
                                         const AttentionDecode<T>& args) {
  const int64_t position = args.positions[row], d = args.kv.head_dim;
  const int64_t first = ops::first_visible(position, args.sliding_window) / kDecodeChunk;
  for (int64_t i = block.thread(); i < args.group * d; i += block.threads()) {
    const int64_t g = i / d, column = i % d;
    float max = -INFINITY, sum = 0.0f, out = 0.0f;
    for (int64_t chunk = first; chunk <= position / kDecodeChunk; ++chunk) {
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
