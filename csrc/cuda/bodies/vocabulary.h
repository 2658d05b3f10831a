#pragma once

// The vocabulary projection by tiles of 128 rows x 128 tokens, fused with what consumes it:
// statistics, gradients, draws. linear_logprob and head_sample run these same tiles, so that the
// log-probability of a drawn token is the scored one, to the bit (contracts 1 and 2).
//
// A row's statistics of a tile: quads of lanes by butterfly, then the four warps beside each other
// in ascending order, then tiles in a tree over the block, in double.

#include <cmath>
#include <cstdint>

#include "../ops.h"
#include "alignpro/ops/shared/row_softmax.h"
#include "alignpro/ops/shared/sampling.h"
#include "tile_product.h"

namespace alignpro::cuda {

inline constexpr int kRowThreads = 128;  // of the bodies that take one row

ALIGNPRO_HOST_DEVICE inline int64_t vocabulary_tiles(int64_t vocab) {
  return (vocab + kTile - 1) / kTile;
}

template <typename T>
struct Vocabulary {
  Operand<T> hidden, weight;          // rows x cols, vocabulary x cols
  Operand<T> ref_hidden, ref_weight;  // where kRef
  float inv_temperature;
  const int32_t* tokens;  // [rows]; null: none
};

struct ShareStats {
  float max[kTile][4], ref_max[kTile][4];
  ops::TileStats stats[kTile][4];
};

// Scaled logits of a tile; -inf past the vocabulary.
template <bool kRef, typename T, typename Block>
ALIGNPRO_BODY void tile_logits(Block& block, const Vocabulary<T>& v, int64_t row, int64_t token,
                               void* shared, Sums& z, Sums& r) {
  tile_product(block, v.hidden, row, v.weight, token, shared, z);
  if constexpr (kRef) tile_product(block, v.ref_hidden, row, v.ref_weight, token, shared, r);
  for_share(Share(block.thread()), [&](int, int c, int i, int j, int e) {
    const bool live = token + c < v.weight.rows;
    z[i][j][e] = live ? z[i][j][e] * v.inv_temperature : -INFINITY;
    if constexpr (kRef) r[i][j][e] = live ? r[i][j][e] * v.inv_temperature : -INFINITY;
  });
}

// Statistics of rows [row, row + 128) over tokens [128 tile, 128 tile + 128): stats [rows][tiles],
// and the logits of the rows' own tokens where they lie in the tile; all logits where wanted,
// [rows][tiles][kTile]. draws: whose temperatures
// count instead of v's, or null. first_row: of stats.
template <bool kRef, typename T, typename Block>
ALIGNPRO_BODY void tile_stats(Block& block, const Vocabulary<T>& v, const SampleRow* draws,
                              int64_t row, int64_t tile, int64_t first_row, ops::TileStats* stats,
                              float* logit, float* ref_logit, float* logits, void* shared) {
  Sums z, r;
  const int64_t token = tile * kTile, tiles = vocabulary_tiles(v.weight.rows);
  tile_logits<kRef>(block, v, row, token, shared, z, r);
  const Share share(block.thread());
  if (draws != nullptr) {
    for_share(share, [&](int m, int c, int i, int j, int e) {
      if (row + m < v.hidden.rows && token + c < v.weight.rows) {
        z[i][j][e] *= inverse_temperature(draws[row + m]);
      }
    });
  }
  if (logits != nullptr) {
    for_share(share, [&](int m, int c, int i, int j, int e) {
      if (row + m >= v.hidden.rows) return;
      logits[((row - first_row + m) * tiles + tile) * kTile + c] = z[i][j][e];
    });
  }
  if (v.tokens != nullptr) {
    for_share(share, [&](int m, int c, int i, int j, int e) {
      if (row + m >= v.hidden.rows || v.tokens[row + m] != token + c) return;
      logit[row + m] = z[i][j][e];
      if constexpr (kRef) ref_logit[row + m] = r[i][j][e];
    });
  }
  auto& own = *static_cast<ShareStats*>(shared);
  const bool leads = block.thread() % 4 == 0;
#pragma unroll
  for (int at = 0; at < 8; ++at) {
    const int i = at / 2, h = at % 2, m = share.row + 16 * i + 8 * h;
    float max = -INFINITY, ref_max = -INFINITY;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      max = Larger()(max, z[i][k / 2][2 * h + k % 2]);
      if constexpr (kRef) ref_max = Larger()(ref_max, r[i][k / 2][2 * h + k % 2]);
    }
    max = reduce_lanes(block, max, 4, Larger());
    if constexpr (kRef) ref_max = reduce_lanes(block, ref_max, 4, Larger());
    if (leads) {
      own.max[m][share.warp_column] = max;
      own.ref_max[m][share.warp_column] = ref_max;
    }
  }
  block.sync();
#pragma unroll
  for (int at = 0; at < 8; ++at) {
    const int i = at / 2, h = at % 2, m = share.row + 16 * i + 8 * h;
    float max = own.max[m][0], ref_max = own.ref_max[m][0];
    for (int w = 1; w < 4; ++w) {
      max = Larger()(max, own.max[m][w]);
      ref_max = Larger()(ref_max, own.ref_max[m][w]);
    }
    ops::TileStats part = ops::open_tile(max, ref_max);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if constexpr (kRef) {
        ops::add_logit(z[i][k / 2][2 * h + k % 2], r[i][k / 2][2 * h + k % 2], &part);
      } else {
        ops::add_logit(z[i][k / 2][2 * h + k % 2], &part);
      }
    }
    part.sum = reduce_lanes(block, part.sum, 4, Add());
    part.sum_z = reduce_lanes(block, part.sum_z, 4, Add());
    if constexpr (kRef) {
      part.ref_sum = reduce_lanes(block, part.ref_sum, 4, Add());
      part.sum_cross = reduce_lanes(block, part.sum_cross, 4, Add());
      part.ref_cross = reduce_lanes(block, part.ref_cross, 4, Add());
    }
    if (leads) own.stats[m][share.warp_column] = part;
  }
  block.sync();
  const int m = block.thread();
  if (m < kTile && row + m < v.hidden.rows) {
    ops::TileStats all = own.stats[m][0];
    for (int w = 1; w < 4; ++w) ops::add_columns(own.stats[m][w], &all);
    stats[(row - first_row + m) * tiles + tile] = all;
  }
}

