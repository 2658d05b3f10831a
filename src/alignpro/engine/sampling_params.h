#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "alignpro/ops/shared/sampling.h"

namespace alignpro::engine {

// How one sequence is drawn and when it ends.
struct SamplingParams : ops::DrawOptions {
  int64_t max_new_tokens = 64;
  int64_t min_new_tokens = 0;  // EOS and stop ids are not drawn, stop strings do not count, before
  uint64_t seed = 0;
  uint32_t sample = 0;  // which of the request's samples; with seed and position it keys the draw
  std::vector<int32_t> stop_token_ids;
  std::vector<std::string> stop;  // text that ends the sequence, UTF-8, matched on bytes
  bool ignore_eos = false;
  // Of tokens that were read or written, and, by the other two, of those that were written: once,
  // and for every time.
  float repetition_penalty = 1.0f;  // 1: off
  float presence_penalty = 0.0f;    // 0: off
  float frequency_penalty = 0.0f;   // 0: off
  double deadline_seconds = 0.0;    // from submit(); 0: none
};

// The one set of limits: throws InvalidArgument naming the field. Token ids are checked against the
// model at submit().
void validate(const SamplingParams& params);

bool penalises(const SamplingParams& params);

}  // namespace alignpro::engine
