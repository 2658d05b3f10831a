#pragma once

// A draw under top_k, top_p, min_p and bans, from a row's stored logits. What each of them leaves
// are the best tokens in one order (larger logit, then lower id), so that all come down to the
// least key that is kept. It is found from the top, three bits a pass. Probabilities are summed as
// integers, 2^62 being 1: the same sum in any order.

#include <cmath>
#include <cstdint>

#include "vocabulary.h"

namespace alignpro::cuda {

inline constexpr int kDrawThreads = 256;

struct TruncatedShared {
  RowShared row;
  uint64_t sums[kMaxWarps][8];
};

// Sums of eight values over the block; every thread gets them.
template <typename Block>
ALIGNPRO_BODY void sum_eight(Block& block, uint64_t (&values)[8], TruncatedShared& shared) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const uint64_t sum = reduce_lanes(block, values[b], kWarp, Add());
    if (block.thread() % kWarp == 0) shared.sums[block.thread() / kWarp][b] = sum;
  }
  block.sync();
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    values[b] = 0;
    for (int w = 0; w < block.threads() / kWarp; ++w) values[b] += shared.sums[w][b];
  }
  block.sync();
}

// The largest key such that the weights of keys from it on reach `wanted`; 0 where all of them do
// not.
template <typename Block, typename Weight>
ALIGNPRO_BODY uint64_t least_kept(Block& block, const float* logits, int64_t vocab, uint64_t wanted,
                                  const Weight& weight, TruncatedShared& shared) {
  uint64_t key = 0, above = 0;  // above: of keys whose leading bits are larger
  for (int shift = 51; shift >= 0; shift -= 3) {
    uint64_t sums[8] = {};  // of keys that agree so far and whose next three bits are >= b
    for (int64_t i = block.thread(); i < vocab; i += block.threads()) {
      const float z = logits[i];
      const uint64_t own = ops::preference_key(z, i);
      if (z == -INFINITY || own >> shift >> 3 != key >> shift >> 3) continue;
      const int digit = static_cast<int>(own >> shift & 7);
      const uint64_t w = weight(z);
#pragma unroll
      for (int b = 0; b < 8; ++b) sums[b] += digit >= b ? w : 0;
    }
    sum_eight(block, sums, shared);
    if (above + sums[0] < wanted) return 0;
    int digit = 0;
#pragma unroll
    for (int b = 1; b < 8; ++b) digit = above + sums[b] >= wanted ? b : digit;
    uint64_t larger = 0;
#pragma unroll
    for (int b = 1; b < 8; ++b) larger = digit == b - 1 ? sums[b] : larger;
    above += larger;
    key |= static_cast<uint64_t>(digit) << shift;
  }
  return key;
}

ALIGNPRO_HOST_DEVICE inline bool is_truncated(const SampleRow& how) {
  return ops::truncates(how, how.ban_count);
}

// Whether draw_row draws the row. Else it is draw_truncated_row's, or, where truncation was asked
// for and no logits were kept, has no token.
template <typename Block>
ALIGNPRO_BODY bool is_plain(Block& block, int64_t row, const SampleRow& how, bool with_truncation,
                            int32_t* tokens, float* logprobs, float* kept_mass) {
  const bool truncated = is_truncated(how);
  if (truncated && with_truncation) return false;
  if (block.thread() == 0) {
    if (kept_mass != nullptr) kept_mass[row] = 1.0f;
    if (truncated) {
      tokens[row] = -1;
      logprobs[row] = NAN;
    }
  }
  return !truncated;
}

