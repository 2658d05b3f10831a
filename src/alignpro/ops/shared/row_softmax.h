#pragma once

// A row's softmax over the vocabulary, of host and device: statistics of tiles, their merge, and
// what is read off them. The CPU's kernels compute tiles by vectors (cpu/kernels-inl.h), the GPU's
// by these lines; merging and reading is the same code on both.

#include <cmath>
#include <cstdint>

#include "alignpro/core/host_device.h"
#include "alignpro/ops/logprob_output.h"
#include "alignpro/ops/shared/tile_stats.h"

namespace alignpro::ops {

// What multiplies a weight of exactly 0 counts as 0: keeps 0 * inf out of the sums. NaN passes.
ALIGNPRO_HOST_DEVICE inline float where_weighted(float weight, float value) {
  return weight == 0.0f ? 0.0f : value;
}

// A tile of -inf alone (or NaN) has no finite maximum; measured from 0 it sums to 0 (or NaN).
ALIGNPRO_HOST_DEVICE inline float tile_top(float max) { return max == -INFINITY ? 0.0f : max; }

// The larger of the two, the first where the second is NaN.
ALIGNPRO_HOST_DEVICE inline float larger(float a, float b) { return b > a ? b : a; }

// A tile whose maxima are known and which holds no logit yet.
ALIGNPRO_HOST_DEVICE inline TileStats open_tile(float max, float ref_max) {
  return {max, 0.0f, 0.0f, ref_max, 0.0f, 0.0f, 0.0f};
}

ALIGNPRO_HOST_DEVICE inline void add_logit(float z, TileStats* stats) {
  const float d = z - tile_top(stats->max), e = std::exp(d);
  stats->sum += e;
  stats->sum_z = std::fma(e, where_weighted(e, d), stats->sum_z);
}
ALIGNPRO_HOST_DEVICE inline void add_logit(float z, float ref_z, TileStats* stats) {
  const float d = z - tile_top(stats->max), e = std::exp(d);
  const float rd = ref_z - tile_top(stats->ref_max), re = std::exp(rd);
  stats->sum += e;
  stats->sum_z = std::fma(e, where_weighted(e, d), stats->sum_z);
  stats->ref_sum += re;
  stats->sum_cross = std::fma(e, where_weighted(e, d - rd), stats->sum_cross);
  stats->ref_cross = std::fma(re, where_weighted(re, rd - d), stats->ref_cross);
}
// Other columns of the same tile, measured from the same maxima.
ALIGNPRO_HOST_DEVICE inline void add_columns(const TileStats& other, TileStats* stats) {
  stats->sum += other.sum;
  stats->sum_z += other.sum_z;
  stats->ref_sum += other.ref_sum;
  stats->sum_cross += other.sum_cross;
  stats->ref_cross += other.ref_cross;
}

// Sums over tiles, relative to the row's maxima.
struct RowSums {
  double sum = 0.0, sum_z = 0.0, ref_sum = 0.0, cross = 0.0, ref_cross = 0.0;
};

ALIGNPRO_HOST_DEVICE inline void add_tile(const TileStats& t, float max, float ref_max,
                                          RowSums* sums) {
  // A tile without a finite maximum was measured from 0 and holds 0 (or NaN, which must spread).
  const bool finite = std::isfinite(t.max), ref_finite = std::isfinite(t.ref_max);
  const double top = finite ? double{t.max} : 0.0;
  const double ref_top = ref_finite ? double{t.ref_max} : 0.0;
  const double weight = finite ? std::exp(top - max) : 1.0;
  const double ref_weight = ref_finite ? std::exp(ref_top - ref_max) : 1.0;
  sums->sum += weight * t.sum;
  sums->ref_sum += ref_weight * t.ref_sum;
  // A tile of no weight may hold infinite differences.
  if (weight * t.sum != 0.0) {
    sums->sum_z += weight * (double{t.sum_z} + double{t.sum} * top);
    sums->cross += weight * (double{t.sum_cross} + double{t.sum} * (top - ref_top));
  }
  if (ref_weight * t.ref_sum != 0.0) {
    sums->ref_cross += ref_weight * (double{t.ref_cross} + double{t.ref_sum} * (ref_top - top));
  }
}
ALIGNPRO_HOST_DEVICE inline void add_sums(const RowSums& other, RowSums* sums) {
  sums->sum += other.sum;
  sums->sum_z += other.sum_z;
  sums->ref_sum += other.ref_sum;
  sums->cross += other.cross;
  sums->ref_cross += other.ref_cross;
}

// A row's softmax, merged over its tiles.
struct RowStats {
  double max;
  double sum;     // of exp(z - max)
  double lse;     // log of the sum of exp(z)
  double mean_z;  // E_p[z]
  double ref_lse;
  double mean_cross;  // E_p[z - z_ref]
  double ref_cross;   // E_q[z_ref - z]

