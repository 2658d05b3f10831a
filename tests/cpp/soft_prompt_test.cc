// Rows of a soft prompt among the tokens of a sequence: they are read as embeddings are, sampled as
// scored to the bit, and their gradients are those of finite differences. On every device
// (model_bodies.h); a GPU's gradients are held beside the CPU's in device_score_test.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/mixture.h"
#include "alignpro/model/score.h"
#include "alignpro/ops/mix_rows.h"
#include "model_bodies.h"
#include "numbers.h"
#include "random_checkpoint.h"

using namespace alignpro;
using namespace alignpro::model;

namespace {

using Ids = std::vector<int32_t>;

std::shared_ptr<Adapter> rows_alone(const ModelConfig& config, const std::vector<float>& rows) {
  return std::make_shared<Adapter>(config, std::map<std::string, LoraMatrices>(), 1.0f, rows);
}

std::vector<float> random_rows(const ModelConfig& config, int64_t m, uint32_t seed) {
  return normal(static_cast<size_t>(m * config.hidden_size), seed);
}

// The embeddings of these tokens, one behind the other.
std::vector<float> embeddings(const ModelConfig& config, const Ids& tokens) {
  const RandomCheckpoint checkpoint(config);
  const auto table = checkpoint.embedding_rows();
  std::vector<float> rows;
  for (const int32_t token : tokens) {
    const auto* from = reinterpret_cast<const float*>(table[static_cast<size_t>(token)].data);
    rows.insert(rows.end(), from, from + config.hidden_size);
  }
  return rows;
}

// Where a text names these tokens before `end`, the rows that stand for them.
Ids named(Ids text, const Ids& tokens, int64_t end) {
  for (int32_t& id : std::span(text).first(static_cast<size_t>(end))) {
    const auto at = std::ranges::find(tokens, id);
    if (at != tokens.end()) id = static_cast<int32_t>(-1 - (at - tokens.begin()));
  }
  return text;
}

std::vector<std::shared_ptr<engine::Sequence>> run(
    engine::Engine& engine, const std::vector<std::pair<Ids, Mixture>>& asked) {
  engine::SamplingParams params;
  params.max_new_tokens = 5;
  params.temperature = 0.8f;
  params.seed = 7;
  params.ignore_eos = true;
  std::vector<std::shared_ptr<engine::Sequence>> handles;
  for (const auto& [prompt, of] : asked) handles.push_back(engine.submit(prompt, params, of));
  while (!engine.idle()) engine.step();
  for (const auto& handle : handles) {
    if (handle->error()) std::rethrow_exception(handle->error());
  }
  return handles;
}

// What was drawn, scored: of several lanes by the sum of their states.
std::vector<float> scored(const std::shared_ptr<const Model>& model,
                          const engine::Sequence& sequence) {
  ScoreRequest request;
  Ids all(sequence.prompt().begin(), sequence.prompt().end());
  const Ids drawn = sequence.read(0).tokens;
  all.insert(all.end(), drawn.begin(), drawn.end());
  request.sequences = {all};
  request.starts = {std::ssize(sequence.prompt())};
  request.temperature = 0.8f;
  const auto& lanes = sequence.request().lanes;
  if (lanes.size() == 1) {
    request.adapter = lanes[0].adapter;
    return Score(model, request).logprob();
  }
  const int64_t width = model->config().hidden_size;
  std::vector<float> states, weights;
  std::vector<int32_t> begins = {0}, rows;
  for (const Lane& lane : lanes) {
    ScoreRequest own = request;
    own.adapter = lane.adapter;
    own.with_hidden = true;
    const Score s(model, own);
    states.insert(states.end(), s.hidden().begin(), s.hidden().end());
  }
  for (size_t i = 0; i < drawn.size(); ++i) {
    for (size_t k = 0; k < lanes.size(); ++k) {
      rows.push_back(static_cast<int32_t>(k * drawn.size() + i));
      weights.push_back(lanes[k].weight);
    }
    begins.push_back(static_cast<int32_t>(rows.size()));
  }
  request.given_hidden.resize(drawn.size() * static_cast<size_t>(width));
  ops::mix_rows({begins, rows, weights}, width, states.data(), width, request.given_hidden.data(),
                width);
  return Score(model, request).logprob();
}

// A common beginning of 19 with rows at its front and inside, and at its end, which two sequences
// go on from; one that begins with other rows; one of a row alone before the scored tokens.
const std::vector<Ids> kSequences = {
    {-1, -2, -3, 4, 35, 66, 97, 17, 48, 79, 110, 30, -3, 61, 92, 12, 43, -4, -1, 5, 9, 30},
    {-1, -2, -3, 4, 35, 66, 97, 17, 48, 79, 110, 30, -3, 61, 92, 12, 43, -4, -1, 5, 20, 21, 22},
    {-2, 7, 8, 9, 10},
    {-4, 3}};
const std::vector<int64_t> kStarts = {19, 19, 2, 1};

ScoreRequest request_of(std::shared_ptr<const Adapter> adapter) {
  ScoreRequest request;
  request.sequences = kSequences;
  request.starts = kStarts;
  request.adapter = std::move(adapter);
  request.temperature = 0.9f;
  return request;
}

}  // namespace

