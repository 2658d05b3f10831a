// The engine driven by a model that a reader can compute by hand: its next token is a hash of the
// history it reads back from the KV pool, so that a wrong block, slot or prefix shows as a wrong
// token. Long because every case needs the same fake model and builders.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/core/rng.h"
#include "alignpro/core/trace.h"
#include "alignpro/engine/client.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/ops/cpu_ops.h"
#include "alignpro/ops/mix_rows.h"

namespace alignpro::engine {
namespace {

using model::kKvBlock;
using Tokens = std::vector<int32_t>;
using Handle = std::shared_ptr<Sequence>;

constexpr int32_t kVocab = 97;
constexpr int32_t kEos = 96;
constexpr float kUndrawable = 0.125f;  // a temperature at which HashModel draws nothing

model::ModelConfig tiny_config() {
  model::ModelConfig config;
  config.vocab_size = kVocab;
  config.hidden_size = 2;
  config.intermediate_size = 4;
  config.num_layers = 2;
  config.num_heads = 1;
  config.num_kv_heads = 1;
  config.head_dim = 2;
  config.context_length = 256;
  config.eos_ids = {kEos};
  return config;
}

// One number for a history under a weight version; 24 bits, exact in a float.
uint32_t extend_hash(uint32_t hash, int32_t token, int64_t position, uint64_t version) {
  const auto mixed = philox4x32({hash, static_cast<uint32_t>(token),
                                 static_cast<uint32_t>(position), static_cast<uint32_t>(version)},
                                {1, 2});
  return mixed[0] & 0xFFFFFF;
}

// Greedy: the hash's residue. Otherwise the key of the draw decides with it. Of a text that repeats
// itself, seven of eight tokens are a function of the one before.
int32_t choose(uint32_t hash, double temperature, double uniform, int32_t last, bool repeats) {
  const auto shift = temperature == 0.0 ? 0 : static_cast<uint32_t>(uniform * kVocab);
  if (repeats && (hash + shift) % 8 != 0) return (last * 5 + 1) % kEos;
  return static_cast<int32_t>((hash + shift) % kVocab);
}

// A language model whose only memory is the KV pool: K holds the token, V its position and weight
// version, and the next token is a hash of all that is read back. A block shared, copied, evicted
// or reused wrongly changes what it says. NaN where it reads what no row has written.
class HashModel final : public LanguageModel {
 public:
  explicit HashModel(int64_t context = 256, bool repeats = false)
      : context_(context), repeats_(repeats) {}

  mutable std::atomic<int> forwards{0};
  mutable std::atomic<int64_t> rows{0};
  mutable std::atomic<bool> fail_next{false};
  mutable std::atomic<int32_t> overflows{-1};  // a token that no forward takes
  mutable std::atomic<bool> computing{false};  // as a device that is still at its step
  mutable std::vector<int64_t> row_counts;     // of each forward
  std::chrono::microseconds delay{0};

  const model::ModelConfig& config() const override { return config_; }
  int64_t context_length() const override { return context_; }

  int64_t kv_block_bytes() const override {
    return model::KvPool::block_bytes(config_.num_layers, 1, config_.head_dim, DType::kF32);
  }
  int64_t kv_share_bytes() const override { return int64_t{1} << 20; }
  ops::RowCost row_cost() const override { return {0.0, false}; }
  std::unique_ptr<Session> make_session(int64_t kv_blocks) const override;

  void forward(const model::Batch& batch, model::KvPool& kv, float* hidden) const {
    forwards.fetch_add(1);
    rows.fetch_add(batch.rows());
    row_counts.push_back(batch.rows());
    if (delay.count() > 0) std::this_thread::sleep_for(delay);
    if (fail_next.exchange(false)) throw std::runtime_error("forward: broken");
    if (std::count(batch.tokens.begin(), batch.tokens.end(), overflows.load()) > 0) {
      throw NumericError("kv_write: overflow");
    }
    check_shape(batch);
    for (const model::KvWrite& write : batch.kv_writes) {
      for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
        float* keys = kv.layer(layer).keys<float>(write.block, 0);
        float* values = kv.layer(layer).values<float>(write.block, 0);
        const auto row = static_cast<size_t>(write.row);
        keys[0 * kKvBlock + write.slot] = static_cast<float>(batch.tokens[row] + 1);
        keys[1 * kKvBlock + write.slot] = static_cast<float>(layer);
        values[write.slot * 2 + 0] = static_cast<float>(batch.positions[row]);
        values[write.slot * 2 + 1] = static_cast<float>(version_of(batch, write.row));
      }
    }
    size_t out = 0;
    for (const model::Segment& segment : batch.segments) {
      const int64_t last = segment.row_begin + segment.row_count - 1;
      if (out == batch.output_rows.size() || batch.output_rows[out] != last) continue;
      const uint64_t version = version_of(batch, last);
      hidden[2 * out] = read_back(kv, segment, version);
      hidden[2 * out + 1] = static_cast<float>(batch.tokens[static_cast<size_t>(last)]);
      ++out;
    }
    if (out != batch.output_rows.size()) throw Error("output_rows: not the ends of segments");
  }

  void sample(const float* hidden, std::span<const ops::SampleRow> sample_rows,
              std::span<ops::SampledToken> out) const {
    for (size_t i = 0; i < sample_rows.size(); ++i) {
      if (std::isnan(hidden[2 * i])) throw NumericError("KV that was never written, or not ours");
      const ops::SampleRow& row = sample_rows[i];
      if (row.temperature == kUndrawable) {
        out[i] = {};
        continue;
      }
      auto token = choose(static_cast<uint32_t>(hidden[2 * i]), row.temperature, row.uniform,
                          static_cast<int32_t>(hidden[2 * i + 1]), repeats_);
      while (std::count(row.banned.begin(), row.banned.end(), token) > 0) {
        token = (token + 1) % kVocab;
      }
      out[i] = {token, -hidden[2 * i], 1.0f};
    }
  }

 private:
  static uint64_t version_of(const model::Batch& batch, int64_t row) {
    for (const model::AdapterRange& range : batch.adapters) {
      if (row >= range.row_begin && row < range.row_end) return range.adapter->version();
    }
    return 0;
  }

  // Both layers must hold the same token at the right position, written by the same weights.
  float read_back(const model::KvPool& kv, const model::Segment& segment, uint64_t version) const {
    uint32_t hash = 0;
    for (int64_t position = 0; position < segment.position + segment.row_count; ++position) {
      const int32_t block = segment.blocks[static_cast<size_t>(position / kKvBlock)];
      const int64_t slot = position % kKvBlock;
      const float token = kv.layer(0).keys<float>(block, 0)[slot];
      for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
        const float* keys = kv.layer(layer).keys<float>(block, 0);
        const float* values = kv.layer(layer).values<float>(block, 0);
        const bool ok = token >= 1.0f && keys[slot] == token &&
                        keys[kKvBlock + slot] == static_cast<float>(layer) &&
                        values[slot * 2] == static_cast<float>(position) &&
                        values[slot * 2 + 1] == static_cast<float>(version);
        if (!ok) return std::numeric_limits<float>::quiet_NaN();
      }
      hash = extend_hash(hash, static_cast<int32_t>(token) - 1, position, version);
    }
    return static_cast<float>(hash);
  }

  static void check_shape(const model::Batch& batch) {
    int64_t row = 0;
    for (const model::Segment& segment : batch.segments) {
      if (segment.row_begin != row || segment.row_count < 1) throw Error("segments: a gap");
      for (int64_t i = 0; i < segment.row_count; ++i) {
        if (batch.positions[static_cast<size_t>(row + i)] != segment.position + i) {
          throw Error("positions: not consecutive");
        }
      }
      row += segment.row_count;
    }
    if (row != batch.rows() || batch.kv_writes.size() != batch.tokens.size()) {
      throw Error("rows: not all covered");
    }
    int64_t end = 0;
    for (const model::AdapterRange& range : batch.adapters) {
      if (range.row_begin < end || range.row_end <= range.row_begin) throw Error("ranges: overlap");
      end = range.row_end;
    }
    if (!std::is_sorted(batch.output_rows.begin(), batch.output_rows.end())) {
      throw Error("output_rows: not ascending");
    }
  }

