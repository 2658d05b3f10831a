#pragma once

// A tiny random model of any shape, and adapters for it.

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/model/adapter.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/model.h"
#include "alignpro/ops/cpu_ops.h"

namespace alignpro::model {

// Weights are drawn from a hash of their place: no file, the same values in every test.
class RandomCheckpoint : public Checkpoint {
 public:
  explicit RandomCheckpoint(ModelConfig config) : config_(std::move(config)) {}

  const ModelConfig& config() const override { return config_; }
  std::vector<ops::QuantizedRow> linear_rows(int64_t layer, LinearSite site) const override {
    const LinearShape shape = linear_shape(config_, site);
    return rows(static_cast<uint32_t>(100 + layer * 4 + static_cast<int>(site)), shape.outputs,
                shape.inputs, 1.3f / std::sqrt(static_cast<float>(shape.inputs)));
  }
  std::vector<ops::QuantizedRow> embedding_rows() const override {
    return rows(1, config_.vocab_size, config_.hidden_size, 1.0f);
  }
  std::vector<ops::QuantizedRow> head_rows() const override {
    return rows(2, config_.vocab_size, config_.hidden_size, 0.5f);
  }
  std::vector<float> read_norm(int64_t layer, NormSite site) const override {
    const bool head = site == NormSite::kQ || site == NormSite::kK;
    return around_one(static_cast<uint32_t>(5000 + layer * 4 + static_cast<int>(site)),
                      head ? config_.head_dim : config_.hidden_size);
  }
  std::vector<float> read_final_norm() const override { return around_one(3, config_.hidden_size); }
  std::vector<float> read_qkv_bias(int64_t layer) const override {
    if (!config_.qkv_bias) return {};
    std::vector<float> bias(static_cast<size_t>(config_.qkv_size()));
    fill(static_cast<uint32_t>(9000 + layer), 0, 1, config_.qkv_size(), 0.3f, bias.data());
    return bias;
  }

 private:
  static void fill(uint32_t seed, int64_t begin, int64_t end, int64_t width, float scale,
                   float* out) {
    for (int64_t row = begin; row < end; ++row) {
      std::mt19937 generator(seed * 7919u + static_cast<uint32_t>(row));
      std::normal_distribution<float> draw(0.0f, scale);
      for (int64_t i = 0; i < width; ++i) *out++ = draw(generator);
    }
  }
  std::vector<ops::QuantizedRow> rows(uint32_t seed, int64_t count, int64_t width,
                                      float scale) const {
    std::vector<float>& values = matrices_[seed];
    values.resize(static_cast<size_t>(count * width));
    fill(seed, 0, count, width, scale, values.data());
    std::vector<ops::QuantizedRow> stored;
    for (int64_t row = 0; row < count; ++row) {
      stored.push_back(
          {reinterpret_cast<const std::byte*>(values.data() + row * width), DType::kF32});
    }
    return stored;
  }
  static std::vector<float> around_one(uint32_t seed, int64_t size) {
    std::vector<float> values(static_cast<size_t>(size));
    fill(seed, 0, 1, size, 0.2f, values.data());
    for (float& v : values) v += 1.0f;
    return values;
  }

  ModelConfig config_;
  mutable std::map<uint32_t, std::vector<float>> matrices_;
};

inline ModelConfig tiny(bool bias, bool qk_norm, bool fused) {
  ModelConfig c;
  c.vocab_size = 111;
  c.hidden_size = 40;
  c.intermediate_size = 52;
  c.num_layers = 3;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 12;
  c.context_length = 128;
  c.tied_head = !bias;
  c.qkv_bias = bias;
  c.qk_norm = qk_norm;
  c.fused_projections = fused;
  c.rope.rotary_dim = 12;
  c.eos_ids = {0};
  return c;
}

// Gemma 3's switches: a global layer between two local ones.
inline ModelConfig tiny_gemma() {
  ModelConfig c = tiny(false, true, false);
  c.output_norms = c.gelu = c.scaled_embedding = true;
  c.query_scalar = 10.0;
  c.sliding_window = 9;
  c.local_layers = {0, 2};
  c.local_rope = c.rope;
  c.rope.theta = 1e6;
  return c;
}

inline std::shared_ptr<Model> cpu_model(const ModelConfig& config, int threads = 2,
                                        ops::Arithmetic arithmetic = ops::Arithmetic::kFloat32,
                                        DType kv_dtype = DType::kF32) {
  return Model::from(RandomCheckpoint(config), ops::make_cpu_device(threads, arithmetic, kv_dtype),
                     0);
}

// LoRA matrices for every linear.
struct LoraStore {
  int64_t rank;
  std::map<std::string, std::pair<std::vector<float>, std::vector<float>>> values;

  LoraStore(const ModelConfig& config, int64_t rank_, uint32_t seed, bool zero_b) : rank(rank_) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> draw(0.0f, 0.2f);
    for (const LoraModule& m : lora_modules(config)) {
      std::vector<float> a(static_cast<size_t>(rank * m.inputs));
      std::vector<float> b(static_cast<size_t>(rank * m.outputs));
      for (float& x : a) x = draw(generator);
      for (float& x : b) x = zero_b ? 0.0f : draw(generator);
      values[m.path] = {a, b};
    }
  }
  std::shared_ptr<Adapter> adapter(const ModelConfig& config,
                                   const std::vector<float>& soft_rows = {}) const {
    std::map<std::string, LoraMatrices> views;
    for (const auto& [path, pair] : values) {
      views[path] = {rank, pair.first.data(), pair.second.data()};
    }
    return std::make_shared<Adapter>(config, views, 0.7f, soft_rows);
  }
};

}  // namespace alignpro::model