// Beside LoRA and alone, as policy and as reference, drawn and scored.
TEST_CASE("rows that are tokens' embeddings change no bit") {
  for (const ModelConfig& shape : {tiny(true, false, false), tiny(false, true, false)}) {
    for (const auto& model : on_the_device(shape)) {
      const ModelConfig& config = model->config();
      const Ids tokens = {40, 9, 77}, text = {1, 40, 9, 77, 8, 40, 33, 2, 90, 77, 6, 5, 9, 3, 4};
      const std::vector<float> rows = embeddings(config, tokens);
      const LoraStore lora(config, 2, 6, false);
      ScoreRequest plain;
      plain.sequences = {text, {40, 9, 5, 6}};
      plain.starts = {10, 2};
      plain.with_reference = true;
      plain.adapter = lora.adapter(config);
      ScoreRequest soft = plain;
      for (size_t s = 0; s < 2; ++s) {
        soft.sequences[s] = named(plain.sequences[s], tokens, plain.starts[s]);
      }
      REQUIRE_EQ(soft.sequences[1], Ids{-1, -2, 5, 6});
      soft.adapter = lora.adapter(config, rows);
      soft.reference = rows_alone(config, rows);
      const Score expected(model, plain), got(model, soft);
      CHECK(equal_bits(got.logprob(), expected.logprob()));
      CHECK(equal_bits(got.entropy(), expected.entropy()));
      CHECK(equal_bits(got.kl(), expected.kl()));

      const auto length = std::ssize(text);
      const Mixture of_tokens({{plain.adapter, 0.5}, {nullptr, 0.5}});
      const Mixture of_rows({{soft.adapter, 0.5}, {soft.reference, 0.5}});
      engine::Engine engine(model, {64 * model->kv_block_bytes(), 9, true, true});
      const auto drawn = run(engine, {{text, plain.adapter},
                                      {named(text, tokens, length), soft.adapter},
                                      {text, of_tokens},
                                      {named(text, tokens, length), of_rows}});
      for (size_t i = 0; i < drawn.size(); i += 2) {
        CHECK_EQ(drawn[i + 1]->read(0).tokens, drawn[i]->read(0).tokens);
        CHECK(equal_bits(drawn[i + 1]->read(0).logprobs, drawn[i]->read(0).logprobs));
      }
    }
  }
}

// Prompts that begin with rows, hold some, end with one, or are one; of two adapters in one batch,
// of LoRA beside rows, and of a mixture; then once more from the cache, where the row that a prompt
// ends with is alone in its step, and without a cache.
TEST_CASE("what follows rows is sampled as it is scored") {
  for (const auto& model : on_the_device(tiny(false, true, false))) {
    const ModelConfig& config = model->config();
    const auto first = rows_alone(config, random_rows(config, 4, 1));
    const auto second = LoraStore(config, 2, 6, false).adapter(config, random_rows(config, 4, 2));
    std::vector<std::pair<Ids, Mixture>> asked;
    for (size_t i = 0; i < kSequences.size(); ++i) {
      const Ids prompt(kSequences[i].begin(), kSequences[i].begin() + kStarts[i]);
      asked.push_back({prompt, first});
      asked.push_back({prompt, second});
      asked.push_back({prompt, Mixture({{first, 1.5}, {second, -0.5}})});
    }
    asked.push_back({{4, 35, 66}, nullptr});
    engine::Engine engine(model, {64 * model->kv_block_bytes(), 9, true, true});
    engine::Engine uncached(model, {64 * model->kv_block_bytes(), 64, false, false});
    const auto fresh = run(engine, asked);
    const int64_t before = engine.stats().cached_tokens;
    const auto again = run(engine, asked);
    CHECK(engine.stats().cached_tokens > before);
    const auto plain = run(uncached, asked);
    for (size_t i = 0; i < asked.size(); ++i) {
      const engine::Output output = fresh[i]->read(0);
      CHECK(std::ranges::all_of(output.tokens, [](int32_t token) { return token >= 0; }));
      CHECK(equal_bits(scored(model, *fresh[i]), output.logprobs));
      for (const auto& other : {again[i], plain[i]}) {
        CHECK_EQ(other->read(0).tokens, output.tokens);
        CHECK(equal_bits(other->read(0).logprobs, output.logprobs));
      }
    }
    CHECK(fresh[0]->read(0).logprobs != fresh[1]->read(0).logprobs);
  }
}

