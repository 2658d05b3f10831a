#include "alignpro/engine/step_costs.h"

#include <algorithm>
#include <cmath>

namespace alignpro::engine {
namespace {

// A machine's speed changes for all numbers of rows at once (neighbours, a longer context), and
// fast: most of a surprise is that.
constexpr double kSpeed = 1.0 / 4;
// Of what is left, a cost follows about so many of its steps.
constexpr double kLongest = 16.0;
// What is not seen again is forgotten: a step that was interrupted when it was the first of its
// kind would make all drafts of its length look dear, and they would not be made again.
constexpr double kForgotten = 1.0 / 512;
constexpr double kLeastWeight = 0.5;
// What is over sooner (a model of a test's size) is bookkeeping, and says nothing of weights.
constexpr double kShortest = 0.5e-3;

}  // namespace

bool StepCosts::is_known(int64_t rows) const {
  return rows == 1 || (rows <= kMostRows && seen(rows).weight >= kLeastWeight);
}

double StepCosts::of(int64_t rows) const {
  const auto cost = [this](int64_t known) { return known == 1 ? 1.0 : seen(known).cost; };
  if (is_known(rows)) return cost(rows);
  int64_t below = std::min(rows, kMostRows + 1) - 1;
  while (!is_known(below)) --below;
  int64_t above = rows + 1;
  while (above <= kMostRows && !is_known(above)) ++above;
  const auto beyond = static_cast<double>(rows - below);
  if (above > kMostRows) return cost(below) + guess_.share * beyond;
  return cost(below) + (cost(above) - cost(below)) * beyond / static_cast<double>(above - below);
}

void StepCosts::learn(int64_t rows, double seconds) {
  if (!guess_.is_estimate || rows < 1 || rows > kMostRows || !(seconds > kShortest)) {
    return;
  }
  if (one_row_ == 0.0) one_row_ = seconds / of(rows);
  double surprise = seconds / (one_row_ * of(rows));
  Seen& own = seen(rows);
  for (Seen& other : seen_) other.weight *= 1.0 - kForgotten;
  if (!is_known(rows)) {
    own = {of(rows) * std::clamp(surprise, 0.5, 2.0), 1.0};
    return;
  }
  surprise = std::clamp(surprise, 0.8, 1.25);
  one_row_ *= std::pow(surprise, kSpeed);
  own.weight = std::min(own.weight + 1.0, kLongest);
  const double change = std::pow(surprise, 1.0 / own.weight);
  if (rows > 1) {
    own.cost *= change;
  } else {  // which costs one by definition
    for (Seen& other : seen_) other.cost /= std::pow(surprise, 1.0 / kLongest);
  }
}

}  // namespace alignpro::engine
