#include "alignpro/engine/sampling_params.h"

#include <cmath>

#include "alignpro/core/error.h"

namespace alignpro::engine {

void validate(const SamplingParams& p) {
  require(std::isfinite(p.temperature) && p.temperature >= 0.0f,
          "temperature: expected a finite number >= 0, got ", p.temperature);
  require(p.top_k >= 0, "top_k: expected >= 0 (0: off), got ", p.top_k);
  require(p.top_p > 0.0f && p.top_p <= 1.0f, "top_p: expected 0 < top_p <= 1 (1: off), got ",
          p.top_p);
  require(p.min_p >= 0.0f && p.min_p <= 1.0f, "min_p: expected 0 <= min_p <= 1 (0: off), got ",
          p.min_p);
  require(p.max_new_tokens >= 0, "max_new_tokens: expected >= 0, got ", p.max_new_tokens);
  require(p.min_new_tokens >= 0 && p.min_new_tokens <= p.max_new_tokens,
          "min_new_tokens: expected 0 to max_new_tokens (", p.max_new_tokens, "), got ",
          p.min_new_tokens);
  for (const std::string& stop : p.stop) {
    require(!stop.empty(), "stop: expected non-empty strings, got an empty one");
  }
  require(std::isfinite(p.deadline_seconds) && p.deadline_seconds >= 0.0,
          "deadline_seconds: expected a finite number >= 0 (0: none), got ", p.deadline_seconds);
}

}  // namespace alignpro::engine
