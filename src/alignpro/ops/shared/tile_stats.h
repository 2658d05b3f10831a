#pragma once

#include <cstdint>

// Data alone: the files of one instruction set each include it, and functions compiled for one of
// them must not be what the linker keeps for all.

namespace alignpro::ops {

// What one vocabulary tile contributes to a row's statistics. Sums are relative to the tile's own
// maximum, so tiles merge in any magnitude; they are merged in a fixed order, in double.
struct TileStats {
  float max;      // largest z
  float sum;      // sum e, e = exp(z - max)
  float sum_z;    // sum e (z - max)
  float ref_max;  // the same of the reference's logits
  float ref_sum;
  float sum_cross;  // sum e ((z - max) - (z_ref - ref_max))
  float ref_cross;  // sum e_ref ((z_ref - ref_max) - (z - max))
};

// Derivatives of the loss by one row's outputs, with the row's statistics: what the backward of the
// vocabulary op needs to rebuild, with [p > q] 1 where it holds,
//   dz = d_logprob (1[a] - p) - d_entropy p (log p + H) + d_kl p (log p - log q - KL)
//      + d_reverse_kl (p - q) + d_total_variation p ([p > q] - mass_above).
struct RowGradient {
  float lse, lse_low;  // of z: its float32 value, and what that leaves of the float64 one
  float ref_lse, ref_lse_low;
  float entropy;
  float kl;
  float mass_above;  // sum of p where p > q
  float d_logprob;
  float d_entropy;
  float d_kl;
  float d_reverse_kl;
  float d_total_variation;
  int32_t token;
};

}  // namespace alignpro::ops