  model::ModelConfig config_ = tiny_config();
  int64_t context_;
  bool repeats_;
};

class HashSession final : public Session {
 public:
  HashSession(const HashModel& model, int64_t kv_blocks)
      : model_(model),
        kv_(*ops_, model.config().num_layers, 1, model.config().head_dim, kv_blocks, DType::kF32) {}

  void copy_slots(int64_t from, int64_t to, int64_t slots) override {
    kv_.copy_slots(from, to, slots);
  }
  void forward(const model::Batch& batch) override {
    hidden_.assign(batch.output_rows.size() * 2, 0.0f);
    model_.forward(batch, kv_, hidden_.data());
    const ops::RowSums sums = batch.sums.view();
    if (sums.count() == 0) return;
    std::vector<float> mixed(static_cast<size_t>(2 * sums.count()));
    ops::mix_rows(sums, 2, hidden_.data(), 2, mixed.data(), 2);
    hidden_ = mixed;
  }
  void draw(std::span<const ops::SampleRow> rows) override {
    drawn_.resize(rows.size());
    model_.sample(hidden_.data(), rows, drawn_);
  }
  bool ready() const override { return !model_.computing; }
  void collect(std::span<ops::SampledToken> out) override {
    model_.computing = false;
    std::copy(drawn_.begin(), drawn_.end(), out.begin());
  }

 private:
  const HashModel& model_;
  const std::unique_ptr<ops::Device> device_ = ops::make_cpu_device(1);
  const std::unique_ptr<ops::Ops> ops_ = device_->make_ops();
  model::KvPool kv_;
  std::vector<float> hidden_;
  std::vector<ops::SampledToken> drawn_;
};

std::unique_ptr<Session> HashModel::make_session(int64_t kv_blocks) const {
  return std::make_unique<HashSession>(*this, kv_blocks);
}

constexpr int64_t kBlockBytes = 2 * 2 * 2 * kKvBlock * 4;  // layers, K and V, head_dim

// What the model says when nothing is shared, batched or cached: the specification.
// Of several weights, the next token is that of their mean hash.
Tokens expected_tokens(const Tokens& prompt, const SamplingParams& params,
                       const std::vector<model::Lane>& lanes, bool repeats = false) {
  Tokens tokens = prompt;
  Tokens out;
  while (static_cast<int64_t>(out.size()) < params.max_new_tokens) {
    double sum = 0.0;
    for (const model::Lane& lane : lanes) {
      uint32_t hash = 0;
      for (size_t i = 0; i < tokens.size(); ++i) {
        hash = extend_hash(hash, tokens[i], static_cast<int64_t>(i), lane.version);
      }
      sum += double{lane.weight} * hash;
    }
    const auto hash = static_cast<uint32_t>(static_cast<float>(sum));
    const double uniform =
        keyed_uniform(params.seed, params.sample, static_cast<uint32_t>(tokens.size()));
    int32_t token = choose(hash, params.temperature, uniform, tokens.back(), repeats);
    const auto is_stop = [&](int32_t id) {
      return (id == kEos && !params.ignore_eos) ||
             std::count(params.stop_token_ids.begin(), params.stop_token_ids.end(), id) > 0;
    };
    while (static_cast<int64_t>(out.size()) < params.min_new_tokens && is_stop(token)) {
      token = (token + 1) % kVocab;
    }
    out.push_back(token);
    tokens.push_back(token);
    if (is_stop(token)) break;
  }
  return out;
}

Tokens expected_tokens(const Tokens& prompt, const SamplingParams& params, uint64_t version = 0,
                       bool repeats = false) {
  return expected_tokens(prompt, params, {{nullptr, version, 1.0f}}, repeats);
}

struct Bench {
  std::shared_ptr<HashModel> model;
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Client> client;

  explicit Bench(int64_t blocks = 256, int64_t max_rows = 64, bool prefix_cache = true,
                 int64_t context = 256, bool repeats = false)
      : model(std::make_shared<HashModel>(context, repeats)) {
    EngineOptions options;
    options.kv_cache_bytes = blocks * kBlockBytes;
    options.max_batch_rows = max_rows;
    options.prefix_cache = prefix_cache;
    engine = std::make_shared<Engine>(std::shared_ptr<const LanguageModel>(model), options);
    client = std::make_shared<Client>(engine);
  }
  Handle submit(const Tokens& prompt, const SamplingParams& params, model::Mixture of = nullptr) {
    return client->submit(prompt, params, std::move(of));
  }
  void run(const std::vector<Handle>& handles) {
    client->run();
    for (const Handle& handle : handles) {
      if (handle->error()) std::rethrow_exception(handle->error());
    }
  }
};

SamplingParams params_of(int64_t max_new, uint64_t seed = 0) {
  SamplingParams params;
  params.max_new_tokens = max_new;
  params.seed = seed;
  return params;
}

Tokens prompt_of(int64_t size, int32_t start) {
  Tokens tokens;
  for (int64_t i = 0; i < size; ++i) {
    tokens.push_back(static_cast<int32_t>((start + 7 * i) % (kVocab - 1)));
  }
  return tokens;
}

// A LoRA of rank 1 on one module; only its version matters here.
std::shared_ptr<const model::Adapter> new_adapter() {
  const model::ModelConfig config = tiny_config();
  const auto module = model::lora_modules(config).front();
  const std::vector<float> a(static_cast<size_t>(module.inputs), 0.5f);
  const std::vector<float> b(static_cast<size_t>(module.outputs), 0.5f);
  return std::make_shared<const model::Adapter>(
      config, std::map<std::string, model::LoraMatrices>{{module.path, {1, a.data(), b.data()}}},
      1.0f);
}

// ---------------------------------------------------------------- KvPool

TEST_CASE("kv pool copies the first slots of every layer and head") {
  const auto device = ops::make_cpu_device(1);
  const auto on = device->make_ops();
  model::KvPool pool(*on, 3, 2, 5, 4, DType::kF32);
  const auto fill = [&](int64_t block, float base) {
    for (int64_t layer = 0; layer < 3; ++layer) {
      for (int64_t head = 0; head < 2; ++head) {
        for (int64_t i = 0; i < 5 * kKvBlock; ++i) {
          pool.layer(layer).keys<float>(block, head)[i] =
              base + static_cast<float>(layer * 1000 + head * 500 + i);
          pool.layer(layer).values<float>(block, head)[i] =
              -pool.layer(layer).keys<float>(block, head)[i];
        }
      }
    }
  };
  fill(1, 10000.0f);
  fill(2, 20000.0f);
  pool.copy_slots(1, 2, 3);
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t head = 0; head < 2; ++head) {
      for (int64_t slot = 0; slot < kKvBlock; ++slot) {
        for (int64_t lane = 0; lane < 5; ++lane) {
          const float base =
              (slot < 3 ? 10000.0f : 20000.0f) + static_cast<float>(layer * 1000 + head * 500);
          CHECK_EQ(pool.layer(layer).keys<float>(2, head)[lane * kKvBlock + slot],
                   base + static_cast<float>(lane * kKvBlock + slot));
          CHECK_EQ(pool.layer(layer).values<float>(2, head)[slot * 5 + lane],
                   -(base + static_cast<float>(slot * 5 + lane)));
        }
      }
    }
  }
  model::KvPool halves(*on, 2, 2, 3, 2, DType::kF16);
  const int64_t bytes = model::KvPool::block_bytes(2, 2, 3, DType::kF16);
  CHECK_EQ(bytes, 2 * 2 * 2 * 3 * 16 * 2);
  for (int64_t i = 0; i < bytes / 2; ++i) {
    halves.layer(0).keys<uint16_t>(0, 0)[i] = static_cast<uint16_t>(i + 1);
  }
  halves.copy_slots(0, 1, 5);
  for (int64_t slot = 0; slot < kKvBlock; ++slot) {
    for (int64_t lane = 0; lane < 3; ++lane) {
      const auto at = [&](int64_t block) {
        return std::pair(halves.layer(1).keys<uint16_t>(block, 1)[lane * kKvBlock + slot],
                         halves.layer(1).values<uint16_t>(block, 1)[slot * 3 + lane]);
      };
      CHECK(at(1) == (slot < 5 ? at(0) : std::pair<uint16_t, uint16_t>(0, 0)));
    }
  }
  CHECK_THROWS_WITH_AS((void)(model::KvPool(*on, 1, 1, 1, 0, DType::kF32)),
                       doctest::Contains("positive"), InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(model::KvPool(*on, 1 << 20, 1 << 20, 1 << 20, 1 << 20, DType::kF32)),
                       doctest::Contains("overflow"), InvalidArgument);
}

