// The transformer on a tiny random model: parity of the engine's path and the scorer's to the bit,
// gradients by finite differences, and nothing that depends on threads, sharing or what is kept.
//
// One body for every device (model_bodies.h). Long because every case needs the
// same models and sequences.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/model/model.h"
#include "alignpro/model/prefix_tree.h"
#include "alignpro/model/score.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/mix_rows.h"
#include "model_bodies.h"
#include "random_checkpoint.h"

using namespace alignpro;
using namespace alignpro::model;

namespace {

std::vector<std::vector<int32_t>> sequences() {
  // A common start, a group of continuations that diverge inside a block, one duplicate, one alone.
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < 21; ++i) prompt.push_back((i * 31 + 7) % 111);
  std::vector<std::vector<int32_t>> all;
  for (int32_t s = 0; s < 4; ++s) {
    auto sequence = prompt;
    for (int32_t i = 0; i < 6 + s; ++i) sequence.push_back((i * 17 + (s == 3 ? 2 : s) * 5) % 111);
    all.push_back(sequence);
  }
  all.push_back({5, 9, 100, 2});
  all.push_back(prompt);
  return all;
}

std::vector<int64_t> starts() { return {21, 21, 21, 21, 1, 4}; }

Score score(const std::shared_ptr<const Model>& model, std::shared_ptr<const Adapter> adapter,
            std::shared_ptr<const Adapter> reference, bool keep_graph,
            Activations activations = Activations::kKeep) {
  ScoreRequest request;
  request.sequences = sequences();
  request.starts = starts();
  request.adapter = std::move(adapter);
  request.temperature = 0.9f;
  request.with_reference = true;
  request.reference = std::move(reference);
  request.keep_graph = keep_graph;
  request.activations = activations;
  return Score(model, std::move(request));
}

}  // namespace

// What is shared is computed once, to the bits that it has alone; with a graph and without.
TEST_CASE("shared prefixes change no bit") {
  for (const auto& model : on_the_device(tiny(true, false, false))) {
    ScoreRequest request;
    request.sequences = sequences();
    request.starts = starts();
    request.adapter = LoraStore(model->config(), 3, 5, false).adapter(model->config());
    request.temperature = 0.9f;
    request.with_reference = true;
    request.with_hidden = true;
    const Score together(model, request);
    if (model->device().kv_dtype() != DType::kF16) {
      ScoreRequest to_train = request;
      to_train.keep_graph = true;
      const Score graph(model, to_train);
      CHECK(equal_bits(graph.logprob(), together.logprob()));
      CHECK(equal_bits(graph.kl(), together.kl()));
      CHECK(equal_bits(graph.hidden(), together.hidden()));
    }
    size_t at = 0;
    for (size_t s = 0; s < sequences().size(); ++s) {
      ScoreRequest one = request;
      one.sequences = {sequences()[s]};
      one.starts = {starts()[s]};
      const Score alone(model, one);
      const size_t count = alone.logprob().size();
      const auto same = [&](const std::vector<float>& own, const std::vector<float>& all,
                            size_t width) {
        return own.size() == count * width &&
               std::memcmp(own.data(), all.data() + at * width, own.size() * sizeof(float)) == 0;
      };
      CHECK(same(alone.logprob(), together.logprob(), 1));
      CHECK(same(alone.entropy(), together.entropy(), 1));
      CHECK(same(alone.kl(), together.kl(), 1));
      CHECK(same(alone.reference_logprob(), together.reference_logprob(), 1));
      CHECK(same(alone.hidden(), together.hidden(),
                 static_cast<size_t>(model->config().hidden_size)));
      at += count;
    }
    CHECK_EQ(at, together.logprob().size());
  }
}

