#pragma once

namespace alignpro::ops {

// Of linear_logprob, each [rows]. What a reference is needed for is written only with one, and may
// be null without.
struct LogprobOutput {
  float* logprob;      // z_a - lse(z)
  float* entropy;      // -sum p log p
  float* kl;           // KL(p || q) over the whole vocabulary, never negative, 0 when z == z_ref
  float* reverse_kl;   // KL(q || p); may be null
  float* ref_logprob;  // log q_a
  double* lse;         // log sum exp z, with what float32 would lose: logits may be large
  double* ref_lse;
};

}  // namespace alignpro::ops