// ---------------------------------------------------------------- PrefixCache

// Acquires, pretends to compute the whole prompt, publishes.
PrefixCache::BlockTable block_table_of(PrefixCache& cache, uint64_t version, const Tokens& tokens,
                                       int64_t blocks) {
  auto block_table = cache.acquire(version, std::span(tokens).first(tokens.size() - 1), blocks);
  CHECK(block_table.has_value());
  if (!block_table) return {};
  cache.publish(*block_table, tokens, true);
  return *block_table;
}

TEST_CASE("cache shares whole blocks and copies the tail") {
  PrefixCache cache(16, true);
  const Tokens prompt = prompt_of(40, 1);
  auto first = block_table_of(cache, 0, prompt, 4);
  CHECK_EQ(first.cached, 0);
  CHECK_EQ(cache.blocks_in_use(), 4);

  auto twin = *cache.acquire(0, std::span(prompt).first(39), 4);
  CHECK_EQ(twin.cached, 39);  // 32 shared, 7 copied; the 40th is computed
  CHECK_EQ(twin.copy_slots, 7);
  CHECK_EQ(twin.copy_from, first.blocks[2]);
  CHECK_EQ(twin.copy_to, twin.blocks[2]);
  CHECK_EQ(twin.blocks[0], first.blocks[0]);
  CHECK_EQ(twin.blocks[1], first.blocks[1]);
  CHECK(twin.blocks[2] != first.blocks[2]);
  CHECK_EQ(cache.blocks_in_use(), 6);

  Tokens diverging = prompt;
  diverging[20] = 0;
  CHECK_EQ(cache.cached_tokens(0, diverging), 20);  // one block and 4 tokens of the second
  CHECK_EQ(cache.cached_tokens(1, prompt), 0);      // other weights
  CHECK_EQ(cache.cached_tokens(0, std::span(prompt).first(16)), 16);
  CHECK_EQ(cache.cached_tokens(0, std::span(prompt).first(15)), 15);
  cache.release(first);
  cache.release(twin);
  CHECK_EQ(cache.blocks_in_use(), 0);
}

TEST_CASE("cache changes to the twin that was published first") {
  PrefixCache cache(16, true);
  const Tokens prompt = prompt_of(32, 1);
  auto a = *cache.acquire(0, std::span(prompt).first(31), 3);
  auto b = *cache.acquire(0, std::span(prompt).first(31), 3);
  CHECK_EQ(cache.blocks_in_use(), 6);
  cache.publish(a, prompt, true);
  cache.publish(b, prompt, true);
  CHECK_EQ(b.blocks[0], a.blocks[0]);
  CHECK_EQ(b.blocks[1], a.blocks[1]);
  CHECK(b.blocks[2] != a.blocks[2]);
  CHECK_EQ(cache.blocks_in_use(), 4);
  cache.release(a);
  CHECK_EQ(cache.blocks_in_use(), 3);
  cache.release(b);
}

TEST_CASE("cache fills a tail and merges equal ones") {
  PrefixCache cache(16, true);
  const Tokens prompt = prompt_of(10, 1);
  auto a = block_table_of(cache, 0, prompt, 2);
  auto b = *cache.acquire(0, std::span(prompt).first(9), 2);
  CHECK_EQ(b.copy_slots, 9);
  cache.publish(b, prompt, true);
  Tokens longer = prompt;
  for (int32_t token = 50; token < 56; ++token) longer.push_back(token);
  cache.publish(b, longer, false);  // b's block is full first
  cache.publish(a, longer, false);  // the same tokens: a's tail gives way
  CHECK_EQ(a.blocks[0], b.blocks[0]);
  CHECK_EQ(cache.blocks_in_use(), 3);
  CHECK_EQ(cache.cached_tokens(0, longer), 16);
  cache.release(a);
  cache.release(b);
  CHECK_EQ(cache.blocks_in_use(), 0);
  CHECK_EQ(cache.blocks_free() + cache.blocks_cached(), 16);
}

TEST_CASE("cache evicts the least recently used leaf and keeps a quarter") {
  PrefixCache cache(16, true);
  const Tokens old_prompt = prompt_of(32, 1), new_prompt = prompt_of(32, 2);
  auto a = block_table_of(cache, 0, old_prompt, 2);
  auto b = block_table_of(cache, 0, new_prompt, 2);
  cache.release(a);
  cache.release(b);
  CHECK_EQ(cache.blocks_cached(), 4);                       // a quarter of 16
  auto c = block_table_of(cache, 0, prompt_of(32, 3), 13);  // takes 12 free ones and evicts one
  CHECK_EQ(cache.cached_tokens(0, old_prompt), 16);         // the leaf of the older path went
  CHECK_EQ(cache.cached_tokens(0, new_prompt), 32);
  CHECK(!cache.acquire(0, prompt_of(8, 4), 4).has_value());  // 3 idle blocks are all there is
  auto d = cache.acquire(0, prompt_of(8, 4), 3);
  CHECK(d.has_value());
  CHECK_EQ(cache.cached_tokens(0, new_prompt), 0);
  cache.release(*d);
  cache.release(c);
  CHECK_EQ(cache.blocks_in_use(), 0);
  CHECK(cache.blocks_cached() <= 4);
}

TEST_CASE("cache recomputes a tail rather than refuse") {
  PrefixCache cache(4, true);
  const Tokens prompt = prompt_of(10, 1);
  auto a = block_table_of(cache, 0, prompt, 1);
  cache.release(a);
  CHECK_EQ(cache.blocks_cached(), 1);
  auto all = cache.acquire(0, std::span(prompt).first(9), 4);  // needs the very block it could copy
  CHECK(all.has_value());
  CHECK_EQ(all->copy_slots, 0);
  CHECK_EQ(all->cached, 0);
}

TEST_CASE("cache off shares nothing") {
  PrefixCache cache(8, false);
  const Tokens prompt = prompt_of(33, 1);
  auto a = block_table_of(cache, 0, prompt, 3);
  CHECK_EQ(cache.cached_tokens(0, prompt), 0);
  cache.release(a);
  CHECK_EQ(cache.blocks_free(), 8);
}

// ---------------------------------------------------------------- Engine