TEST_CASE("generation path equals scoring path to the bit") {
  for (const ModelConfig& config : {tiny(true, false, false), tiny(false, true, false),
                                    tiny(false, false, true), tiny_gemma()}) {
    for (const auto& model : on_the_device(config)) {
      const auto adapter = LoraStore(model->config(), 2, 6, false).adapter(model->config());
      // Prefill in odd chunks beside a stranger on the base weights, as the engine would. What is
      // drawn after each chunk takes the place of the next token.
      std::vector<int32_t> tokens = sequences()[1];
      std::map<size_t, float> drawn;
      const auto session = model->make_session(8);
      const std::vector<int32_t> blocks = {5, 2}, stranger = {3};
      size_t begin = 0;
      for (const size_t end : {size_t{1}, size_t{9}, size_t{18}, size_t{19}, tokens.size() - 1}) {
        Batch batch;
        const auto add = [&](int32_t token, size_t position, const std::vector<int32_t>& table) {
          batch.kv_writes.push_back({static_cast<int32_t>(batch.rows()), table[position / 16],
                                     static_cast<int32_t>(position % 16)});
          batch.tokens.push_back(token);
          batch.positions.push_back(static_cast<int32_t>(position));
        };
        add(77, 0, stranger);
        batch.segments.push_back({0, 1, 0, stranger});
        for (size_t i = begin; i < end; ++i) add(tokens[i], i, blocks);
        batch.segments.push_back(
            {1, static_cast<int64_t>(end - begin), static_cast<int64_t>(begin), blocks});
        batch.adapters.push_back({1, batch.rows(), adapter.get()});
        batch.output_rows = {0, static_cast<int32_t>(batch.rows() - 1)};
        session->forward(batch);
        std::vector<ops::SampleRow> rows(2);
        rows[1].temperature = 1.0f;
        rows[1].uniform = 0.1 + 0.04 * static_cast<double>(end);
        std::vector<ops::SampledToken> out(2);
        session->draw(rows);
        session->collect(out);
        tokens[end] = out[1].token;
        drawn[end] = out[1].logprob;
        begin = end;
      }
      ScoreRequest request;
      request.sequences = {tokens};
      request.starts = {1};
      request.adapter = adapter;
      const Score scored(model, std::move(request));
      for (const auto& [position, logprob] : drawn)
        CHECK_EQ(logprob, scored.logprob()[position - 1]);
    }
  }
}

