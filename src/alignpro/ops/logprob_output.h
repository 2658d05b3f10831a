#pragma once

namespace alignpro::ops {

// Of linear_logprob, each [rows]. What a reference is needed for is written only with one, and may
// be null without.
struct LogprobOutput {
  float* logprob = nullptr;      // z_a - lse(z)
  float* entropy = nullptr;      // -sum p log p
  float* kl = nullptr;           // KL(p || q) over the whole vocabulary, never negative, 0 when
                                 // z == z_ref
  float* reverse_kl = nullptr;   // KL(q || p); may be null
  float* ref_logprob = nullptr;  // log q_a
  double* lse = nullptr;         // log sum exp z, with what float32 would lose: logits may be large
  double* ref_lse = nullptr;
};

// Derivatives of the loss by each output, [rows]; null: zero.
struct LogprobUpstream {
  const float* logprob = nullptr;
  const float* entropy = nullptr;
  const float* kl = nullptr;
  const float* reverse_kl = nullptr;
  const float* total_variation = nullptr;
  const float* mass_above = nullptr;  // what total_variation left for its derivative
};

}  // namespace alignpro::ops