TEST_CASE("tokens depend on the request alone") {
  struct Case {
    Tokens prompt;
    SamplingParams params;
    std::shared_ptr<const model::Adapter> adapter;
  };
  const auto adapter = new_adapter();
  const auto other = new_adapter();
  CHECK(adapter->version() != other->version());
  std::vector<Case> cases;
  std::mt19937 random(5);
  for (int i = 0; i < 60; ++i) {
    Case c;
    // Prompts of a few families, so that prefixes are shared and diverge inside blocks.
    c.prompt =
        prompt_of(1 + static_cast<int64_t>(random() % 70), static_cast<int32_t>(random() % 3));
    if (random() % 3 == 0) c.prompt.back() = 95;
    c.params = params_of(static_cast<int64_t>(random() % 40), random() % 2);
    c.params.sample = random() % 3;
    c.params.temperature = random() % 4 == 0 ? 0.0f : 1.0f;
    c.params.ignore_eos = random() % 2 == 0;
    c.params.min_new_tokens = c.params.max_new_tokens / 2;
    const auto which = random() % 3;
    c.adapter = which == 0 ? nullptr : which == 1 ? adapter : other;
    cases.push_back(c);
  }
  for (const bool prefix_cache : {true, false}) {
    for (const int64_t max_rows : {1, 7, 64, 1000}) {
      for (const int64_t blocks : {8, 20, 400}) {
        Bench bench(blocks, max_rows, prefix_cache);
        std::shuffle(cases.begin(), cases.end(), random);
        std::vector<Handle> handles;
        for (const Case& c : cases) handles.push_back(bench.submit(c.prompt, c.params, c.adapter));
        bench.run(handles);
        for (size_t i = 0; i < cases.size(); ++i) {
          const Case& c = cases[i];
          const uint64_t version = c.adapter == nullptr ? 0 : c.adapter->version();
          const Tokens expected = expected_tokens(c.prompt, c.params, version);
          const Output output = handles[i]->read(0);
          CHECK_EQ(output.tokens, expected);
          CHECK_EQ(output.logprobs.size(), expected.size());
          CHECK_EQ(output.kept_mass.size(), expected.size());
          const bool stopped = !expected.empty() && expected.back() == kEos && !c.params.ignore_eos;
          CHECK_EQ(handles[i]->finish_reason(),
                   stopped ? FinishReason::kStop : FinishReason::kLength);
        }
        const EngineStats stats = bench.engine->stats();
        CHECK(bench.engine->idle());
        CHECK_EQ(stats.kv_blocks_in_use, 0);
        CHECK(stats.kv_blocks_cached <= blocks / 4);
        CHECK((prefix_cache || stats.cached_tokens == 0));
        for (const int64_t count : bench.model->row_counts) CHECK(count <= max_rows);
      }
    }
  }
}

// Prompts, lengths, stops and limits that differ, of one adapter and of several, together.
TEST_CASE("a mixture is drawn from all of its weights, whoever shares the batch") {
  const auto first = new_adapter(), second = new_adapter();
  const std::vector<model::Mixture> all = {
      nullptr,
      first,
      model::Mixture({{nullptr, 0.5}, {first, 0.5}}),
      model::Mixture({{second, 0.75}, {first, 0.25}}),
      model::Mixture({{first, 0.25}, {nullptr, 0.5}, {second, 0.25}}),
  };
  std::mt19937 random(11);
  for (const bool prefix_cache : {true, false}) {
    for (const int64_t max_rows : {3, 7, 64}) {
      for (const int64_t blocks : {21, 40, 400}) {
        Bench bench(blocks, max_rows, prefix_cache);
        std::vector<Handle> handles, cancelled;
        for (int i = 0; i < 60; ++i) {
          SamplingParams params = params_of(static_cast<int64_t>(random() % 40), random() % 2);
          params.sample = random() % 3;
          params.temperature = random() % 4 == 0 ? 0.0f : 1.0f;
          params.ignore_eos = random() % 2 == 0;
          if (random() % 3 == 0) params.stop_token_ids = {static_cast<int32_t>(random() % 96)};
          const Tokens prompt = prompt_of(1 + static_cast<int64_t>(random() % 70),
                                          static_cast<int32_t>(random() % 3));
          handles.push_back(bench.submit(prompt, params, all[random() % all.size()]));
          if (random() % 8 == 0) {
            params.deadline_seconds = random() % 2 == 0 ? 1e-6 : 0.0;
            cancelled.push_back(bench.submit(prompt, params, all[random() % all.size()]));
          }
        }
        for (int steps = 0; steps < 3; ++steps) bench.engine->step();
        for (const Handle& handle : cancelled) handle->cancel();
        bench.run(handles);
        for (const Handle& handle : handles) {
          const Request& request = handle->request();
          const Tokens expected = expected_tokens(request.prompt, request.params, request.lanes);
          CHECK_EQ(handle->read(0).tokens, expected);
          CHECK_EQ(handle->read(0).logprobs.size(), expected.size());
        }
        const EngineStats stats = bench.engine->stats();
        CHECK(bench.engine->idle());
        CHECK_EQ(stats.kv_blocks_in_use, 0);
        CHECK((prefix_cache ? stats.cached_tokens > 0 : stats.cached_tokens == 0));
        for (const int64_t count : bench.model->row_counts) CHECK(count <= max_rows);
      }
    }
  }
}

TEST_CASE("samples of one prompt compute it once for each of a mixture's weights") {
  Bench bench(400, 64);
  const auto first = new_adapter(), second = new_adapter();
  const model::Mixture of({{first, 0.5}, {second, 0.5}});
  const Tokens prompt = prompt_of(50, 1);
  SamplingParams params = params_of(5);
  params.ignore_eos = true;
  std::vector<Handle> handles;
  for (params.sample = 0; params.sample < 8; ++params.sample) {
    handles.push_back(bench.submit(prompt, params, of));
  }
  bench.run(handles);
  CHECK_EQ(bench.engine->stats().prefill_tokens, 2 * (50 + 7));
  CHECK_EQ(bench.engine->stats().cached_tokens, 2 * 7 * 49);
  CHECK_EQ(bench.engine->stats().decode_tokens, 8 * 5);
  CHECK_EQ(bench.engine->stats().drafted_tokens, 0);
  // Its lanes' entries are those of each adapter alone; of one they never saw there are none.
  bench.run({bench.submit(prompt, params, second)});
  CHECK_EQ(bench.engine->stats().cached_tokens, 2 * 7 * 49 + 49);
  const Handle partly =
      bench.submit(prompt, params, model::Mixture({{first, 0.5}, {nullptr, 0.5}}));
  bench.run({partly});
  CHECK_EQ(bench.engine->stats().cached_tokens, 2 * 7 * 49 + 49);
  CHECK_EQ(partly->read(0).tokens, expected_tokens(prompt, params, partly->request().lanes));
}

TEST_CASE("a mixture's members are one lane each") {
  const auto first = new_adapter(), second = new_adapter();
  const auto lanes = model::Mixture({{first, 0.75}, {nullptr, 0.0}, {second, 0.5}, {first, -0.25}});
  REQUIRE_EQ(lanes.lanes().size(), 2);
  CHECK_EQ(lanes.lanes()[0].version, first->version());
  CHECK_EQ(lanes.lanes()[0].weight, 0.5f);
  CHECK_EQ(lanes.lanes()[1].weight, 0.5f);
  const auto refused = [](const std::vector<model::Mixture::Member>& members, const char* text) {
    CHECK_THROWS_WITH_AS((void)(model::Mixture(members)), doctest::Contains(text), InvalidArgument);
  };
  refused({}, "at least one member, got none");
  refused({{first, 0.5}, {second, 0.6}}, "sum to 1, got a sum of 1.1");
  refused({{first, NAN}}, "finite weights, got nan");
  refused({{first, INFINITY}, {second, -INFINITY}}, "finite weights, got inf");
  const model::Mixture both({{first, 0.5}, {second, 0.5}});
  Bench narrow(64, 1), small(4, 64);
  CHECK_THROWS_WITH_AS((void)(narrow.submit({1}, params_of(1), both)),
                       doctest::Contains("a mixture of 2 takes as many rows a step"),
                       InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(small.submit(prompt_of(40, 0), params_of(1), both)),
                       doctest::Contains("needs 6 KV blocks in 2 lanes, the cache holds 4"),
                       InvalidArgument);
}