// Two adapters and the base weights, one of them with a negative weight, beside one adapter alone:
// recorded log-probabilities are those of the members' states, summed.
TEST_CASE("a mixture's draws are scored to the bit") {
  for (const auto& model : on_the_device(tiny(true, false, false))) {
    const ModelConfig& config = model->config();
    const auto first = LoraStore(config, 2, 6, false).adapter(config);
    const auto second = LoraStore(config, 3, 7, false).adapter(config);
    const std::vector<Mixture> mixtures = {
        Mixture({{first, 0.75}, {nullptr, -0.5}, {second, 0.75}}),
        Mixture({{second, 0.25}, {nullptr, 0.75}}), first,
        Mixture({{first, 1.0}, {second, 1e-30}})};
    engine::EngineOptions options{64 * model->kv_block_bytes(), 24, true, true};
    engine::Engine engine(model, options);
    std::vector<std::shared_ptr<engine::Sequence>> handles;
    for (size_t i = 0; i < mixtures.size(); ++i) {
      engine::SamplingParams params;
      params.max_new_tokens = 6;
      params.temperature = 0.8f;
      params.seed = i < 2 ? i : 2;
      params.ignore_eos = true;
      handles.push_back(engine.submit(sequences()[i < 2 ? i : 2], params, mixtures[i]));
    }
    while (!engine.idle()) engine.step();
    std::vector<engine::Output> outputs;
    for (const auto& handle : handles) {
      if (handle->error()) std::rethrow_exception(handle->error());
      outputs.push_back(handle->read(0));
      ScoreRequest request;
      request.sequences = {handle->request().prompt};
      request.starts = {std::ssize(handle->request().prompt)};
      request.temperature = 0.8f;
      auto& all = request.sequences.front();
      all.insert(all.end(), outputs.back().tokens.begin(), outputs.back().tokens.end());
      std::vector<float> states;
      std::vector<int32_t> begins = {0}, rows;
      std::vector<float> weights;
      const auto values = static_cast<int32_t>(outputs.back().tokens.size());
      const auto& lanes = handle->request().lanes;
      for (const Lane& lane : lanes) {
        ScoreRequest own = request;
        own.adapter = lane.adapter;
        own.with_hidden = true;
        const Score scored(model, own);
        states.insert(states.end(), scored.hidden().begin(), scored.hidden().end());
      }
      for (int32_t value = 0; value < values; ++value) {
        for (size_t k = 0; k < lanes.size(); ++k) {
          rows.push_back(static_cast<int32_t>(k) * values + value);
          weights.push_back(lanes[k].weight);
        }
        begins.push_back(static_cast<int32_t>(rows.size()));
      }
      const int64_t width = config.hidden_size;
      request.given_hidden.resize(static_cast<size_t>(values * width));
      ops::mix_rows({begins, rows, weights}, width, states.data(), width,
                    request.given_hidden.data(), width);
      CHECK(equal_bits(Score(model, request).logprob(), outputs.back().logprobs));
    }
    // What weighs nothing is rounded away: the single adapter's own tokens and numbers.
    CHECK_EQ(outputs[3].tokens, outputs[2].tokens);
    CHECK(equal_bits(outputs[3].logprobs, outputs[2].logprobs));
    ScoreRequest wrong;
    wrong.sequences = {{1, 2}};
    wrong.starts = {1};
    wrong.given_hidden = {1.0f};
    CHECK_THROWS_WITH_AS((void)(Score(model, wrong)), doctest::Contains("given_hidden: expected 1"),
                         InvalidArgument);
    wrong.adapter = first;
    CHECK_THROWS_WITH_AS((void)(Score(model, wrong)), doctest::Contains("expected no adapter"),
                         InvalidArgument);
  }
}

TEST_CASE("an adapter with zero b is the base model") {
  for (const auto& model : on_the_device(tiny(false, false, false))) {
    const auto adapter = LoraStore(model->config(), 3, 7, true).adapter(model->config());
    const Score s = score(model, adapter, nullptr, false);
    CHECK(equal_bits(s.logprob(), s.reference_logprob()));
    for (const float kl : s.kl()) CHECK_EQ(kl, 0.0f);
  }
}

TEST_CASE("the kl to an equal adapter is zero to the bit") {
  for (const auto& model : on_the_device(tiny(false, false, false))) {
    const LoraStore store(model->config(), 3, 7, false);
    const Score s =
        score(model, store.adapter(model->config()), store.adapter(model->config()), false);
    for (const float kl : s.kl()) CHECK_EQ(kl, 0.0f);
  }
}

TEST_CASE("bad requests name what is wrong") {
  for (const auto& model : on_the_device(tiny(false, false, false))) {
    const auto refuse = [&](std::vector<std::vector<int32_t>> s, std::vector<int64_t> from,
                            const char* text) {
      ScoreRequest request;
      request.sequences = std::move(s);
      request.starts = std::move(from);
      CHECK_THROWS_WITH_AS((void)(Score(model, std::move(request))), doctest::Contains(text),
                           InvalidArgument);
    };
    refuse({{1, 2}, {}}, {1, 1}, "sequence 1 is empty");
    refuse({{1, 111}}, {1}, "token 111");
    refuse({{1, 2}}, {3}, "start of sequence 0");
    refuse({{1, 2}}, {1, 1}, "a start for each of 1");
    refuse({std::vector<int32_t>(129, 1)}, {1}, "129 tokens");
    ScoreRequest request;
    request.sequences = {{1, 2}};
    request.starts = {1};
    request.keep_graph = true;
    CHECK_THROWS_WITH_AS((void)(Score(model, request)),
                         doctest::Contains("keep_graph needs an adapter"), InvalidArgument);
    request.sequences = {{1, 111}};
    request.keep_graph = false;
    CHECK_THROWS_WITH_AS((void)(Score::bytes(*model, request)), doctest::Contains("token 111"),
                         InvalidArgument);
    std::map<std::string, LoraMatrices> unknown{
        {"model.layers.9.mlp.up_proj", {1, nullptr, nullptr}}};
    CHECK_THROWS_WITH_AS((void)(Adapter(model->config(), unknown, 1.0f)),
                         doctest::Contains("layers.9"), InvalidArgument);
  }
}

