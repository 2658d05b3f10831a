#include "alignpro/model/rope_angles.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

namespace alignpro::model {
namespace {

// The lanes between which YaRN goes over from kept to stretched frequencies.
std::pair<double, double> yarn_lanes(const RopeConfig& config) {
  if (config.scaling != RopeScaling::kYarn) return {0.0, 1.0};
  const auto dim = static_cast<double>(config.rotary_dim);
  const auto lane = [&](double turns) {  // the one that turns so often within pre-training
    const double period = static_cast<double>(config.original_context) / turns;
    return dim * std::log(period / (2.0 * std::numbers::pi)) / (2.0 * std::log(config.theta));
  };
  double first = lane(config.beta_fast), last = lane(config.beta_slow);
  if (config.whole_lanes) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, dim - 1.0);
  return {first, first == last ? last + 0.001 : last};
}

}  // namespace

RopeAngles::RopeAngles(const RopeConfig& config, int64_t context_length)
    : frequencies_(static_cast<size_t>(config.rotary_dim / 2)) {
  const auto [first_mixed, last_mixed] = yarn_lanes(config);
  const bool use_long = context_length > config.original_context;
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    double f = std::pow(config.theta,
                        -2.0 * static_cast<double>(i) / static_cast<double>(config.rotary_dim));
    if (!config.freq_factors.empty()) f /= config.freq_factors[i];
    switch (config.scaling) {
      case RopeScaling::kNone:
        break;
      case RopeScaling::kLinear:
        f /= config.factor;
        break;
      case RopeScaling::kLlama3: {
        // Wavelengths beyond the pre-training context are stretched, short ones kept, between the
        // two a linear blend (Llama 3.1).
        const double wavelength = 2.0 * std::numbers::pi / f;
        const double context = static_cast<double>(config.original_context);
        if (wavelength > context / config.low_freq_factor) {
          f /= config.factor;
        } else if (wavelength >= context / config.high_freq_factor) {
          const double keep = (context / wavelength - config.low_freq_factor) /
                              (config.high_freq_factor - config.low_freq_factor);
          f = (1.0 - keep) * f / config.factor + keep * f;
        }
        break;
      }
      case RopeScaling::kYarn: {
        const double stretched = std::clamp(
            (static_cast<double>(i) - first_mixed) / (last_mixed - first_mixed), 0.0, 1.0);
        f = stretched * f / config.factor + (1.0 - stretched) * f;
        break;
      }
      case RopeScaling::kLongrope:
        f /= use_long ? config.long_factors[i] : config.short_factors[i];
        break;
    }
    frequencies_[i] = f;
  }
  if (config.scaling == RopeScaling::kLongrope || config.scaling == RopeScaling::kYarn) {
    magnitude_ = config.attention_factor;
  }
}

void RopeAngles::compute(std::span<const int32_t> positions, float* cos, float* sin) const {
  for (const int32_t position : positions) {
    for (const double f : frequencies_) {
      *cos++ = static_cast<float>(magnitude_ * std::cos(f * position));
      *sin++ = static_cast<float>(magnitude_ * std::sin(f * position));
    }
  }
}

}  // namespace alignpro::model