TEST_CASE("samples of one prompt compute it once") {
  for (const int64_t size : {3, 16, 17, 50, 200}) {
    Bench bench(400, 64);
    const Tokens prompt = prompt_of(size, 1);
    std::vector<Handle> handles;
    for (uint32_t sample = 0; sample < 8; ++sample) {
      SamplingParams params = params_of(5);
      params.ignore_eos = true;
      params.sample = sample;
      handles.push_back(bench.submit(prompt, params));
    }
    bench.run(handles);
    for (const Handle& handle : handles) {
      CHECK_EQ(handle->read(0).tokens, expected_tokens(prompt, handle->request().params));
    }
    const EngineStats stats = bench.engine->stats();
    CHECK_EQ(stats.prefill_tokens, size + 7);  // the last token again for each sibling
    CHECK_EQ(stats.cached_tokens, 7 * (size - 1));
    CHECK_EQ(stats.decode_tokens, 8 * 5);
  }
}

TEST_CASE("a common system prompt is computed once") {
  Bench bench(400, 64);
  const Tokens system = prompt_of(100, 1);
  std::vector<Handle> handles;
  for (int32_t user = 0; user < 6; ++user) {
    Tokens prompt = system;
    for (int32_t i = 0; i < 10; ++i) prompt.push_back((user * 11 + i) % 90);
    handles.push_back(bench.submit(prompt, params_of(3)));
  }
  bench.run(handles);
  CHECK_EQ(bench.engine->stats().prefill_tokens, 100 + 6 * 10);
}

TEST_CASE("new weights never see old entries") {
  Bench bench;
  const Tokens prompt = prompt_of(40, 1);
  const SamplingParams params = params_of(6);
  for (int version = 0; version < 4; ++version) {
    const auto adapter = new_adapter();  // the old one dies here
    const Handle handle = bench.submit(prompt, params, adapter);
    bench.run({handle});
    CHECK_EQ(handle->read(0).tokens, expected_tokens(prompt, params, adapter->version()));
    CHECK_EQ(bench.engine->stats().cached_tokens, 0);
  }
  const Handle base = bench.submit(prompt, params);
  bench.run({base});
  CHECK_EQ(base->read(0).tokens, expected_tokens(prompt, params));
}

TEST_CASE("a large request is not overtaken") {
  Bench bench(8, 64);
  const Handle small = bench.submit(prompt_of(60, 1), params_of(30));  // 6 of 8 blocks
  bench.client->step();
  SamplingParams large_params = params_of(100);
  large_params.ignore_eos = true;
  const Handle large = bench.submit(prompt_of(10, 2), large_params);  // 7: must wait
  const Handle later = bench.submit(prompt_of(10, 3), params_of(5));
  bench.client->step();
  CHECK_EQ(later->read(0).tokens.size(), size_t{0});
  bench.run({small, large, later});
  CHECK_EQ(large->read(0).tokens, expected_tokens(prompt_of(10, 2), large_params));
}

// Steps until a request of `size` tokens, behind `count` prompts of 200, has its one token.
int64_t steps_behind(int count, int64_t size, int64_t max_rows, bool prefix_cache) {
  Bench bench(4096, max_rows, prefix_cache);
  std::vector<Handle> long_ones;
  for (int i = 0; i < count; ++i)
    long_ones.push_back(bench.submit(prompt_of(200, i), params_of(2)));
  const Handle short_one = bench.submit(prompt_of(size, 90), params_of(1));
  int64_t steps = 0;
  for (; !short_one->finished(); ++steps) bench.engine->step();
  bench.client->run();
  for (const Handle& handle : long_ones) {
    CHECK_EQ(handle->read(0).tokens, expected_tokens(handle->request().prompt, params_of(2)));
  }
  CHECK_EQ(short_one->read(0).tokens, expected_tokens(prompt_of(size, 90), params_of(1)));
  // Nothing is lost by sharing: every step is full until the last prompts end.
  const int64_t rows = count * 200 + size;
  const auto& row_counts = bench.model->row_counts;
  CHECK(static_cast<int64_t>(row_counts.size()) <= rows / max_rows + 6);
  return steps;
}

TEST_CASE("a short request is not kept behind long prompts") {
  for (const bool prefix_cache : {true, false}) {
    // First come, first served took 25 steps behind 8 of them at 64 rows, and 9 at 256.
    CHECK_EQ(steps_behind(8, 10, 64, prefix_cache), 3);    // four shares of 16 rows a step
    CHECK_EQ(steps_behind(8, 10, 256, prefix_cache), 1);   // nine shares of 28
    CHECK_EQ(steps_behind(40, 10, 64, prefix_cache), 11);  // one round of 41
    CHECK_EQ(steps_behind(1, 10, 16, prefix_cache), 2);
    CHECK(steps_behind(40, 40, 64, prefix_cache) <= 3 * 11);
  }
}

TEST_CASE("bad requests are refused by name") {
  Bench bench(8, 64, true, 64);
  const auto submit = [&](Tokens prompt, SamplingParams params) {
    return bench.submit(prompt, params);
  };
  CHECK_THROWS_WITH_AS((void)(submit({}, params_of(1))), doctest::Contains("at least one token"),
                       InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(submit({1, kVocab}, params_of(1))),
                       doctest::Contains("got 97 at index 1"), InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(submit({1, -1}, params_of(1))),
                       doctest::Contains("prompt: index 1: id -1 names row 0 of a soft prompt, and "
                                         "there is no adapter"),
                       InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(submit(prompt_of(64, 0), params_of(1))),
                       doctest::Contains("context of 64"), InvalidArgument);
  Bench small(2, 64);
  CHECK_THROWS_WITH_AS(
      (void)(small.submit(prompt_of(20, 0), params_of(20))),
      doctest::Contains(("kv_cache_bytes to at least " + std::to_string(3 * kBlockBytes)).c_str()),
      InvalidArgument);
  const auto bad = [&](auto change, const char* text) {
    SamplingParams params = params_of(4);
    change(params);
    CHECK_THROWS_WITH_AS((void)(submit({1}, params)), doctest::Contains(text), InvalidArgument);
  };
  bad([](SamplingParams& p) { p.temperature = -1; }, "temperature");
  bad([](SamplingParams& p) { p.temperature = NAN; }, "temperature");
  bad([](SamplingParams& p) { p.top_k = -1; }, "top_k");
  bad([](SamplingParams& p) { p.top_p = 0; }, "top_p");
  bad([](SamplingParams& p) { p.top_p = 1.5f; }, "top_p");
  bad([](SamplingParams& p) { p.min_p = -0.1f; }, "min_p");
  bad([](SamplingParams& p) { p.max_new_tokens = -1; }, "max_new_tokens");
  bad([](SamplingParams& p) { p.min_new_tokens = 5; }, "min_new_tokens");
  bad([](SamplingParams& p) { p.stop_token_ids = {200}; }, "stop_token_ids");
  bad([](SamplingParams& p) { p.stop_token_ids = {-1}; }, "stop_token_ids");
  bad([](SamplingParams& p) { p.stop = {""}; }, "stop");
  bad([](SamplingParams& p) { p.stop = {"x"}; }, "set_token_bytes");
  bad([](SamplingParams& p) { p.deadline_seconds = -1; }, "deadline_seconds");
  CHECK(bench.engine->idle());
  CHECK_THROWS_WITH_AS((void)(Bench(0x7fffffff0, 64)), doctest::Contains("kv_cache_bytes"),
                       InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(Bench(8, 0)), doctest::Contains("max_batch_rows"), InvalidArgument);
}

