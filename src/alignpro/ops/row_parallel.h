#pragma once

#include <algorithm>
#include <cstdint>

#include "alignpro/core/parallel.h"

namespace alignpro::ops {

// Calls fn(row) for every row; on the pool when there is enough to do (`width` floats a row).
template <typename Fn>
void row_parallel(int64_t rows, int64_t width, ThreadPool& pool, const Fn& fn) {
  // About 10 us of work: less is finished before a sleeping pool wakes.
  constexpr int64_t kSerialFloats = 16384;
  if (rows * width <= kSerialFloats || pool.size() == 1) {
    for (int64_t row = 0; row < rows; ++row) fn(row);
    return;
  }
  const int64_t chunk = std::max<int64_t>(1, rows / (4 * pool.size()));
  pool.run((rows + chunk - 1) / chunk, [&](int64_t item, int) {
    for (int64_t row = item * chunk; row < std::min(rows, (item + 1) * chunk); ++row) fn(row);
  });
}

}  // namespace alignpro::ops
