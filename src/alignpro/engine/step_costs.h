#pragma once

#include <array>
#include <cstdint>

#include "alignpro/ops/ops.h"

namespace alignpro::engine {

// What a step costs by its number of rows, in steps of one row: a device's guess, and where that
// calls itself one, what the engine's own steps took. Which row is the dear one depends on the
// machine, the arithmetic and the weights' format (the second where a kernel changes, the ninth
// where a tile is full), so that no constant knows it. Costs decide how long a draft is, and no bit
// of what is drawn. One thread at a time.
class StepCosts {
 public:
  explicit StepCosts(ops::RowCost guess) : guess_(guess) {}

  // Between numbers of rows that were seen a line, beyond the last the guess.
  double of(int64_t rows) const;

  // A step of so many rows, one a token, took `seconds`.
  void learn(int64_t rows, double seconds);

  static constexpr int64_t kMostRows = 64;

 private:
  struct Seen {
    double cost = 0.0;
    double weight = 0.0;  // in steps; old ones count less
  };

  bool is_known(int64_t rows) const;
  Seen& seen(int64_t rows) { return seen_[static_cast<size_t>(rows)]; }
  const Seen& seen(int64_t rows) const { return seen_[static_cast<size_t>(rows)]; }

  const ops::RowCost guess_;
  double one_row_ = 0.0;  // seconds
  std::array<Seen, kMostRows + 1> seen_;
};

}  // namespace alignpro::engine