// logits [vocab] at the row's temperature, of which the banned become -inf. masses: shared, one a
// tile. Nothing left to draw: token -1 and NaN.
template <typename Block>
ALIGNPRO_BODY void draw_truncated_row(Block& block, int64_t row, const SampleRow& request,
                                      const ops::TileStats* stats, int64_t vocab, float* logits,
                                      const int32_t* banned, int32_t* tokens, float* logprobs,
                                      float* kept_mass, double* masses, TruncatedShared& shared) {
  const int64_t tiles = vocabulary_tiles(vocab);
  const ops::RowStats s = merge_row(block, stats, tiles, shared.row);
  const int thread = block.thread(), lane = thread % kWarp;
  const bool greedy = request.temperature == 0.0f;  // to the best token that is allowed
  for (int i = thread; i < request.ban_count; i += block.threads()) {
    const int32_t token = banned[request.ban_begin + i];
    if (token >= 0 && token < vocab) logits[token] = -INFINITY;
  }
  block.sync();
  float best = -INFINITY;
  for (int64_t i = thread; i < vocab; i += block.threads()) best = Larger()(best, logits[i]);
  best = reduce_block(block, best, shared.row.floats, Larger());
  if (!s.valid() || best == -INFINITY) {
    if (thread == 0) {
      tokens[row] = -1;
      logprobs[row] = kept_mass[row] = NAN;
    }
    return;
  }
  const auto mass = [&s](float z) { return ops::integer_mass(z, s.lse); };
  const auto one = [](float) { return uint64_t{1}; };
  uint64_t least = 0;
  const int top_k = greedy ? 1 : request.top_k;
  if (top_k > 0) {
    least = least_kept(block, logits, vocab, static_cast<uint64_t>(top_k), one, shared);
  }
  if (!greedy && request.top_p < 1.0f) {
    uint64_t all[8] = {};
    for (int64_t i = thread; i < vocab; i += block.threads()) {
      if (ops::preference_key(logits[i], i) >= least) all[0] += mass(logits[i]);
    }
    sum_eight(block, all, shared);
    const double share =
        std::ceil(static_cast<double>(request.top_p) * static_cast<double>(all[0]));
    const auto wanted = static_cast<uint64_t>(share < 1.0 ? 1.0 : share);
    const uint64_t nucleus = least_kept(block, logits, vocab, wanted, mass, shared);
    least = nucleus > least ? nucleus : least;
  }
  const bool floored = !greedy && request.min_p > 0.0f;
  const double floor = floored ? ops::min_p_floor(best, request.min_p) : -INFINITY;
  const auto kept = [&](int64_t i) {
    return i < vocab && ops::preference_key(logits[i], i) >= least &&
                   static_cast<double>(logits[i]) >= floor
               ? mass(logits[i])
               : uint64_t{0};
  };
  int first = static_cast<int>(vocab);  // of the best
  for (int64_t tile = thread / kWarp; tile < tiles; tile += block.threads() / kWarp) {
    uint64_t sum = 0;
    for (int i = lane; i < kTile; i += kWarp) {
      const int64_t token = tile * kTile + i;
      sum += kept(token);
      if (token < vocab && logits[token] == best && token < first) first = static_cast<int>(token);
    }
    sum = reduce_lanes(block, sum, kWarp, Add());
    if (lane == 0) masses[tile] = static_cast<double>(sum);
  }
  first = reduce_block(block, first, shared.row.ints, Smaller());  // masses are there for all
  if (thread != 0) return;
  double total = 0.0, below = 0.0;
  for (int64_t t = 0; t < tiles; ++t) total += masses[t];
  const double target = request.uniform * total;
  int64_t token = first;  // every candidate underflowed: the best of them is the limit
  const int64_t tile = ops::invert(tiles, target, [&](int64_t t) { return masses[t]; }, &below);
  if (tile >= 0) {
    token = tile * kTile + ops::invert(kTile, target - below, [&](int64_t i) {
              return static_cast<double>(kept(tile * kTile + i));
            });
  }
  tokens[row] = static_cast<int32_t>(token);
  logprobs[row] = static_cast<float>(logits[token] - s.lse);
  const double share = total * ops::kIntegerMassUnit;
  kept_mass[row] = static_cast<float>(share < 1.0 ? share : 1.0);
}

}  // namespace alignpro::cuda