TEST_CASE("length ends a sequence at the limit and at the context") {
  Bench bench(64, 64, true, 64);
  const Handle nothing = bench.submit({1, 2}, params_of(0));
  CHECK_EQ(nothing->finish_reason(), FinishReason::kLength);
  CHECK((bench.engine->idle() && !bench.client->idle()));
  const auto returned = bench.client->step();
  CHECK_EQ(returned.size(), size_t{1});
  CHECK(bench.client->idle());
  CHECK_EQ(bench.model->forwards.load(), 0);

  SamplingParams params = params_of(1 << 30);
  params.ignore_eos = true;
  const Handle full = bench.submit(prompt_of(60, 1), params);
  const Handle one = bench.submit(prompt_of(63, 1), params);
  bench.run({full, one});
  CHECK_EQ(full->read(0).tokens.size(), size_t{4});
  CHECK_EQ(full->finish_reason(), FinishReason::kLength);
  CHECK_EQ(one->read(0).tokens.size(), size_t{1});
}

TEST_CASE("stop ids and strings end a sequence") {
  Bench bench;
  const Tokens prompt = prompt_of(9, 1);
  SamplingParams params = params_of(40);
  params.ignore_eos = true;
  const Tokens free_run = expected_tokens(prompt, params);
  params.stop_token_ids = {free_run[7]};
  const auto first = std::find(free_run.begin(), free_run.end(), free_run[7]) - free_run.begin();
  const Handle by_id = bench.submit(prompt, params);
  bench.run({by_id});
  CHECK_EQ(by_id->finish_reason(), FinishReason::kStop);
  CHECK_EQ(by_id->read(0).tokens, Tokens(free_run.begin(), free_run.begin() + first + 1));
  CHECK(!by_id->stop_match().has_value());

  // Every token is "<id>": a stop string across the border of tokens 7 and 8.
  std::vector<std::string> pieces;
  for (int32_t id = 0; id < kVocab; ++id) pieces.push_back("<" + std::to_string(id) + ">");
  bench.engine->set_token_bytes(pieces);
  params.stop_token_ids = {};
  const std::string text6 = pieces[static_cast<size_t>(free_run[6])];
  const std::string text7 = pieces[static_cast<size_t>(free_run[7])];
  params.stop = {"never", text6 + text7.substr(0, 3)};
  const Handle by_text = bench.submit(prompt, params);
  bench.run({by_text});
  CHECK_EQ(by_text->finish_reason(), FinishReason::kStop);
  CHECK_EQ(by_text->read(0).tokens, Tokens(free_run.begin(), free_run.begin() + 8));
  int64_t begin = 0;
  for (int i = 0; i < 6; ++i) {
    begin += static_cast<int64_t>(pieces[static_cast<size_t>(free_run[i])].size());
  }
  CHECK(by_text->stop_match().has_value());
  CHECK_EQ(by_text->stop_match()->index, size_t{1});
  CHECK_EQ(by_text->stop_match()->begin, begin);

  params.min_new_tokens = 9;  // the only match lies before: it does not count
  const Handle late = bench.submit(prompt, params);
  bench.run({late});
  CHECK_EQ(late->finish_reason(), FinishReason::kLength);
  CHECK_EQ(late->read(0).tokens, free_run);

  params.min_new_tokens = 0;
  params.stop = {">", "<"};  // the earliest byte wins, not the first listed
  const Handle earliest = bench.submit(prompt, params);
  bench.run({earliest});
  CHECK_EQ(earliest->stop_match()->index, size_t{1});
  CHECK_EQ(earliest->stop_match()->begin, 0);
  CHECK_THROWS_WITH_AS((void)(bench.engine->set_token_bytes(std::vector<std::string>(98))),
                       doctest::Contains("97"), InvalidArgument);
}

TEST_CASE("cancel and deadline end waiting prefill and decode") {
  Bench bench(24, 4);
  const auto step = [&] { return bench.client->step(); };
  SamplingParams params = params_of(100);
  params.ignore_eos = true;
  const Handle decoding = bench.submit(prompt_of(2, 1), params);
  step();
  const Handle prefill = bench.submit(prompt_of(100, 2), params);
  const Handle waiting = bench.submit(prompt_of(100, 3), params);
  step();
  CHECK((decoding->read(0).tokens.size() == 2 && prefill->read(0).tokens.empty()));
  for (const Handle& handle : {waiting, prefill, decoding}) {
    handle->cancel();
    const auto finished = step();
    CHECK_EQ(finished.size(), size_t{1});
    CHECK_EQ(handle->finish_reason(), FinishReason::kCancelled);
  }
  CHECK_EQ(bench.engine->stats().kv_blocks_in_use, 0);
  CHECK(bench.engine->idle());

  params.deadline_seconds = 1e-9;
  const Handle late = bench.submit(prompt_of(2, 1), params);
  params.deadline_seconds = 0.02;
  bench.model->delay = std::chrono::milliseconds(2);
  const Handle partly = bench.submit(prompt_of(2, 1), params);
  bench.run({late, partly});
  CHECK_EQ(late->finish_reason(), FinishReason::kDeadline);
  CHECK(late->read(0).tokens.empty());
  CHECK_EQ(partly->finish_reason(), FinishReason::kDeadline);
  CHECK((!partly->read(0).tokens.empty() && partly->read(0).tokens.size() < 100));
}

TEST_CASE("followers of a cancelled leader proceed") {
  Bench bench(64, 8);
  const Tokens prompt = prompt_of(100, 1);
  const Handle leader = bench.submit(prompt, params_of(4));
  const Handle follower = bench.submit(prompt, params_of(4, 1));
  bench.client->step();
  bench.client->step();  // 16 positions: one block is visible
  leader->cancel();
  bench.run({follower});
  CHECK_EQ(follower->read(0).tokens, expected_tokens(prompt, params_of(4, 1)));
  CHECK_EQ(bench.engine->stats().prefill_tokens, 100);  // what the leader left was used
}

TEST_CASE("an error finishes what is in the engine and no more") {
  Bench bench;
  const Handle a = bench.submit(prompt_of(5, 1), params_of(10));
  const Handle b = bench.submit(prompt_of(5, 2), params_of(10));
  bench.model->fail_next = true;
  CHECK_THROWS_WITH_AS((void)(bench.run({a})), doctest::Contains("broken"), std::runtime_error);
  CHECK_EQ(b->finish_reason(), FinishReason::kFailed);
  CHECK_THROWS_WITH_AS((void)(bench.run({b})), doctest::Contains("broken"), std::runtime_error);
  CHECK(bench.engine->idle());
  CHECK_EQ(bench.engine->stats().kv_blocks_in_use, 0);
  const Handle c = bench.submit(prompt_of(5, 1), params_of(10));
  bench.run({c});
  CHECK_EQ(c->read(0).tokens, expected_tokens(prompt_of(5, 1), params_of(10)));
}

TEST_CASE("a request that cannot be drawn fails alone") {
  Bench bench;
  std::vector<Handle> good;
  for (int i = 0; i < 6; ++i) good.push_back(bench.submit(prompt_of(5, i % 2), params_of(10)));
  SamplingParams undrawable = params_of(10);
  undrawable.temperature = kUndrawable;
  const Handle bad = bench.submit(prompt_of(5, 1), undrawable);
  bench.run(good);
  CHECK_EQ(bad->finish_reason(), FinishReason::kFailed);
  CHECK(bad->read(0).tokens.empty());
  CHECK_THROWS_WITH_AS(std::rethrow_exception(bad->error()),
                       doctest::Contains("token 0 of the completion has no finite softmax"),
                       NumericError);
  for (const Handle& handle : good) {
    CHECK_EQ(handle->read(0).tokens, expected_tokens(handle->request().prompt, params_of(10)));
  }
  CHECK(bench.engine->idle());
  CHECK_EQ(bench.engine->stats().kv_blocks_in_use, 0);
}