TEST_CASE("what backward does not take is refused") {
  for (const auto& model : trainable(tiny(false, false, false))) {
    ScoreRequest request;
    request.sequences = {{1, 2}, {5}};
    request.starts = {1, 1};
    request.adapter = LoraStore(model->config(), 1, 6, false).adapter(model->config());
    const std::vector<float> one = {1.0f}, two = {1.0f, 2.0f};
    const auto refuse = [&](Score& score, std::span<const float> d_logprob,
                            std::span<const float> d_entropy, std::span<const float> d_kl,
                            const char* text) {
      CHECK_THROWS_WITH_AS((void)(score.backward(d_logprob, d_entropy, d_kl)),
                           doctest::Contains(text), InvalidArgument);
    };
    Score plain(model, request);
    refuse(plain, one, {}, {}, "the graph is gone");
    request.keep_graph = true;
    Score score(model, request);
    refuse(score, two, {}, {}, "d_logprob has 2 values, expected 1");
    refuse(score, one, two, {}, "d_entropy has 2 values");
    refuse(score, one, {}, one, "the score had no reference");
    CHECK(score.backward(one, {}, {}).modules.size() > 0);
    refuse(score, one, {}, {}, "call backward once");
    // Nothing scored: nothing computed, gradients of zero.
    request.starts = {2, 1};
    Score nothing(model, request);
    CHECK_EQ(Score::bytes(*model, request), int64_t{0});
    for (const auto& [a, b] : nothing.backward({}, {}, {}).modules) {
      for (const auto* matrix : {&a, &b}) {
        for (const float value : *matrix) CHECK_EQ(value, 0.0f);
      }
    }
  }
}

TEST_CASE("adapters are told apart, and found again") {
  for (const auto& model : on_the_device(tiny(false, false, false))) {
    ScoreRequest request;
    request.sequences = {{4, 35, 66, 97}};
    request.starts = {1};
    std::vector<std::vector<float>> values;
    std::vector<std::shared_ptr<Adapter>> adapters;
    for (uint32_t i = 0; i < 4; ++i) {
      adapters.push_back(LoraStore(model->config(), 1, 100 + i, false).adapter(model->config()));
      request.adapter = adapters.back();
      values.push_back(Score(model, request).logprob());
      if (i > 0) CHECK(values[i] != values[i - 1]);
    }
    request.adapter = adapters[0];
    CHECK_EQ(Score(model, request).logprob(), values[0]);
  }
}

// One of two threads has the graph; the other is told, and nothing else.
TEST_CASE("backward from two threads is called once") {
  for (const auto& model : trainable(tiny(false, false, false))) {
    const auto adapter = LoraStore(model->config(), 2, 6, false).adapter(model->config());
    for (int round = 0; round < kRounds; ++round) {
      Score s = score(model, adapter, nullptr, true);
      const std::vector<float> d(s.logprob().size(), 1.0f);
      std::atomic<int> done{0}, told{0};
      const auto call = [&] {
        try {
          done += s.backward(d, {}, {}).modules.empty() ? 0 : 1;
        } catch (const InvalidArgument& error) {
          told += std::string(error.what()).find("call backward once") != std::string::npos;
        }
      };
      std::thread first(call), second(call);
      first.join();
      second.join();
      CHECK_EQ(done.load(), 1);
      CHECK_EQ(told.load(), 1);
    }
  }
}

