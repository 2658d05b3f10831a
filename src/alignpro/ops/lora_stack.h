#pragma once

#include <cstdint>
#include <vector>

namespace alignpro::ops {

// LoRA modules at one weight W [outputs, inputs], stacked: W + scale B A, A [ranks, inputs], B
// [outputs, ranks]. Each module owns consecutive ranks and outputs; B is zero elsewhere.
struct LoraStack {
  struct Module {
    int64_t out_begin, outputs, rank_begin, rank;
  };
  int64_t ranks = 0, inputs = 0, outputs = 0;
  std::vector<float> a, b;
  float scale = 1.0f;
  std::vector<Module> modules;
};

}  // namespace alignpro::ops
