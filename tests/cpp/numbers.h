#pragma once

// What tests of ops compare with and by.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

inline Floats normal(size_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw(0.0f, scale);
  Floats values(count);
  for (float& v : values) v = draw(generator);
  return values;
}

// |x - truth| / |truth| over whole tensors.
inline double relative_error(const Floats& x, const Doubles& truth) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    difference += (x[i] - truth[i]) * (x[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

// float32 products of a few hundred terms land near 2e-7; ten times that is a wrong kernel.
inline constexpr double kBudget = 2e-6;

inline bool same_bits(const float* a, const float* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}