#if !defined(ALIGNPRO_EMULATED_DEVICE)
// Of the CPU alone; a GPU's gradients are held beside these (device_score_test).

namespace {

std::shared_ptr<Model> tiny_model(const ModelConfig& config, int threads = 2,
                                  DType kv_dtype = DType::kF32) {
  return cpu_model(config, threads, ops::Arithmetic::kFloat32, kv_dtype);
}

bool equal_bits(const AdapterGradients& a, const AdapterGradients& b) {
  for (size_t i = 0; i < a.modules.size(); ++i) {
    if (!model::equal_bits(a.modules[i].a, b.modules[i].a) ||
        !model::equal_bits(a.modules[i].b, b.modules[i].b)) {
      return false;
    }
  }
  return a.modules.size() == b.modules.size();
}

std::vector<float> weights_of(size_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& v : values) v = draw(generator);
  return values;
}

}  // namespace

TEST_CASE("token tree shares what is common") {
  const auto all = sequences();
  std::vector<std::span<const int32_t>> views(all.begin(), all.end());
  const PrefixTree tree(views);
  // 20 inputs shared by all five, one more by four; then the runs, and the lone sequence of 3.
  int64_t separate = 0;
  for (const auto& s : all) separate += static_cast<int64_t>(s.size()) - 1;
  CHECK(tree.batch().rows() < separate / 2);
  for (size_t s = 0; s < all.size(); ++s) {
    for (size_t i = 0; i + 1 < all[s].size(); ++i) {
      const int32_t row = tree.row(static_cast<int64_t>(s), static_cast<int64_t>(i));
      CHECK_EQ(tree.batch().tokens[static_cast<size_t>(row)], all[s][i]);
      CHECK_EQ(tree.batch().positions[static_cast<size_t>(row)], static_cast<int32_t>(i));
    }
  }
}

TEST_CASE("hidden states are what the tokens were predicted from") {
  const std::vector<std::pair<ModelConfig, DType>> cases{{tiny(true, false, false), DType::kF32},
                                                         {tiny(false, true, true), DType::kF16}};
  for (const auto& [config, kv_dtype] : cases) {
    const auto model = tiny_model(config, 2, kv_dtype);
    const auto adapter = LoraStore(model->config(), 3, 5, false).adapter(model->config());
    ScoreRequest request;
    request.sequences = sequences();
    request.starts = starts();
    request.adapter = adapter;
    request.temperature = 0.9f;
    const Score without(model, request);
    CHECK((!without.has_hidden() && without.hidden().empty()));
    request.with_hidden = true;
    request.with_reference = true;  // its states are not the policy's
    const Score s(model, request);
    CHECK(equal_bits(s.logprob(), without.logprob()));

    const int64_t width = model->config().hidden_size;
    const auto values = static_cast<int64_t>(s.logprob().size());
    CHECK_EQ(static_cast<int64_t>(s.hidden().size()), values * width);
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < sequences().size(); ++i) {
      const auto all = sequences()[i];
      tokens.insert(tokens.end(), all.begin() + starts()[i], all.end());
    }
    std::vector<float> logprob(s.logprob().size()), entropy(logprob.size());
    std::vector<double> lse(logprob.size());
    const RandomCheckpoint checkpoint(config);
    ThreadPool pool(2);
    const auto head = ops::PackedMatrix::pack(
        config.tied_head ? checkpoint.embedding_rows() : checkpoint.head_rows(), width, pool);
    ops::linear_logprob({.rows = values,
                         .hidden = s.hidden().data(),
                         .weight = &head,
                         .tokens = tokens,
                         .temperature = 0.9f},
                        {.logprob = logprob.data(), .entropy = entropy.data(), .lse = lse.data()},
                        nullptr, pool);
    CHECK(equal_bits(logprob, s.logprob()));
    CHECK(equal_bits(entropy, s.entropy()));
    // Here, and in the caller's copy.
    ScoreRequest plain = request;
    plain.with_hidden = false;
    CHECK_EQ(Score::bytes(*model, request) - Score::bytes(*model, plain), 2 * values * width * 4);
  }
}

