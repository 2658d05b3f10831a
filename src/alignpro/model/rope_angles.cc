#include "alignpro/model/rope_angles.h"

#include <cmath>
#include <numbers>

namespace alignpro::model {

RopeAngles::RopeAngles(const RopeConfig& config, int64_t context_length)
    : frequencies_(static_cast<size_t>(config.rotary_dim / 2)) {
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
      case RopeScaling::kLongrope:
        f /= use_long ? config.long_factors[i] : config.short_factors[i];
        break;
    }
    frequencies_[i] = f;
  }
  if (config.scaling == RopeScaling::kLongrope) magnitude_ = config.attention_factor;
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