TEST_CASE("a request that no forward takes fails alone") {
  Bench bench(256, 16);
  std::vector<Handle> good;
  for (int i = 0; i < 4; ++i)
    good.push_back(bench.submit(prompt_of(9, 1), params_of(10, static_cast<uint64_t>(i % 2))));
  const Tokens seen = prompt_of(9, 1);
  for (const Handle& handle : good) {
    const Tokens tokens = expected_tokens(seen, handle->request().params);
    CHECK(std::count(tokens.begin(), tokens.end(), 94) == 0);
  }
  bench.model->overflows = 94;
  const Handle bad = bench.submit({1, 8, 94, 3}, params_of(10));
  const Handle later = bench.submit({2, 94}, params_of(10));
  bench.run(good);
  for (const Handle& handle : good) {
    CHECK_EQ(handle->read(0).tokens, expected_tokens(seen, handle->request().params));
  }
  for (const Handle& handle : {bad, later}) {
    CHECK_EQ(handle->finish_reason(), FinishReason::kFailed);
    CHECK_THROWS_WITH_AS(std::rethrow_exception(handle->error()), doctest::Contains("overflow"),
                         NumericError);
  }
  CHECK(bench.engine->idle());
  CHECK_EQ(bench.engine->stats().kv_blocks_in_use, 0);
}

TEST_CASE("poll interrupts run and cancels its sequences") {
  Bench bench;
  SamplingParams params = params_of(200);
  params.ignore_eos = true;
  const Handle mine = bench.submit(prompt_of(5, 1), params);
  const auto neighbour = std::make_shared<Client>(bench.engine);
  const Handle other = neighbour->submit(prompt_of(5, 2), params, nullptr);
  int polls = 0;
  const auto poll = [&] {
    if (++polls == 3) throw std::runtime_error("interrupt");
  };
  CHECK_THROWS_WITH_AS((void)(bench.client->run(poll)), doctest::Contains("interrupt"),
                       std::runtime_error);
  CHECK_EQ(mine->finish_reason(), FinishReason::kCancelled);
  CHECK_EQ(mine->read(0).tokens.size(), size_t{3});
  CHECK(!other->finished());
  CHECK_EQ(bench.client->step(), std::vector<Handle>{mine});  // without a step
  CHECK(!other->finished());
  neighbour->run();
  CHECK_EQ(other->read(0).tokens, expected_tokens(prompt_of(5, 2), params));
}

TEST_CASE("a launched step is ended by the next step") {
  Bench bench;
  const Handle first = bench.submit(prompt_of(5, 1), params_of(10));
  CHECK(bench.engine->ready());
  bench.engine->launch();
  bench.model->computing = true;
  CHECK(!bench.engine->ready());
  CHECK_EQ(first->read(0).tokens.size(), size_t{0});
  const Handle second = bench.submit(prompt_of(20, 2), params_of(10));
  bench.engine->launch();  // one is under way
  CHECK_EQ(bench.model->row_counts, (std::vector<int64_t>{5}));
  CHECK(bench.client->step().empty());
  CHECK(bench.engine->ready());
  CHECK_EQ(first->read(0).tokens.size(), size_t{1});
  CHECK_EQ(second->read(0).tokens.size(), size_t{0});
  while (!bench.engine->idle()) {
    bench.engine->launch();
    bench.client->step();
  }
  CHECK_EQ(bench.model->row_counts[1], int64_t{21});
  CHECK_EQ(first->read(0).tokens, expected_tokens(prompt_of(5, 1), params_of(10)));
  CHECK_EQ(second->read(0).tokens, expected_tokens(prompt_of(20, 2), params_of(10)));
  const EngineStats stats = bench.engine->stats();
  CHECK_EQ(stats.steps, static_cast<int64_t>(bench.model->row_counts.size()));
  CHECK_EQ(stats.kv_blocks_in_use, 0);
}

TEST_CASE("what a launch found finished is returned by the step") {
  Bench bench;
  const Handle nothing = bench.submit({1, 2}, params_of(0));
  bench.engine->launch();
  CHECK(!bench.client->idle());
  CHECK_EQ(bench.client->step(), std::vector<Handle>{nothing});
  CHECK(bench.client->idle());
}

TEST_CASE("a sequence cancelled under way ends with the step") {
  Bench bench;
  SamplingParams params = params_of(100);
  params.ignore_eos = true;
  const Handle cancelled = bench.submit(prompt_of(5, 1), params);
  const Handle other = bench.submit(prompt_of(9, 2), params);
  bench.engine->launch();
  cancelled->cancel();
  CHECK_EQ(bench.client->step(), std::vector<Handle>{cancelled});
  CHECK_EQ(cancelled->read(0).tokens.size(), size_t{1});

  // An interrupted run() ends the step that another thread launched before it drops its own.
  bench.engine->launch();
  const auto interrupted = std::make_shared<Client>(bench.engine);
  const Handle mine = interrupted->submit(prompt_of(7, 3), params, nullptr);
  bench.client->step();
  bench.engine->launch();
  int polls = 0;
  const auto poll = [&] {
    bench.engine->launch();
    if (++polls == 2) throw std::runtime_error("interrupt");
  };
  CHECK_THROWS_WITH_AS((void)(interrupted->run(poll)), doctest::Contains("interrupt"),
                       std::runtime_error);
  CHECK_EQ(mine->finish_reason(), FinishReason::kCancelled);
  bench.run({other});
  CHECK_EQ(other->read(0).tokens, expected_tokens(prompt_of(9, 2), params));
  CHECK_EQ(bench.engine->stats().kv_blocks_in_use, 0);
}

TEST_CASE("a launch that fails fails what it held") {
  Bench bench;
  const Handle lost = bench.submit(prompt_of(5, 1), params_of(10));
  bench.model->fail_next = true;
  bench.engine->launch();
  CHECK_EQ(lost->finish_reason(), FinishReason::kFailed);
  CHECK_EQ(bench.client->step(), std::vector<Handle>{lost});
  CHECK((bench.engine->idle() && bench.engine->ready()));
  const Handle next = bench.submit(prompt_of(5, 1), params_of(10));
  bench.engine->launch();
  bench.run({next});
  CHECK_EQ(next->read(0).tokens, expected_tokens(prompt_of(5, 1), params_of(10)));
}

