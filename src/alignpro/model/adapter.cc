#include "alignpro/model/adapter.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "alignpro/core/error.h"

namespace alignpro::model {

std::vector<LoraModule> lora_modules(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size, q = config.q_size(), kv = config.kv_size();
  const int64_t mlp = config.intermediate_size;
  std::vector<LoraModule> modules;
  for (int64_t l = 0; l < config.num_layers; ++l) {
    const auto add = [&](const char* name, LinearSite site, int64_t begin, int64_t outputs,
                         int64_t inputs) {
      modules.push_back({cat("model.layers.", l, ".", name), l, site, begin, outputs, inputs});
    };
    if (config.fused_projections) {
      add("self_attn.qkv_proj", LinearSite::kQkv, 0, q + 2 * kv, hidden);
    } else {
      add("self_attn.q_proj", LinearSite::kQkv, 0, q, hidden);
      add("self_attn.k_proj", LinearSite::kQkv, q, kv, hidden);
      add("self_attn.v_proj", LinearSite::kQkv, q + kv, kv, hidden);
    }
    add("self_attn.o_proj", LinearSite::kO, 0, hidden, q);
    if (config.fused_projections) {
      add("mlp.gate_up_proj", LinearSite::kGateUp, 0, 2 * mlp, hidden);
    } else {
      add("mlp.gate_proj", LinearSite::kGateUp, 0, mlp, hidden);
      add("mlp.up_proj", LinearSite::kGateUp, mlp, mlp, hidden);
    }
    add("mlp.down_proj", LinearSite::kDown, 0, hidden, mlp);
  }
  return modules;
}

namespace {

// Makes room for `ranks` more rows of A and columns of B.
void widen(ops::LoraStack& site, int64_t ranks) {
  const int64_t wide = site.ranks + ranks;
  site.a.resize(static_cast<size_t>(wide * site.inputs));
  std::vector<float> b(static_cast<size_t>(site.outputs * wide));
  for (int64_t n = 0; n < site.outputs; ++n) {
    std::copy_n(site.b.data() + n * site.ranks, site.ranks, b.data() + n * wide);
  }
  site.b = std::move(b);
  site.ranks = wide;
}

}  // namespace

DeviceAdapter::DeviceAdapter(uint64_t version, Sites sites,
                             std::unique_ptr<const ops::SoftRows> soft)
    : version_(version), sites_(std::move(sites)), soft_(std::move(soft)) {
  for (const auto& layer : sites_) {
    for (const auto& lora : layer) {
      if (lora != nullptr) most_ranks_ = std::max(most_ranks_, lora->ranks);
    }
  }
}

Adapter::Adapter(const ModelConfig& config, const std::map<std::string, LoraMatrices>& matrices,
                 float scale, std::span<const float> soft_rows)
    : sites_(static_cast<size_t>(config.num_layers)),
      soft_rows_(soft_rows.begin(), soft_rows.end()),
      num_rows_(std::ssize(soft_rows_) / config.hidden_size) {
  static std::atomic<uint64_t> next_version{1};
  version_ = next_version.fetch_add(1);
  require(std::isfinite(scale), "adapter: scale must be finite, got ", scale);
  require(!matrices.empty() || num_rows_ > 0,
          "adapter: nothing given; expected at least one (A, B) pair, or rows");
  require(std::ssize(soft_rows_) == num_rows_ * config.hidden_size,
          "adapter: rows: expected rows of ", config.hidden_size, " values, got ",
          soft_rows_.size(), " values");
  const auto wrong = std::ranges::find_if(soft_rows_, [](float x) { return !std::isfinite(x); });
  require(wrong == soft_rows_.end(), "adapter: rows: row ",
          (wrong - soft_rows_.begin()) / config.hidden_size, " holds NaN or infinity");
  const std::vector<LoraModule> known = lora_modules(config);
  for (const auto& [path, m] : matrices) {
    const auto found = std::find_if(known.begin(), known.end(),
                                    [&path = path](const LoraModule& k) { return k.path == path; });
    require(found != known.end(), "adapter: the model has no linear '", path, "'; it has ",
            known.front().path, " ... ", known.back().path);
    require(m.rank >= 1, "adapter: '", path, "' has rank ", m.rank, ", expected at least 1");
    ops::LoraStack& site =
        sites_[static_cast<size_t>(found->layer)][static_cast<size_t>(found->site)];
    if (site.modules.empty()) {
      const LinearShape shape = linear_shape(config, found->site);
      site.inputs = shape.inputs;
      site.outputs = shape.outputs;
      site.scale = scale;
    }
    const int64_t begin = site.ranks;
    widen(site, m.rank);
    std::copy_n(m.a, m.rank * site.inputs, site.a.data() + begin * site.inputs);
    for (int64_t n = 0; n < found->outputs; ++n) {
      std::copy_n(m.b + n * m.rank, m.rank,
                  site.b.data() + (found->out_begin + n) * site.ranks + begin);
    }
    site.modules.push_back({found->out_begin, found->outputs, begin, m.rank});
    modules_.push_back({*found, m.rank, begin});
    max_rank_ = std::max(max_rank_, m.rank);
  }
}

std::shared_ptr<const DeviceAdapter> Adapter::on(const ops::Device& device) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [id, adapter] : by_device_) {
    if (id == device.id()) return adapter;
  }
  std::vector<const ops::LoraStack*> matrices;
  for (const auto& layer : sites_) {
    for (const ops::LoraStack& site : layer) {
      if (!site.modules.empty()) matrices.push_back(&site);
    }
  }
  auto uploaded = device.upload(matrices);
  DeviceAdapter::Sites sites(sites_.size());
  auto next = uploaded.begin();
  for (size_t l = 0; l < sites_.size(); ++l) {
    for (size_t s = 0; s < sites_[l].size(); ++s) {
      if (!sites_[l][s].modules.empty()) sites[l][s] = std::move(*next++);
    }
  }
  auto made = std::make_shared<const DeviceAdapter>(
      version_, std::move(sites),
      num_rows_ == 0 ? nullptr : device.upload(soft_rows_, std::ssize(soft_rows_) / num_rows_));
  by_device_.emplace_back(device.id(), made);
  return made;
}

void Adapter::require_fits(const ModelConfig& config) const {
  require(static_cast<int64_t>(sites_.size()) == config.num_layers, "adapter: made for a model of ",
          sites_.size(), " layers, this one has ", config.num_layers,
          "; use one made by this model's make_adapter()");
  for (const Module& module : modules_) {
    const LoraModule& at = module.where;
    const LinearShape shape = linear_shape(config, at.site);
    require(at.inputs == shape.inputs && at.out_begin + at.outputs <= shape.outputs,
            "adapter: module ", at.path, " [", at.outputs, ", ", at.inputs,
            "] does not fit this model; use one made by this model's make_adapter()");
  }
  require(std::ssize(soft_rows_) == num_rows_ * config.hidden_size, "adapter: ", num_rows_,
          " rows of ", soft_rows_.size(), " values do not fit this model, whose hidden size is ",
          config.hidden_size, "; use one made by this model's make_adapter()");
}

void Adapter::require_row(const Adapter* adapter, int32_t id, const std::string& where) {
  const int64_t row = -1 - int64_t{id}, rows = adapter == nullptr ? 0 : adapter->num_rows();
  require(row < rows, where, ": id ", id, " names row ", row, " of a soft prompt, ",
          adapter == nullptr ? "and there is no adapter"
                             : cat("the adapter has ", rows, rows == 1 ? " row" : " rows"));
}

}  // namespace alignpro::model