struct RowShared {
  float floats[kMaxWarps];
  double doubles[kMaxWarps];
  int ints[kMaxWarps];
};

// A row's softmax from its tiles; the same for every thread, and, by the first kRowThreads alone,
// for a block of any size: drawn and scored rows are merged by different ones.
template <typename Block>
ALIGNPRO_BODY ops::RowStats merge_row(Block& block, const ops::TileStats* stats, int64_t tiles,
                                      RowShared& shared) {
  const int64_t first = block.thread() < kRowThreads ? block.thread() : tiles;
  float max = -INFINITY, ref_max = -INFINITY;
  for (int64_t t = first; t < tiles; t += kRowThreads) {
    max = Larger()(max, stats[t].max);
    ref_max = Larger()(ref_max, stats[t].ref_max);
  }
  max = reduce_block(block, max, shared.floats, Larger());
  ref_max = reduce_block(block, ref_max, shared.floats, Larger());
  ops::RowSums sums;
  for (int64_t t = first; t < tiles; t += kRowThreads) {
    ops::add_tile(stats[t], max, ref_max, &sums);
  }
  sums.sum = reduce_block(block, sums.sum, shared.doubles, Add());
  sums.sum_z = reduce_block(block, sums.sum_z, shared.doubles, Add());
  sums.ref_sum = reduce_block(block, sums.ref_sum, shared.doubles, Add());
  sums.cross = reduce_block(block, sums.cross, shared.doubles, Add());
  sums.ref_cross = reduce_block(block, sums.ref_cross, shared.doubles, Add());
  return ops::finish_row(sums, max, ref_max);
}

