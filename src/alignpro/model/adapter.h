#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "alignpro/model/checkpoint.h"
#include "alignpro/model/config.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::model {

// A linear layer as PEFT names it, and where it lies in this house's fused matrices.
struct LoraModule {
  std::string path;  // "model.layers.0.self_attn.q_proj"
  int64_t layer;
  LinearSite site;
  int64_t out_begin;  // first output row within the site
  int64_t outputs;
  int64_t inputs;
};

// Every linear of the model a LoRA can attach to, in file order (head and embedding excluded).
std::vector<LoraModule> lora_modules(const ModelConfig& config);

// LoRA matrices of one module as they come from outside: A [rank, inputs], B [outputs, rank].
struct LoraMatrices {
  int64_t rank;
  const float* a;
  const float* b;
};

// Low-rank updates of one weight version (Hu et al. 2021): y = W x + scale B (A x), on any subset
// of linears. Never edited after construction: new matrices are a new Adapter with a new version,
// so KV entries of the old one cannot be reached (contract 5).
class Adapter {
 public:
  struct Module {
    LoraModule where;
    ops::PackedMatrix a;  // [rank, inputs]
    ops::PackedMatrix b;  // [outputs, rank]
  };

  // Throws InvalidArgument naming the module when it is unknown or its rank is not positive.
  Adapter(const ModelConfig& config, const std::map<std::string, LoraMatrices>& matrices,
          float scale);

  // Throws InvalidArgument unless a model of this shape can run the adapter. It is tied to shapes,
  // not to a Model object.
  void require_fits(const ModelConfig& config) const;

  uint64_t version() const { return version_; }  // unique in this process, never reused, never 0
  float scale() const { return scale_; }
  int64_t max_rank() const { return max_rank_; }
  const std::vector<Module>& modules() const { return modules_; }

  // Indices into modules() of those at one layer and site.
  const std::vector<int>& at(int64_t layer, LinearSite site) const {
    return by_site_[static_cast<size_t>(layer)][static_cast<size_t>(site)];
  }

 private:
  uint64_t version_;
  float scale_;
  int64_t max_rank_ = 0;
  std::vector<Module> modules_;
  std::vector<std::array<std::vector<int>, 4>> by_site_;
};

}  // namespace alignpro::model
