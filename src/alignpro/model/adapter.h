#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/model/checkpoint.h"
#include "alignpro/model/config.h"
#include "alignpro/ops/ops.h"

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

// An adapter's matrices on a device.
class DeviceAdapter {
 public:
  using Sites = std::vector<std::array<std::unique_ptr<const ops::LoraWeight>, 4>>;
  DeviceAdapter(uint64_t version, Sites sites, std::unique_ptr<const ops::SoftRows> soft);

  uint64_t version() const { return version_; }
  int64_t most_ranks() const { return most_ranks_; }  // of any one site
  // Null where there is none.
  const ops::LoraWeight* update(int64_t layer, LinearSite site) const {
    return sites_[static_cast<size_t>(layer)][static_cast<size_t>(site)].get();
  }
  const ops::SoftRows* soft_rows() const { return soft_.get(); }  // or null

 private:
  uint64_t version_;
  int64_t most_ranks_ = 0;
  Sites sites_;
  std::unique_ptr<const ops::SoftRows> soft_;
};

// What is trained of one weight version: low-rank updates (Hu et al. 2021), y = W x + scale B (A
// x), on any subset of linears, and rows of a soft prompt (Lester et al. 2021), which stand where a
// sequence names them: the id -1 - r is row r, in its own place among the tokens. Never edited
// after construction: new matrices are a new Adapter with a new version, so KV entries of the old
// one cannot be reached (contract 5).
class Adapter {
 public:
  struct Module {
    LoraModule where;
    int64_t rank;
    int64_t rank_begin;  // its first rank within the site's stacked matrices
  };

  // soft_rows: [m, hidden_size], or none. Throws InvalidArgument where nothing is given, naming the
  // module when it is unknown or its rank is not positive, and the soft row that is not finite.
  Adapter(const ModelConfig& config, const std::map<std::string, LoraMatrices>& matrices,
          float scale, std::span<const float> soft_rows = {});

  // Throws InvalidArgument unless a model of this shape can run the adapter. It is tied to shapes,
  // not to a Model object.
  void require_fits(const ModelConfig& config) const;
  // Throws InvalidArgument, which begins with `where`, unless `adapter` (null: base weights) has
  // the soft row that an id below 0 names.
  static void require_row(const Adapter* adapter, int32_t id, const std::string& where);

  uint64_t version() const { return version_; }  // unique in this process, never reused, never 0
  int64_t max_rank() const { return max_rank_; }
  const std::vector<Module>& modules() const { return modules_; }
  int64_t num_rows() const { return num_rows_; }                      // of the soft prompt
  const std::vector<float>& soft_rows() const { return soft_rows_; }  // [num_rows, hidden_size]

  // Its matrices there, uploaded when first asked for; they go with the adapter. Hold on to them
  // until the work that reads them is done. Any thread.
  std::shared_ptr<const DeviceAdapter> on(const ops::Device& device) const;

 private:
  uint64_t version_;
  int64_t max_rank_ = 0;
  std::vector<Module> modules_;
  std::vector<std::array<ops::LoraStack, 4>> sites_;  // without modules: none
  std::vector<float> soft_rows_;
  int64_t num_rows_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<uint64_t, std::shared_ptr<const DeviceAdapter>>> by_device_;
};

}  // namespace alignpro::model
