#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "alignpro/model/config.h"

namespace alignpro::model {

// The frequencies of a model's rotary embedding, with its scaling applied; in double, because a
// float angle at position 100000 is off by 0.004.
class RopeAngles {
 public:
  // `context_length` decides between longrope's short and long factors, once for all positions: a
  // KV entry must not change its meaning when a sequence grows.
  RopeAngles(const RopeConfig& config, int64_t context_length);

  int64_t half() const { return static_cast<int64_t>(frequencies_.size()); }

  // cos, sin [positions, half]
  void compute(std::span<const int32_t> positions, float* cos, float* sin) const;

 private:
  std::vector<double> frequencies_;
  double magnitude_ = 1.0;
};

}  // namespace alignpro::model
