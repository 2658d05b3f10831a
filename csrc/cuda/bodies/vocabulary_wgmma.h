#pragma once

// The vocabulary projection by the tiles of wgmma_tile.h, which hold one or two tiles of 128 tokens
// as vocabulary.h has them: the same statistics in the same places, so that what joins tiles is the
// same. A row's statistics of a tile lie in one quad of lanes: each lane's 32 tokens in ascending
// order, then the quad by butterfly.

#include <cmath>
#include <cstdint>

#include "vocabulary.h"
#include "wgmma_tile.h"

namespace alignpro::cuda {

// Of the reference's logits: not wanted; from a weight of their own, in a product that follows; or
// from the same weight, in the same pass.
enum class Reference { kNone, kApart, kShared };

template <typename Map>
struct VocabularyWgmma {
  Map hidden, weight, ref_hidden, ref_weight;  // the last two where there is a reference
  int box_rows;                                // of hidden and ref_hidden
  Vocabulary<Bfloat16> v;
};

// Where tile_stats puts what it measures.
struct MeasuredTiles {
  const SampleRow* draws;
  int64_t first;  // row of stats and logits
  ops::TileStats* stats;
  float *logit, *ref_logit, *logits;
};

// Statistics of one row of a tile from four lanes' sums [j][2 h + e], which become its logits:
// scaled, and -inf past the vocabulary.
template <typename Tile, bool kRef, typename Block>
ALIGNPRO_BODY void measure_row(Block& block, const Vocabulary<Bfloat16>& v, const MeasuredTiles& to,
                               int64_t row, int64_t token, int h, float (*z)[4], float (*r)[4]) {
  constexpr int kEights = kTile / 8;
  const WgmmaShare<Tile> share(block.thread());
  const bool live = row < v.hidden.rows;
  const int64_t tiles = vocabulary_tiles(v.weight.rows), tile = token / kTile;
  const float own = live && to.draws != nullptr ? inverse_temperature(to.draws[row]) : 1.0f;
  float max = -INFINITY, ref_max = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = share.column + 8 * j + e;
      const bool known = token + c < v.weight.rows;
      float& logit = z[j][2 * h + e];
      logit = known ? logit * v.inv_temperature * own : -INFINITY;
      max = Larger()(max, logit);
      if constexpr (kRef) {
        float& ref = r[j][2 * h + e];
        ref = known ? ref * v.inv_temperature : -INFINITY;
        ref_max = Larger()(ref_max, ref);
      }
    }
  }
  if (live && to.logits != nullptr) {
    float* line = to.logits + ((row - to.first) * tiles + tile) * kTile + share.column;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      line[8 * j] = z[j][2 * h];
      line[8 * j + 1] = z[j][2 * h + 1];
    }
  }
  if (live && v.tokens != nullptr) {
    const int64_t chosen = v.tokens[row] - token - share.column;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (chosen != 8 * j + e) continue;
        to.logit[row] = z[j][2 * h + e];
        if constexpr (kRef) to.ref_logit[row] = r[j][2 * h + e];
      }
    }
  }
  max = reduce_lanes(block, max, 4, Larger());
  if constexpr (kRef) ref_max = reduce_lanes(block, ref_max, 4, Larger());
  ops::TileStats part = ops::open_tile(max, ref_max);
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (kRef) {
        ops::add_logit(z[j][2 * h + e], r[j][2 * h + e], &part);
      } else {
        ops::add_logit(z[j][2 * h + e], &part);
      }
    }
  }
  part.sum = reduce_lanes(block, part.sum, 4, Add());
  part.sum_z = reduce_lanes(block, part.sum_z, 4, Add());
  if constexpr (kRef) {
    part.ref_sum = reduce_lanes(block, part.ref_sum, 4, Add());
    part.sum_cross = reduce_lanes(block, part.sum_cross, 4, Add());
    part.ref_cross = reduce_lanes(block, part.ref_cross, 4, Add());
  }
  if (live && block.thread() % 4 == 0) to.stats[(row - to.first) * tiles + tile] = part;
}