TEST_CASE("rows that are not there are refused in one line") {
  for (const auto& model : on_the_device(tiny(false, false, false))) {
    const ModelConfig& config = model->config();
    const auto two = rows_alone(config, random_rows(config, 2, 1));
    const auto lora = LoraStore(config, 1, 6, false).adapter(config);
    const auto refuse = [&](ScoreRequest request, const char* text) {
      CHECK_THROWS_WITH_AS((void)(Score(model, request)), doctest::Contains(text), InvalidArgument);
    };
    ScoreRequest request;
    request.sequences = {{1, -1, 2}, {-3, 1, 2}};
    request.starts = {2, 2};
    refuse(request,
           "score: sequence 0, index 1: id -1 names row 0 of a soft prompt, and there is "
           "no adapter");
    request.adapter = lora;
    refuse(request, "id -1 names row 0 of a soft prompt, the adapter has 0 rows");
    request.adapter = two;
    refuse(request, "sequence 1, index 0: id -3 names row 2 of a soft prompt, the adapter has 2");
    request.sequences[1] = {-2, 1, 2};
    CHECK_EQ(Score(model, request).logprob().size(), 2);
    request.starts[0] = 1;
    refuse(request, "sequence 0, index 1: id -1 is below 0: soft rows are read and not scored");
    CHECK_THROWS_WITH_AS((void)(Score::bytes(*model, request)), doctest::Contains("is below 0"),
                         InvalidArgument);
    request.sequences[0] = {1, 2, INT32_MIN};
    request.starts[0] = 3;
    request.sequences[0].push_back(5);
    refuse(request, "names row 2147483647 of a soft prompt, the adapter has 2 rows");
    request.sequences[0] = {1, -1, 2};
    request.starts[0] = 2;
    request.with_reference = true;
    refuse(request,
           "sequence 0, index 1 under the reference: id -1 names row 0 of a soft prompt, "
           "and there is no adapter");
    CHECK(Score::bytes(*model, request) > 0);
    // Of given states nobody reads the rows.
    request.reference_hidden.resize(2 * static_cast<size_t>(config.hidden_size), 0.5f);
    CHECK_EQ(Score(model, request).kl().size(), 2);

    engine::Engine engine(model, {64 * model->kv_block_bytes(), 9, true, true});
    const auto refuse_prompt = [&](Ids prompt, const Mixture& of, const char* text) {
      CHECK_THROWS_WITH_AS((void)(engine.submit(std::move(prompt), {}, of)),
                           doctest::Contains(text), InvalidArgument);
    };
    refuse_prompt({1, -1}, lora,
                  "prompt: index 1: id -1 names row 0 of a soft prompt, the adapter "
                  "has 0 rows");
    refuse_prompt({1, -3}, two, "id -3 names row 2 of a soft prompt, the adapter has 2 rows");
    refuse_prompt({1, -1}, Mixture({{two, 0.5}, {nullptr, 0.5}}), "and there is no adapter");

    const auto make = [&](std::vector<float> rows) { return rows_alone(config, rows); };
    CHECK_THROWS_WITH_AS((void)(make({})), doctest::Contains("nothing given"), InvalidArgument);
    CHECK_THROWS_WITH_AS((void)(make(std::vector<float>(41))),
                         doctest::Contains("expected rows of 40 values, got 41"), InvalidArgument);
    std::vector<float> broken = random_rows(config, 3, 1);
    broken[85] = NAN;
    CHECK_THROWS_WITH_AS((void)(make(broken)), doctest::Contains("row 2 holds NaN"),
                         InvalidArgument);
    ModelConfig wider = config;
    wider.hidden_size = 80;
    CHECK_THROWS_WITH_AS(two->require_fits(wider), doctest::Contains("whose hidden size is 80"),
                         InvalidArgument);
  }
}