  // NaN logits make the sum NaN; a row of -inf alone sums to 0.
  ALIGNPRO_HOST_DEVICE bool valid() const {
    return sum > 0.0 && std::isfinite(sum) && std::isfinite(max);
  }
};

ALIGNPRO_HOST_DEVICE inline RowStats finish_row(const RowSums& sums, float max, float ref_max) {
  return {max,
          sums.sum,
          max + std::log(sums.sum),
          sums.sum_z / sums.sum,
          ref_max + std::log(sums.ref_sum),
          sums.cross / sums.sum,
          sums.ref_cross / sums.ref_sum};
}

// One pass for the maxima, one for the sums, tiles in ascending order.
ALIGNPRO_HOST_DEVICE inline RowStats merge_tiles(const TileStats* tiles, int64_t count) {
  float max = -INFINITY, ref_max = -INFINITY;
  for (int64_t t = 0; t < count; ++t) {
    max = larger(max, tiles[t].max);
    ref_max = larger(ref_max, tiles[t].ref_max);
  }
  RowSums sums;
  for (int64_t t = 0; t < count; ++t) add_tile(tiles[t], max, ref_max, &sums);
  return finish_row(sums, max, ref_max);
}

// What the vocabulary op reports of one row whose token has these logits.
struct RowValues {
  float logprob, entropy;
  float kl, reverse_kl, ref_logprob;  // of a row with a reference
};

ALIGNPRO_HOST_DEVICE inline float not_negative(double value) {
  return static_cast<float>(value > 0.0 ? value : 0.0);
}
ALIGNPRO_HOST_DEVICE inline RowValues row_values(const RowStats& s, float logit, float ref_logit) {
  return {static_cast<float>(logit - s.lse), not_negative(s.lse - s.mean_z),
          not_negative(s.mean_cross - s.lse + s.ref_lse),
          not_negative(s.ref_cross - s.ref_lse + s.lse), static_cast<float>(ref_logit - s.ref_lse)};
}

// The derivative of the loss by one logit z (see RowGradient), but for that of the token's own
// d_logprob. Without a reference ref_z counts for nothing.
ALIGNPRO_HOST_DEVICE inline float logit_gradient(const RowGradient& g, bool with_ref, float z,
                                                 float ref_z) {
  const float logp = z - g.lse - g.lse_low, p = std::exp(logp);
  float factor = -g.d_logprob - g.d_entropy * (logp + g.entropy);
  float extra = 0.0f;
  if (with_ref) {
    const float logq = ref_z - g.ref_lse - g.ref_lse_low, more = p - std::exp(logq);
    factor = std::fma(g.d_kl, logp - logq - g.kl, factor);
    factor = std::fma(g.d_total_variation, (more > 0.0f ? 1.0f : 0.0f) - g.mass_above, factor);
    extra = g.d_reverse_kl * more;
  }
  return std::fma(p, where_weighted(p, factor), extra);
}

// What one logit adds to sum max(0, p - q) and to the mass of p where p > q.
ALIGNPRO_HOST_DEVICE inline void add_variation(const RowGradient& s, float z, float ref_z,
                                               float* variation, float* mass_above) {
  const float p = std::exp(z - s.lse - s.lse_low);
  const float more = p - std::exp(ref_z - s.ref_lse - s.ref_lse_low);
  *variation += more > 0.0f ? more : 0.0f;
  *mass_above += more > 0.0f ? p : 0.0f;
}

// The normaliser as RowGradient holds it.
ALIGNPRO_HOST_DEVICE inline void split_lse(double lse, float* high, float* low) {
  *high = static_cast<float>(lse);
  *low = static_cast<float>(lse - *high);
}

// What a row's derivatives by its logits need, from what its forward left.
ALIGNPRO_HOST_DEVICE inline RowGradient row_gradient(int64_t row, bool with_ref,
                                                     const int32_t* tokens,
                                                     const LogprobOutput& forward,
                                                     const LogprobUpstream& upstream) {
  const auto given = [row](const float* values) { return values != nullptr ? values[row] : 0.0f; };
  RowGradient g = {};
  split_lse(forward.lse[row], &g.lse, &g.lse_low);
  g.entropy = given(forward.entropy);
  g.d_logprob = given(upstream.logprob);
  g.d_entropy = given(upstream.entropy);
  g.token = tokens[row];
  if (!with_ref) return g;
  split_lse(forward.ref_lse[row], &g.ref_lse, &g.ref_lse_low);
  g.kl = given(forward.kl);
  g.d_kl = given(upstream.kl);
  g.d_reverse_kl = given(upstream.reverse_kl);
  g.d_total_variation = given(upstream.total_variation);
  g.mass_above = given(upstream.mass_above);
  return g;
}

}  // namespace alignpro::ops
