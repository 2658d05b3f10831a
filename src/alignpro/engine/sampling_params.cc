#include "alignpro/engine/sampling_params.h"

#include <cmath>
#include <utility>

#include "alignpro/core/error.h"

namespace alignpro::engine {

namespace {

// What divides a logit must leave it finite.
constexpr float kLeastTemperature = 1e-30f;
// What is searched after every token, in a step that everybody waits for.
constexpr size_t kMostStops = 256;
constexpr size_t kLongestStop = 4096;
// Beyond it only the likeliest tokens and none of them are left, and a logit may overflow.
constexpr float kMostPenalty = 100.0f;

}  // namespace

void validate(const SamplingParams& p) {
  require(
      p.temperature == 0.0f || (std::isfinite(p.temperature) && p.temperature >= kLeastTemperature),
      "temperature: expected 0 (greedy) or a finite number >= ", kLeastTemperature, ", got ",
      p.temperature);
  require(p.top_k >= 0, "top_k: expected >= 0 (0: off), got ", p.top_k);
  require(p.top_p > 0.0f && p.top_p <= 1.0f, "top_p: expected 0 < top_p <= 1 (1: off), got ",
          p.top_p);
  require(p.min_p >= 0.0f && p.min_p <= 1.0f, "min_p: expected 0 <= min_p <= 1 (0: off), got ",
          p.min_p);
  require(p.max_new_tokens >= 0, "max_new_tokens: expected >= 0, got ", p.max_new_tokens);
  require(p.min_new_tokens >= 0 && p.min_new_tokens <= p.max_new_tokens,
          "min_new_tokens: expected 0 to max_new_tokens (", p.max_new_tokens, "), got ",
          p.min_new_tokens);
  require(p.stop.size() <= kMostStops, "stop: expected at most ", kMostStops, " strings, got ",
          p.stop.size());
  for (const std::string& stop : p.stop) {
    require(!stop.empty() && stop.size() <= kLongestStop, "stop: expected strings of 1 to ",
            kLongestStop, " bytes, got one of ", stop.size());
  }
  require(p.repetition_penalty >= 1 / kMostPenalty && p.repetition_penalty <= kMostPenalty,
          "repetition_penalty: expected ", 1 / kMostPenalty, " to ", kMostPenalty,
          " (1: off), got ", p.repetition_penalty);
  for (const auto& [name, value] : {std::pair("presence_penalty", p.presence_penalty),
                                    std::pair("frequency_penalty", p.frequency_penalty)}) {
    require(std::abs(value) <= kMostPenalty, name, ": expected ", -kMostPenalty, " to ",
            kMostPenalty, " (0: off), got ", value);
  }
  require(std::isfinite(p.deadline_seconds) && p.deadline_seconds >= 0.0,
          "deadline_seconds: expected a finite number >= 0 (0: none), got ", p.deadline_seconds);
}

bool penalises(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

}  // namespace alignpro::engine
