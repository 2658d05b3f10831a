#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "alignpro/model/checkpoint.h"
#include "alignpro/model/config.h"
#include "alignpro/ops/linear.h"

namespace alignpro::model {

// A linear layer as PEFT names it, and where it lies in the fused matrices.
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
    int64_t rank;
    int64_t rank_begin;  // its first rank within the site's stacked matrices
  };

  // Throws InvalidArgument naming the module when it is unknown or its rank is not positive.
  Adapter(const ModelConfig& config, const std::map<std::string, LoraMatrices>& matrices,
          float scale);

  // Throws InvalidArgument unless a model of this shape can run the adapter. It is tied to shapes,
  // not to a Model object.
  void require_fits(const ModelConfig& config) const;

  uint64_t version() const { return version_; }  // unique in this process, never reused, never 0
  int64_t max_rank() const { return max_rank_; }
  const std::vector<Module>& modules() const { return modules_; }

  // The modules at one layer and site: indices into modules(), and their matrices, stacked (null
  // where there are none).
  const std::vector<int>& at(int64_t layer, LinearSite site) const {
    return site_of(layer, site).modules;
  }
  const ops::LowRank* update(int64_t layer, LinearSite site) const {
    const Site& s = site_of(layer, site);
    return s.modules.empty() ? nullptr : &s.update;
  }

  // Ranks of all sites of a layer together.
  int64_t layer_ranks(int64_t layer) const;

 private:
  struct Site {
    std::vector<int> modules;
    ops::LowRank update;
  };
  const Site& site_of(int64_t layer, LinearSite site) const {
    return sites_[static_cast<size_t>(layer)][static_cast<size_t>(site)];
  }

  uint64_t version_;
  int64_t max_rank_ = 0;
  std::vector<Module> modules_;
  std::vector<std::array<Site, 4>> sites_;
};

}  // namespace alignpro::model