// stats: of the row. Where there is no finite softmax, NaN; for a token outside the vocabulary its
// log-probabilities are.
template <typename Block>
ALIGNPRO_BODY void finish_logprob_row(Block& block, int64_t row, const ops::TileStats* stats,
                                      int64_t vocab, const int32_t* tokens, const float* logit,
                                      const float* ref_logit, bool with_ref,
                                      const LogprobOutput& out, RowShared& shared) {
  const ops::RowStats s = merge_row(block, stats, vocabulary_tiles(vocab), shared);
  if (block.thread() != 0) return;
  const bool valid = s.valid() && (!with_ref || std::isfinite(s.ref_lse));
  const bool known = valid && tokens[row] >= 0 && tokens[row] < vocab;
  const ops::RowValues values =
      ops::row_values(s, known ? logit[row] : NAN, known && with_ref ? ref_logit[row] : NAN);
  out.logprob[row] = values.logprob;
  out.entropy[row] = valid ? values.entropy : NAN;
  out.lse[row] = valid ? s.lse : NAN;
  if (!with_ref) return;
  out.kl[row] = valid ? values.kl : NAN;
  out.reverse_kl[row] = valid ? values.reverse_kl : NAN;
  out.ref_logprob[row] = values.ref_logprob;
  out.ref_lse[row] = valid ? s.ref_lse : NAN;
}

// d loss / d z of a tile, times the inverse temperature, to dz [rows][ld], whose first column is
// token `first_token`. Zero past the vocabulary.
template <bool kRef, typename T, typename Block>
ALIGNPRO_BODY void tile_gradient(Block& block, const Vocabulary<T>& v,
                                 const ops::RowGradient* gradients, int64_t row, int64_t tile,
                                 int64_t first_token, T* dz, int64_t ld, void* shared) {
  Sums z, r;
  const int64_t token = tile * kTile;
  tile_logits<kRef>(block, v, row, token, shared, z, r);
  for_share(Share(block.thread()), [&](int m, int c, int i, int j, int e) {
    if (row + m >= v.hidden.rows) return;
    const ops::RowGradient& g = gradients[row + m];
    float ref = 0.0f;
    if constexpr (kRef) ref = r[i][j][e];
    float d = ops::logit_gradient(g, kRef, z[i][j][e], ref);
    if (g.token == token + c) d += g.d_logprob;
    dz[(row + m) * ld + token - first_token + c] = stored<T>(d * v.inv_temperature);
  });
}

// What a tile holds of a row's total variation.
struct VariationPart {
  float variation, mass_above;
};

// parts [rows][tiles] of rows [row, row + 128), given the rows' normalisers; summed as tile_stats.
template <typename T, typename Block>
ALIGNPRO_BODY void tile_variation(Block& block, const Vocabulary<T>& v,
                                  const ops::RowGradient* gradients, int64_t row, int64_t tile,
                                  int64_t first_row, VariationPart* parts, void* shared) {
  Sums z, r;
  tile_logits<true>(block, v, row, tile * kTile, shared, z, r);
  const Share share(block.thread());
  auto* own = static_cast<VariationPart(*)[4]>(shared);
#pragma unroll
  for (int at = 0; at < 8; ++at) {
    const int i = at / 2, h = at % 2, m = share.row + 16 * i + 8 * h;
    VariationPart part = {0.0f, 0.0f};
    if (row + m < v.hidden.rows) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        ops::add_variation(gradients[row + m], z[i][k / 2][2 * h + k % 2],
                           r[i][k / 2][2 * h + k % 2], &part.variation, &part.mass_above);
      }
    }
    part.variation = reduce_lanes(block, part.variation, 4, Add());
    part.mass_above = reduce_lanes(block, part.mass_above, 4, Add());
    if (block.thread() % 4 == 0) own[m][share.warp_column] = part;
  }
  block.sync();
  const int m = block.thread();
  if (m >= kTile || row + m >= v.hidden.rows) return;
  VariationPart all = own[m][0];
  for (int w = 1; w < 4; ++w) {
    all.variation += own[m][w].variation;
    all.mass_above += own[m][w].mass_above;
  }
  parts[(row - first_row + m) * vocabulary_tiles(v.weight.rows) + tile] = all;
}

