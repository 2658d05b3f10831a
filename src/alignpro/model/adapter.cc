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

// One site's modules on top of each other.
ops::LowRank stack(const ModelConfig& config, const std::vector<Adapter::Module>& modules,
                   const std::vector<const LoraMatrices*>& matrices, float scale) {
  const LinearShape shape = linear_shape(config, modules.front().where.site);
  const int64_t ranks = modules.back().rank_begin + modules.back().rank;
  const auto panels = [](int64_t rows) {
    return static_cast<size_t>((rows + ops::cpu::kPanel - 1) / ops::cpu::kPanel);
  };
  std::vector<float> a(static_cast<size_t>(ranks * shape.inputs));
  std::vector<float> b(static_cast<size_t>(shape.outputs * ranks));
  ops::LowRank update;
  update.ranks_of_outputs.assign(panels(shape.outputs), {ranks, 0});
  update.outputs_of_ranks.assign(panels(ranks), {shape.outputs, 0});
  for (size_t i = 0; i < modules.size(); ++i) {
    const Adapter::Module& m = modules[i];
    const int64_t out_end = m.where.out_begin + m.where.outputs;
    const int64_t rank_end = m.rank_begin + m.rank;
    std::copy_n(matrices[i]->a, m.rank * shape.inputs, a.data() + m.rank_begin * shape.inputs);
    for (int64_t n = 0; n < m.where.outputs; ++n) {
      std::copy_n(matrices[i]->b + n * m.rank, m.rank,
                  b.data() + (m.where.out_begin + n) * ranks + m.rank_begin);
    }
    const auto widen = [](std::pair<int64_t, int64_t>& range, int64_t begin, int64_t end) {
      range = {std::min(range.first, begin), std::max(range.second, end)};
    };
    constexpr int64_t kPanel = ops::cpu::kPanel;
    for (int64_t p = m.where.out_begin / kPanel; p * kPanel < out_end; ++p) {
      widen(update.ranks_of_outputs[static_cast<size_t>(p)], m.rank_begin, rank_end);
    }
    for (int64_t p = m.rank_begin / kPanel; p * kPanel < rank_end; ++p) {
      widen(update.outputs_of_ranks[static_cast<size_t>(p)], m.where.out_begin, out_end);
    }
  }
  update.a = ops::PackedMatrix::pack(ranks, shape.inputs, a.data());
  update.b = ops::PackedMatrix::pack(shape.outputs, ranks, b.data());
  update.scale = scale;
  return update;
}

}  // namespace

Adapter::Adapter(const ModelConfig& config, const std::map<std::string, LoraMatrices>& matrices,
                 float scale)
    : sites_(static_cast<size_t>(config.num_layers)) {
  static std::atomic<uint64_t> next_version{1};
  version_ = next_version.fetch_add(1);
  require(std::isfinite(scale), "adapter: scale must be finite, got ", scale);
  require(!matrices.empty(), "adapter: no module given; expected at least one (A, B) pair");
  const std::vector<LoraModule> known = lora_modules(config);
  for (const auto& [path, m] : matrices) {
    const auto found = std::find_if(known.begin(), known.end(),
                                    [&path = path](const LoraModule& k) { return k.path == path; });
    require(found != known.end(), "adapter: the model has no linear '", path, "'; it has ",
            known.front().path, " ... ", known.back().path);
    require(m.rank >= 1, "adapter: '", path, "' has rank ", m.rank, ", expected at least 1");
    Site& site = sites_[static_cast<size_t>(found->layer)][static_cast<size_t>(found->site)];
    const Module* before =
        site.modules.empty() ? nullptr : &modules_[static_cast<size_t>(site.modules.back())];
    site.modules.push_back(static_cast<int>(modules_.size()));
    modules_.push_back({*found, m.rank, before == nullptr ? 0 : before->rank_begin + before->rank});
    max_rank_ = std::max(max_rank_, m.rank);
  }
  for (auto& layer : sites_) {
    for (Site& site : layer) {
      if (site.modules.empty()) continue;
      std::vector<Module> modules;
      std::vector<const LoraMatrices*> sources;
      for (const int index : site.modules) {
        modules.push_back(modules_[static_cast<size_t>(index)]);
        sources.push_back(&matrices.at(modules.back().where.path));
      }
      site.update = stack(config, modules, sources, scale);
    }
  }
}

int64_t Adapter::layer_ranks(int64_t layer) const {
  int64_t ranks = 0;
  for (const Site& site : sites_[static_cast<size_t>(layer)]) {
    if (!site.modules.empty()) ranks += site.update.ranks();
  }
  return ranks;
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
}

}  // namespace alignpro::model
