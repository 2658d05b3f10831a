#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

// Seconds of `work`: the median of kRepeats calls after one to warm up.
inline constexpr int kRepeats = 7;

inline double median_seconds(const std::function<void()>& work) {
  work();
  std::vector<double> seconds;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
  return seconds[kRepeats / 2];
}