TEST_CASE("thirty two threads share the steps") {
  Bench bench(200, 64);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 32; ++thread) {
    threads.emplace_back([&, thread] {
      for (int round = 0; round < 5; ++round) {
        const Tokens prompt = prompt_of(20 + thread % 5, thread % 3);
        const SamplingParams params = params_of(10, static_cast<uint64_t>(thread));
        const auto client = std::make_shared<Client>(bench.engine);
        const Handle kept = client->submit(prompt, params, nullptr);
        bench.engine->submit(prompt, params_of(3), nullptr);  // its handle is dropped at once
        const Handle cancelled = client->submit(prompt, params, nullptr);
        if (thread % 3 == 0) bench.engine->launch();  // whoever steps next ends it
        cancelled->cancel();
        client->run();
        if (client->step().size() != 2 || !client->idle()) ++wrong;
        if (kept->read(0).tokens != expected_tokens(prompt, params)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(wrong.load(), 0);
  while (!bench.engine->idle()) bench.engine->step();
  CHECK_EQ(bench.engine->stats().kv_blocks_in_use, 0);
}

TEST_CASE("a dropped engine cancels what it holds") {
  Handle running, queued;
  {
    Bench bench;
    running = bench.submit(prompt_of(5, 1), params_of(100));
    bench.client->step();
    queued = bench.submit(prompt_of(5, 1), params_of(100));
  }
  CHECK_EQ(running->finish_reason(), FinishReason::kCancelled);
  CHECK_EQ(queued->finish_reason(), FinishReason::kCancelled);
  CHECK_EQ(running->read(0).tokens.size(), size_t{1});
}

TEST_CASE("a recorded step says whose rows it held") {
  const auto run = [](bool record) {
    Bench bench(256, 8);  // a prompt of 20 takes more than one step
    if (record) trace::start(trace::Level::kOps);
    auto first = params_of(5, 11), second = params_of(3, ~uint64_t{0});
    first.ignore_eos = second.ignore_eos = true;
    const std::vector<Handle> handles = {bench.submit(prompt_of(20, 1), first),
                                         bench.submit(prompt_of(4, 50), second)};
    bench.run(handles);
    return std::pair(Tokens(handles[0]->read(0).tokens), bench.engine->stats());
  };
  const auto [plain, _] = run(false);
  const auto [tokens, stats] = run(true);
  const trace::Recording got = trace::stop();
  CHECK(tokens == plain);
  std::map<std::pair<std::string, uint64_t>, int64_t> rows;
  int64_t steps = 0, forward_rows = 0;
  for (const trace::Event& event : got.events) {
    const std::string name = event.name;
    steps += name == "step" ? 1 : 0;
    forward_rows += name == "forward" ? event.counts.rows : 0;
    if (event.begin_ns == event.end_ns) rows[{name, event.counts.key}] += event.counts.rows;
  }
  CHECK_EQ(steps, stats.steps);
  CHECK_EQ((rows[{"prefill.rows", 11}]), 20);
  CHECK(stats.drafted_tokens > 0);  // of the first
  CHECK_EQ((rows[{"decode.rows", 11}]), 4 + stats.drafted_tokens);
  CHECK_EQ((rows[{"prefill.drawn", 11}]), 1);
  CHECK_EQ((rows[{"decode.drawn", 11}]), 4 + stats.drafted_tokens);
  CHECK_EQ((rows[{"prefill.rows", ~uint64_t{0}}]), 4);
  CHECK_EQ((rows[{"decode.drawn", ~uint64_t{0}}]), 2);
  CHECK_EQ(forward_rows, 20 + 4 + 4 + stats.drafted_tokens + 2);
}

// Texts that repeat themselves, where most drafts are accepted, one, a few and many at a time. A
// second turn reads what the first one wrote, or would have written if it had gone on as drafted.
TEST_CASE("tokens do not depend on drafts") {
  const auto adapter = new_adapter();
  std::mt19937 random(7);
  for (const bool prefix_cache : {true, false}) {
    for (const int64_t max_rows : {1, 3, 64}) {
      for (const size_t at_once : {1, 3, 20}) {
        Bench bench(64, max_rows, prefix_cache, 256, true);
        std::vector<Tokens> prompts;
        for (int i = 0; i < 60; ++i) {
          prompts.push_back(prompt_of(1 + static_cast<int64_t>(random() % 40), i % 4));
        }
        for (int turn = 0; turn < 2; ++turn) {
          std::vector<Tokens> longer;
          std::vector<Handle> handles;
          for (size_t i = 0; i < prompts.size(); ++i) {
            SamplingParams params = params_of(static_cast<int64_t>(random() % 60), random() % 2);
            params.temperature = random() % 2 == 0 ? 0.0f : 1.0f;
            params.ignore_eos = random() % 2 == 0;
            params.min_new_tokens = params.max_new_tokens / 3;
            if (random() % 3 == 0) params.stop_token_ids = {static_cast<int32_t>(random() % 96)};
            handles.push_back(bench.submit(prompts[i], params, i % 2 == 0 ? nullptr : adapter));
            if (handles.size() < at_once && i + 1 < prompts.size()) continue;
            bench.run(handles);
            for (const Handle& handle : std::exchange(handles, {})) {
              const Request& request = handle->request();
              const Tokens expected =
                  expected_tokens(request.prompt, request.params, request.lanes, true);
              CHECK_EQ(handle->read(0).tokens, expected);
              CHECK_EQ(handle->read(0).logprobs.size(), expected.size());
              longer.push_back(request.prompt);
              longer.back().insert(longer.back().end(), expected.begin(), expected.end());
              if (random() % 2 == 0)
                longer.back().back() = (longer.back().rbegin()[1] * 5 + 1) % kEos;
            }
          }
          prompts = longer;
        }
        const EngineStats stats = bench.engine->stats();
        CHECK_EQ(stats.kv_blocks_in_use, 0);
        CHECK((!prefix_cache || stats.cached_tokens > 1000));
        if (max_rows == 1) CHECK_EQ(stats.drafted_tokens, 0);
        if (max_rows > 1 && at_once <= 3) CHECK(stats.accepted_tokens > 100);
        CHECK(stats.accepted_tokens <= stats.drafted_tokens);
        for (const int64_t count : bench.model->row_counts) CHECK(count <= max_rows);
      }
    }
  }
}

TEST_CASE("what was rejected is in no cache") {
  Bench bench(256, 64, true, 256, true);
  SamplingParams params = params_of(100);
  params.ignore_eos = true;
  const Tokens prompt = prompt_of(20, 1);
  const Tokens written = expected_tokens(prompt, params, 0, true);
  bench.run({bench.submit(prompt, params)});
  const EngineStats first = bench.engine->stats();
  CHECK(first.drafted_tokens > first.accepted_tokens + 5);
  int asked = 0;
  for (size_t k = 1; k < written.size(); ++k) {
    if (written[k] == (written[k - 1] * 5 + 1) % kEos) continue;
    Tokens as_drafted = prompt;
    as_drafted.insert(as_drafted.end(), written.begin(),
                      written.begin() + static_cast<std::ptrdiff_t>(k));
    for (int i = 0; i < 20; ++i) as_drafted.push_back((as_drafted.back() * 5 + 1) % kEos);
    const int64_t before = bench.engine->stats().cached_tokens;
    const Handle handle = bench.submit(as_drafted, params_of(5));
    bench.run({handle});
    CHECK_EQ(handle->read(0).tokens, expected_tokens(as_drafted, params_of(5), 0, true));
    const int64_t cached = bench.engine->stats().cached_tokens - before;
    CHECK(cached <= std::ssize(prompt) + static_cast<int64_t>(k));
    ++asked;
  }
  CHECK(asked > 3);
}

// A draft's keys may be what float16 cannot hold, where those of the tokens that are drawn are not.
TEST_CASE("a draft that no forward takes fails nobody") {
  Bench bench(64, 64, true, 256, true);
  const Tokens prompt = prompt_of(6, 1);
  SamplingParams params = params_of(2);
  params.ignore_eos = true;
  const Tokens known = expected_tokens(prompt, params, 0, true);
  bench.run({bench.submit(prompt, params)});
  Tokens expected;
  do {  // begins alike and goes on otherwise
    ++params.seed;
    expected = expected_tokens(prompt, params, 0, true);
  } while (expected[0] != known[0] || expected[1] == known[1]);
  params.max_new_tokens = 3;
  expected = expected_tokens(prompt, params, 0, true);
  REQUIRE(std::count(expected.begin(), expected.end(), known[1]) == 0);
  bench.model->row_counts.clear();
  bench.model->overflows = known[1];
  const Handle handle = bench.submit(prompt, params);
  bench.run({handle});
  CHECK_EQ(handle->read(0).tokens, expected);
  // Two steps were drafted for, each computed again, alone and without.
  CHECK_EQ(bench.model->row_counts, (std::vector<int64_t>{3, 1, 1, 2, 1, 1, 1}));
  CHECK_EQ(bench.engine->stats().drafted_tokens, 0);
}

TEST_CASE("reading while it writes gives a prefix") {
  Bench bench;
  SamplingParams params = params_of(100);
  params.ignore_eos = true;
  const Handle handle = bench.submit(prompt_of(5, 1), params);
  const Tokens expected = expected_tokens(prompt_of(5, 1), params);
  Tokens streamed;
  std::thread runner([&] { bench.run({handle}); });
  while (streamed.size() < 100) {
    const Output more = handle->read(streamed.size());
    streamed.insert(streamed.end(), more.tokens.begin(), more.tokens.end());
  }
  runner.join();
  CHECK_EQ(streamed, expected);
  CHECK(handle->read(1000).tokens.empty());
}

}  // namespace
}  // namespace alignpro::engine