// parts: of the row. NaN where a softmax is not finite.
template <typename Block>
ALIGNPRO_BODY void finish_variation_row(Block& block, int64_t row, const VariationPart* parts,
                                        int64_t tiles, const LogprobOutput& forward, float* tv,
                                        float* mass_above, RowShared& shared) {
  double variation = 0.0, mass = 0.0;
  for (int64_t t = block.thread(); t < tiles; t += block.threads()) {
    variation += parts[t].variation;
    mass += parts[t].mass_above;
  }
  variation = reduce_block(block, variation, shared.doubles, Add());
  mass = reduce_block(block, mass, shared.doubles, Add());
  if (block.thread() != 0) return;
  const bool valid = std::isfinite(forward.lse[row]) && std::isfinite(forward.ref_lse[row]);
  tv[row] = valid ? static_cast<float>(variation < 1.0 ? variation : 1.0) : NAN;
  mass_above[row] = valid ? static_cast<float>(mass) : NAN;
}

// A draw from a row whose tiles are measured: the tile by inversion over tiles, then its logits
// again, then the token within. logits_of(tile): kTile of them in shared memory, there for all,
// with the bits that were measured. masses: shared, `tiles` doubles.
template <typename Block, typename LogitsOf>
ALIGNPRO_BODY void draw_by_tiles(Block& block, int64_t row, int64_t vocab, const SampleRow& how,
                                 const ops::TileStats* stats, int32_t* tokens, float* logprobs,
                                 double* masses, RowShared& row_shared, const LogitsOf& logits_of) {
  const int64_t tiles = vocabulary_tiles(vocab);
  const ops::RowStats s = merge_row(block, stats, tiles, row_shared);
  if (!s.valid()) {
    if (block.thread() == 0) {
      tokens[row] = -1;
      logprobs[row] = NAN;
    }
    return;
  }
  const bool greedy = how.temperature == 0.0f;
  const auto top = static_cast<float>(s.max);
  int first = static_cast<int>(tiles);  // of the tiles that hold the maximum
  for (int64_t t = block.thread(); t < tiles; t += block.threads()) {
    if (stats[t].max == top && t < first) first = static_cast<int>(t);
    masses[t] = stats[t].sum > 0.0f ? stats[t].sum * std::exp(stats[t].max - s.max) : 0.0;
  }
  int64_t tile = reduce_block(block, first, row_shared.ints, Smaller());
  double below = 0.0;
  const double target = how.uniform * s.sum;
  if (!greedy) {  // every thread walks the same masses to the same tile
    tile = ops::invert(tiles, target, [&](int64_t t) { return masses[t]; }, &below);
  }
  if (tile < 0 || tile >= tiles) {  // a defect: a valid row has a largest tile, with mass
    if (block.thread() == 0) {
      tokens[row] = -1;
      logprobs[row] = NAN;
    }
    return;
  }
  const float* logits = logits_of(tile);
  if (block.thread() != 0) return;
  int64_t column = 0;
  if (greedy) {
    while (column + 1 < kTile && logits[column] != top) ++column;
  } else {
    const float tile_max = stats[tile].max;
    const double scale = std::exp(tile_max - s.max);
    column = ops::invert(kTile, target - below,
                         [&](int64_t c) { return std::exp(logits[c] - tile_max) * scale; });
    if (column < 0) column = 0;  // a defect: the tile was found by its mass
  }
  tokens[row] = static_cast<int32_t>(tile * kTile + column);
  logprobs[row] = static_cast<float>(logits[column] - s.lse);
}

// shared: kProductBytes<T>.
template <typename T, typename Block>
ALIGNPRO_BODY void draw_row(Block& block, int64_t row, const Vocabulary<T>& v, const SampleRow& how,
                            const ops::TileStats* stats, int32_t* tokens, float* logprobs,
                            double* masses, RowShared& row_shared, void* shared) {
  const auto logits_of = [&](int64_t tile) {
    Vocabulary<T> one = v;
    one.hidden.data += row * one.hidden.ld;
    one.hidden.rows = 1;
    Sums z, unused;
    tile_logits<false>(block, one, 0, tile * kTile, shared, z, unused);
    auto* logits = static_cast<float*>(shared);
    for_share(Share(block.thread()), [&](int m, int c, int i, int j, int e) {
      if (m == 0)
        logits[c] =
            tile * kTile + c < v.weight.rows ? z[i][j][e] * inverse_temperature(how) : -INFINITY;
    });
    block.sync();
    return logits;
  };
  draw_by_tiles(block, row, v.weight.rows, how, stats, tokens, logprobs, masses, row_shared,
                logits_of);
}

}  // namespace alignpro::cuda