// Kept or recomputed, with a stranger's sequences or not: the same bits; beside LoRA nothing of the
// LoRA's changes, and a row that no sequence names has none.
TEST_CASE("gradients of rows do not depend on what is kept") {
  for (const auto& model : trainable(tiny(true, false, false))) {
    const ModelConfig& config = model->config();
    const auto rows = random_rows(config, 5, 4);  // the last is never named
    const auto adapter = LoraStore(config, 2, 8, false).adapter(config, rows);
    ScoreRequest request = request_of(adapter);
    request.keep_graph = true;
    std::vector<AdapterGradients> all;
    for (const auto activations : {Activations::kKeep, Activations::kRecompute}) {
      request.activations = activations;
      Score s(model, request);
      all.push_back(s.backward(normal(s.logprob().size(), 1), normal(s.logprob().size(), 2), {}));
    }
    CHECK(equal_bits(all[0].soft_rows, all[1].soft_rows));
    CHECK(equal_bits(all[0].modules[0].a, all[1].modules[0].a));
    REQUIRE_EQ(all[0].soft_rows.size(), rows.size());
    for (int64_t row = 0; row < 5; ++row) {
      const auto of_row = std::span(all[0].soft_rows)
                              .subspan(static_cast<size_t>(row * config.hidden_size),
                                       static_cast<size_t>(config.hidden_size));
      CHECK_EQ(std::ranges::any_of(of_row, [](float x) { return x != 0.0f; }), row < 4);
    }
    request.starts = {std::ssize(kSequences[0]), std::ssize(kSequences[1]), 5, 2};  // nothing
    Score nothing(model, request);
    CHECK_EQ(nothing.backward({}, {}, {}).soft_rows, std::vector<float>(rows.size()));
  }
}

#if !defined(ALIGNPRO_EMULATED_DEVICE)

// Which the CPU alone draws with.
TEST_CASE("penalties do not count rows") {
  const auto model = cpu_model(tiny(false, false, false));
  const auto adapter = rows_alone(model->config(), random_rows(model->config(), 2, 3));
  engine::Engine engine(model, {64 * model->kv_block_bytes(), 9, true, true});
  engine::SamplingParams params;
  params.repetition_penalty = 2.0f;
  params.max_new_tokens = 1;
  const auto handle = engine.submit({-2, 5, -1, 5}, params, adapter);
  REQUIRE_EQ(handle->sample_row(4).penalties.size(), 1);
  CHECK_EQ(handle->sample_row(4).penalties[0].token, 5);
  while (!engine.idle()) engine.step();
  CHECK_EQ(handle->finish_reason(), engine::FinishReason::kLength);
}

TEST_CASE("gradients of rows by finite differences") {
  for (const bool with_lora : {false, true}) {
    for (const ModelConfig& config :
         {tiny(true, false, false), tiny(false, true, false), tiny(false, false, true)}) {
      std::vector<float> rows = random_rows(config, 4, 4);
      const LoraStore lora(config, 2, 8, false);
      const auto make = [&] {
        return with_lora ? lora.adapter(config, rows) : rows_alone(config, rows);
      };
      const auto reference = LoraStore(config, 1, 9, false).adapter(config, rows);
      ScoreRequest request = request_of(make());
      request.with_reference = true;
      request.reference = reference;
      request.keep_graph = true;
      const auto one = cpu_model(config, 1), two = cpu_model(config, 2);
      Score s(one, request), t(two, request);
      const size_t values = s.logprob().size();
      const Floats d_lp = normal(values, 1), d_h = normal(values, 2), d_kl = normal(values, 3);
      const AdapterGradients gradients = s.backward(d_lp, d_h, d_kl);
      CHECK(equal_bits(gradients.soft_rows, t.backward(d_lp, d_h, d_kl).soft_rows));
      CHECK_EQ(gradients.modules.empty(), !with_lora);
      request.keep_graph = false;
      const auto loss = [&] {
        request.adapter = make();
        const Score now(two, request);
        double sum = 0;
        for (size_t i = 0; i < values; ++i) {
          sum += double{d_lp[i]} * now.logprob()[i] + double{d_h[i]} * now.entropy()[i] +
                 double{d_kl[i]} * now.kl()[i];
        }
        return sum;
      };
      for (size_t row = 0; row < 4; ++row) {  // along a random direction of each
        const auto width = static_cast<size_t>(config.hidden_size);
        const Floats direction = normal(width, 50 + static_cast<uint32_t>(row)), saved = rows;
        const float h = 1e-3f;
        double expected = 0, norm = 0;
        const auto moved = [&](float by) {
          for (size_t i = 0; i < width; ++i) {
            rows[row * width + i] = saved[row * width + i] + by * direction[i];
          }
          return loss();
        };
        for (size_t i = 0; i < width; ++i) {
          const double term = double{direction[i]} * gradients.soft_rows[row * width + i];
          expected += term;
          norm += term * term;
        }
        const double difference = (moved(h) - moved(-h)) / (2 * h);
        rows = saved;
        // float32 forward: the loss is good to ~1e-5, over 2h that is 5e-3; beside it h^2.
        CHECK(std::abs(difference - expected) < 1e-2 * std::sqrt(norm) + 2e-2);
      }
    }
  }
}

#endif