// Tiles block_index, block_index + blocks, ... of rows [to.first, v.hidden.rows).
template <typename Tile, Reference kReference, typename Block>
ALIGNPRO_BODY void measure_wgmma_tiles(Block& block,
                                       const VocabularyWgmma<typename Block::Map>& args,
                                       const MeasuredTiles& to, int64_t block_index, int64_t blocks,
                                       unsigned char* shared) {
  constexpr bool kRef = kReference != Reference::kNone;
  static_assert(Tile::kColumns % kTile == 0 && (Tile::kColumns == kTile || !kRef));
  const Vocabulary<Bfloat16>& v = args.v;
  const int64_t depth = v.hidden.depth;
  const TileOrder order{(v.hidden.rows - to.first + Tile::kRows - 1) / Tile::kRows,
                        (v.weight.rows + Tile::kColumns - 1) / Tile::kColumns};
  const WgmmaShare<Tile> share(block.thread());
  Ring<Tile> ring = make_ring<Tile>(block, shared);
  share_registers<Tile>(block, share.produces);
  if (share.produces) {
    if (!share.copies) return;
    for (int64_t tile = block_index; tile < order.count(); tile += blocks) {
      int64_t row, column;
      order.at(tile, &row, &column);
      row = to.first + row * Tile::kRows;
      column *= Tile::kColumns;
      if constexpr (kReference == Reference::kShared) {
        copy_operands(block, ring, row, column, depth, args.box_rows, args.weight, args.hidden,
                      args.ref_hidden);
      } else {
        copy_operands(block, ring, row, column, depth, args.box_rows, args.weight, args.hidden);
      }
      if constexpr (kReference == Reference::kApart) {
        copy_operands(block, ring, row, column, v.ref_hidden.depth, args.box_rows, args.ref_weight,
                      args.ref_hidden);
      }
    }
    return;
  }
  for (int64_t tile = block_index; tile < order.count(); tile += blocks) {
    int64_t row, column;
    order.at(tile, &row, &column);
    row = to.first + row * Tile::kRows + share.row;
    column *= Tile::kColumns;
    typename Tile::Sums z, r;
    clear(z);
    if constexpr (kRef) clear(r);
    if constexpr (kReference == Reference::kShared) {
      multiply_operands(block, ring, depth, z, r);
    } else {
      multiply_operands(block, ring, depth, z);
    }
    if constexpr (kReference == Reference::kApart) {
      multiply_operands(block, ring, v.ref_hidden.depth, r);
    }
#pragma unroll
    for (int part = 0; part < Tile::kColumns / kTile; ++part) {
      const int64_t token = column + part * kTile;
      if (token >= v.weight.rows) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        measure_row<Tile, kRef>(block, v, to, row + 8 * h, token, h, z + part * (kTile / 8), r);
      }
    }
  }
}

// draw_by_tiles of one row: all threads of the block come. logits: shared, kTile values.
template <typename Tile, typename Block>
ALIGNPRO_BODY void draw_wgmma_row(Block& block, int64_t row,
                                  const VocabularyWgmma<typename Block::Map>& args,
                                  const SampleRow& how, const ops::TileStats* stats,
                                  int32_t* tokens, float* logprobs, double* masses, float* logits,
                                  RowShared& row_shared, unsigned char* shared) {
  static_assert(Tile::kGroups == 1 && Tile::kColumns == kTile);
  const Vocabulary<Bfloat16>& v = args.v;
  Ring<Tile> ring = make_ring<Tile>(block, shared);
  const auto logits_of = [&](int64_t tile) {
    const WgmmaShare<Tile> share(block.thread());
    if (share.copies) {
      copy_operands(block, ring, row, tile * kTile, v.hidden.depth, args.box_rows, args.weight,
                    args.hidden);
    } else if (!share.produces) {
      typename Tile::Sums z;
      clear(z);
      multiply_operands(block, ring, v.hidden.depth, z);
      if (share.row == 0) {
#pragma unroll
        for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = share.column + 8 * j + e;
            logits[c] = tile * kTile + c < v.weight.rows
                            ? z[j][e] * v.inv_temperature * inverse_temperature(how)
                            : -INFINITY;
          }
        }
      }
    }
    block.sync();
    return logits;
  };
  draw_by_tiles(block, row, v.weight.rows, how, stats, tokens, logprobs, masses, row_shared,
                logits_of);
}

}  // namespace alignpro::cuda