TEST_CASE("keys and values as halves have no gradients") {
  const auto model = tiny_model(tiny(true, false, false), 2, DType::kF16);
  const auto adapter = LoraStore(model->config(), 2, 6, false).adapter(model->config());
  CHECK_THROWS_WITH_AS(
      (void)(score(model, adapter, nullptr, true)),
      doctest::Contains("gradients: expected a model loaded with kv_dtype float32"),
      InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(tiny_model(tiny(true, false, false), 2, DType::kQ8_0)),
                       doctest::Contains("kv_dtype: expected F32 or F16, got Q8_0"),
                       InvalidArgument);
}

TEST_CASE("gradients by finite differences") {
  for (const ModelConfig& config : {tiny(true, false, false), tiny(false, true, false),
                                    tiny(false, false, true), tiny_gemma()}) {
    const auto model = tiny_model(config);
    LoraStore store(config, 2, 8, false);
    const auto reference = LoraStore(config, 1, 9, false).adapter(config);
    const auto adapter = store.adapter(config);
    Score s = score(model, adapter, reference, true);
    const auto d_lp = weights_of(s.logprob().size(), 1), d_h = weights_of(s.logprob().size(), 2);
    const auto d_kl = weights_of(s.logprob().size(), 3);
    const AdapterGradients gradients = s.backward(d_lp, d_h, d_kl);
    const auto loss = [&] {
      const Score now = score(model, store.adapter(config), reference, false);
      double sum = 0;
      for (size_t i = 0; i < d_lp.size(); ++i) {
        sum += double{d_lp[i]} * now.logprob()[i] + double{d_h[i]} * now.entropy()[i] +
               double{d_kl[i]} * now.kl()[i];
      }
      return sum;
    };
    // Along a random direction of each matrix: one number checks the whole matrix.
    for (size_t m = 0; m < adapter->modules().size(); m += 2) {
      auto& [a, b] = store.values[adapter->modules()[m].where.path];
      for (auto* matrix : {&a, &b}) {
        const auto& gradient = matrix == &a ? gradients.modules[m].a : gradients.modules[m].b;
        const auto direction = weights_of(matrix->size(), 50 + static_cast<uint32_t>(m));
        const auto saved = *matrix;
        const float h = 1e-3f;
        double expected = 0, norm = 0;
        for (size_t i = 0; i < saved.size(); ++i) {
          expected += double{direction[i]} * gradient[i];
          norm += double{direction[i] * gradient[i]} * (direction[i] * gradient[i]);
          (*matrix)[i] = saved[i] + h * direction[i];
        }
        const double up = loss();
        for (size_t i = 0; i < saved.size(); ++i) (*matrix)[i] = saved[i] - h * direction[i];
        const double down = loss();
        *matrix = saved;
        // float32 forward: the loss is good to ~1e-5, over 2h that is 5e-3; beside it h^2.
        const double difference = (up - down) / (2 * h);
        CHECK(std::abs(difference - expected) < 1e-2 * std::sqrt(norm) + 2e-2);
      }
    }
  }
}

TEST_CASE("gradients do not depend on threads or on what is kept") {
  const ModelConfig config = tiny(true, false, false);
  const LoraStore store(config, 2, 8, false);
  std::vector<AdapterGradients> all;
  for (const auto& [threads, activations] :
       {std::pair{1, Activations::kKeep}, std::pair{2, Activations::kKeep},
        std::pair{2, Activations::kRecompute}}) {
    const auto model = tiny_model(config, threads);
    Score s = score(model, store.adapter(config), nullptr, true, activations);
    all.push_back(
        s.backward(weights_of(s.logprob().size(), 1), {}, weights_of(s.logprob().size(), 3)));
  }
  CHECK(equal_bits(all[0], all[1]));
  CHECK(equal_bits(all[0], all[2]));
}

#endif
