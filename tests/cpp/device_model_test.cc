// A model on a device, the device being the CPU (tests/emulated), beside the CPU engine: what it
// generates and scores, and that a sequence's bits are its own.

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/model.h"
#include "alignpro/model/score.h"
#include "cuda/ops.h"
#include "device_models.h"
#include "host_launch.h"
#include "numbers.h"
#include "random_checkpoint.h"

using namespace alignpro;
using namespace alignpro::model;
using engine::Engine;
using engine::Sequence;

namespace {

// float32 sums in another order, through two layers: log-probabilities differ by a few 1e-6.
constexpr double kLogprobBudget = 2e-5;

struct Ask {
  Tokens prompt;
  uint64_t seed;
  float temperature;
  std::shared_ptr<Adapter> adapter;
};

// Prompts of a common beginning that ends inside a block, one that repeats another, a stranger;
// with and without the adapter, greedy and not.
std::vector<Ask> asks(const std::shared_ptr<Adapter>& adapter) {
  std::vector<Ask> all;
  const Tokens start = text(18, 5);
  for (int32_t i = 0; i < 3; ++i) {
    Tokens prompt = start;
    for (int32_t k = 0; k <= i; ++k) prompt.push_back((40 + 7 * i + k) % 111);
    all.push_back({prompt, static_cast<uint64_t>(i), i == 0 ? 0.0f : 0.9f, nullptr});
  }
  all.push_back({all[1].prompt, 11, 0.7f, nullptr});
  all.push_back({text(3, 60), 12, 1.0f, adapter});
  all.push_back({all[2].prompt, 13, 0.8f, adapter});
  return all;
}

struct Answer {
  Tokens tokens;
  std::vector<float> logprobs;

  bool operator==(const Answer&) const = default;
};

std::vector<Answer> generate(Engine& engine, const std::vector<Ask>& asked, int64_t count = 4) {
  std::vector<std::shared_ptr<Sequence>> handles;
  for (const Ask& ask : asked) {
    engine::SamplingParams params;
    params.max_new_tokens = count;
    params.temperature = ask.temperature;
    params.seed = ask.seed;
    params.ignore_eos = true;
    handles.push_back(engine.submit(ask.prompt, params, ask.adapter));
  }
  while (!engine.idle()) engine.step();
  std::vector<Answer> answers;
  for (const auto& handle : handles) {
    if (handle->error()) std::rethrow_exception(handle->error());
    auto output = handle->read(0);
    answers.push_back({std::move(output.tokens), std::move(output.logprobs)});
  }
  return answers;
}

engine::EngineOptions options(const LanguageModel& model, int64_t max_rows,
                              bool prefix_cache = true, bool lookup = true) {
  return {64 * model.kv_block_bytes(), max_rows, prefix_cache, lookup};
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - b[i]);
    if (!(difference <= most)) most = difference;
  }
  return most;
}

ScoreRequest score_request(const std::vector<Ask>& asked, const std::vector<Answer>& answers,
                           size_t which) {
  ScoreRequest request;
  Tokens all = asked[which].prompt;
  all.insert(all.end(), answers[which].tokens.begin(), answers[which].tokens.end());
  request.sequences = {all};
  request.starts = {static_cast<int64_t>(asked[which].prompt.size())};
  request.adapter = asked[which].adapter;
  request.temperature = asked[which].temperature == 0.0f ? 1.0f : asked[which].temperature;
  return request;
}

// Answers of six tokens have the bits that they have alone, and in a score, which knows no graph.
void check_alone_and_scored(const std::shared_ptr<const Model>& device,
                            const std::vector<Ask>& asked, const std::vector<Answer>& together) {
  for (size_t i = 0; i < asked.size(); ++i) {
    Engine alone(device, options(*device, 40));
    CHECK(generate(alone, {asked[i]}, 6)[0] == together[i]);
    CHECK_EQ(Score(device, score_request(asked, together, i)).logprob(), together[i].logprobs);
  }
}

void check_against_cpu(const ModelConfig& config) {
  const auto adapter = LoraStore(config, 3, 6, false).adapter(config);
  const auto asked = asks(adapter);
  const auto cpu = cpu_model(config, 1);
  Engine reference(cpu, {0, 16, true});
  const std::vector<Answer> expected = generate(reference, asked);

  const auto device = device_model(config);
  // Twelve rows a step: prompts go by pieces beside what decodes already.
  Engine engine(device, options(*device, 12));
  const std::vector<Answer> got = generate(engine, asked);
  CHECK(engine.stats().cached_tokens > 0);
  for (size_t i = 0; i < asked.size(); ++i) {
    CHECK_EQ(got[i].tokens, expected[i].tokens);
    CHECK(largest_difference(got[i].logprobs, expected[i].logprobs) < kLogprobBudget);
    const Score scored(device, score_request(asked, got, i));
    CHECK_EQ(scored.logprob(), got[i].logprobs);
  }
}

}  // namespace

SLOW_TEST(generates_what_the_cpu_generates_with_bias) {
  check_against_cpu(small(true, false, false));
}
SLOW_TEST(generates_what_the_cpu_generates_with_qk_norm) {
  check_against_cpu(small(false, true, false));
}
TEST_CASE("generates what the cpu generates fused in a window") {
  check_against_cpu(small(false, false, true, 9));
}

SLOW_TEST(a_sequences_bits_are_its_own) {
  const ModelConfig config = wide(small(true, true, false));
  for (const DType compute : {DType::kF32, DType::kBF16}) {
    const auto device = device_model(config, compute);
    const auto asked = asks(LoraStore(config, 3, 6, false).adapter(config));
    Engine together(device, options(*device, 40));
    const std::vector<Answer> all = generate(together, asked, 3);
    for (const size_t i : {size_t{1}, size_t{5}}) {
      // Alone, a few tokens of prefill at a time, nothing shared.
      Engine alone(device, options(*device, 3, false));
      CHECK(generate(alone, {asked[i]}, 3)[0] == all[i]);
      CHECK_EQ(Score(device, score_request(asked, all, i)).logprob(), all[i].logprobs);
    }
    // The very same prompts once more: every block is found.
    CHECK(generate(together, asked, 3) == all);
  }
}

// Three sequences in a graph of four rows, then two of them in one of two; the first of each shape
// runs without. Alone, other shapes, and those of drafts: the same bits.
SLOW_TEST(a_decode_step_is_a_graph_from_its_second_time_on) {
  const ModelConfig config = wide(small(false, true, false));
  const auto device = device_model(config);
  const auto adapter = LoraStore(config, 3, 6, false).adapter(config);
  for (const auto& with : {std::shared_ptr<Adapter>(), adapter}) {
    std::vector<Ask> asked;
    for (int32_t i = 0; i < 3; ++i) {
      asked.push_back({text(2 + 15 * i, 7 * i), static_cast<uint64_t>(i), 0.9f, with});
    }
    Engine engine(device, options(*device, 64, true, false));
    const int64_t before = cuda::emulated_graph_launches();
    const std::vector<Answer> together = generate(engine, asked, 6);
    CHECK_EQ(cuda::emulated_graph_launches() - before, int64_t{4});  // of five steps of decoding
    const std::vector<Answer> fewer = generate(engine, {asked[0], asked[2]}, 4);
    // Their prompts are cached: the last token of each is a step like those that follow.
    CHECK_EQ(cuda::emulated_graph_launches() - before, int64_t{7});
    check_alone_and_scored(device, asked, together);
    Answer first = together[0];
    first.tokens.resize(4);
    first.logprobs.resize(4);
    CHECK(fewer[0] == first);
  }
}

// Prompter and target rows in one batch: three and one of four and one, then two and one.
SLOW_TEST(a_step_of_both_kinds_is_a_graph) {
  const ModelConfig config = wide(small(false, true, false));
  const auto device = device_model(config);
  const auto adapter = LoraStore(config, 3, 6, false).adapter(config);
  std::vector<Ask> asked;
  for (int32_t i = 0; i < 4; ++i) {
    asked.push_back({text(2 + 15 * i, 7 * i), static_cast<uint64_t>(i), 0.9f,
                     i == 1 ? adapter : std::shared_ptr<Adapter>()});
  }
  Engine engine(device, options(*device, 100, true, false));
  const int64_t before = cuda::emulated_graph_launches();
  const std::vector<Answer> together = generate(engine, asked, 6);
  CHECK_EQ(cuda::emulated_graph_launches() - before, int64_t{4});  // of five steps of decoding
  generate(engine, {asked[0], asked[1], asked[2]}, 4);  // prompts cached: four steps of a new shape
  CHECK_EQ(cuda::emulated_graph_launches() - before, int64_t{7});
  check_alone_and_scored(device, asked, together);
}

// Graphs know addresses and an adapter's matrices: other adapters have graphs of their own, and
// buffers that grew leave none behind.
SLOW_TEST(a_graph_serves_its_adapter_and_its_buffers_alone) {
  const ModelConfig config = small(false, false, false);
  const auto device = device_model(config);
  Engine engine(device, options(*device, 64));
  const auto first = LoraStore(config, 2, 6, false).adapter(config);
  const auto second = LoraStore(config, 2, 7, false).adapter(config);
  int32_t start = 1;
  const auto check = [&](int count, int64_t length, const std::shared_ptr<Adapter>& with) {
    std::vector<Ask> asked;
    for (int i = 0; i < count; ++i) {
      asked.push_back({text(length, start += 5), static_cast<uint64_t>(start), 0.9f, with});
    }
    const std::vector<Answer> answers = generate(engine, asked, 4);
    for (size_t i = 0; i < asked.size(); ++i) {
      CHECK_EQ(Score(device, score_request(asked, answers, i)).logprob(), answers[i].logprobs);
    }
  };
  for (const auto& with : {first, second, std::shared_ptr<Adapter>()}) check(2, 3, with);
  check(8, 8, nullptr);  // everything grows
  for (const auto& with : {first, second, std::shared_ptr<Adapter>()}) check(2, 3, with);
}

// The emulated library's sums go by the number of rows: in last digits a row is not its own.
TEST_CASE("the fast mode is near and says so") {
  const ModelConfig config = small(true, false, false);
  const auto strict = device_model(config), fast = device_model(config, DType::kF32, false);
  CHECK((strict->device().deterministic() && !fast->device().deterministic()));
  const auto asked = asks(LoraStore(config, 3, 6, false).adapter(config));
  Engine engine(fast, options(*fast, 12));
  const int64_t before = cuda::emulated_graph_launches();
  const std::vector<Answer> answers = generate(engine, asked);
  double sampled = 0, apart = 0;
  for (size_t i = 0; i < asked.size(); ++i) {
    const ScoreRequest request = score_request(asked, answers, i);
    const auto scored = Score(fast, request).logprob();
    sampled = std::max(sampled, largest_difference(scored, answers[i].logprobs));
    apart = std::max(apart, largest_difference(scored, Score(strict, request).logprob()));
  }
  CHECK((sampled > 0 && sampled < kLogprobBudget));
  CHECK((apart > 0 && apart < kLogprobBudget));
  // One adapter, steps of decode alone: graphs hold these products too.
  const std::vector<Answer> base = generate(engine, {asked[0], asked[1]}, 6);
  CHECK(cuda::emulated_graph_launches() > before);
  for (size_t i = 0; i < base.size(); ++i) {
    const auto scored = Score(fast, score_request(asked, base, i)).logprob();
    CHECK(largest_difference(scored, base[i].logprobs) < kLogprobBudget);
  }
}

TEST_CASE("scores are the cpus") {
  const ModelConfig config = small(true, false, false);
  const auto device = device_model(config);
  const auto cpu = cpu_model(config, 1);
  ScoreRequest request;
  request.sequences = {text(23, 4), text(2, 9), text(40, 4), {7}};
  request.starts = {1, 1, 33, 1};
  request.adapter = LoraStore(config, 5, 6, false).adapter(config);
  request.reference = LoraStore(config, 2, 8, false).adapter(config);
  request.with_reference = true;
  request.temperature = 0.8f;
  request.with_hidden = true;
  const Score expected(cpu, request);
  const Score got(device, request);
  CHECK(largest_difference(got.logprob(), expected.logprob()) < kLogprobBudget);
  CHECK(largest_difference(got.entropy(), expected.entropy()) < kLogprobBudget);
  CHECK(largest_difference(got.kl(), expected.kl()) < kLogprobBudget);
  CHECK(largest_difference(got.reference_logprob(), expected.reference_logprob()) < kLogprobBudget);
  CHECK(largest_difference(got.hidden(), expected.hidden()) < kLogprobBudget);
  // Against itself there is no divergence, to the bit.
  request.reference = request.adapter;
  const Score itself(device, request);
  for (const float kl : itself.kl()) CHECK_EQ(kl, 0.0f);
}

SLOW_TEST(bfloat16_stays_near_float32) {
  const ModelConfig config = wide(small(false, true, false));
  ScoreRequest request;
  request.sequences = {text(20, 4)};
  request.starts = {1};
  const auto exact = Score(device_model(config), request).logprob();
  const auto rounded = Score(device_model(config, DType::kBF16), request).logprob();
  // Eight bits of mantissa in weights and activations, through two layers.
  const double difference = relative_error(rounded, Doubles(exact.begin(), exact.end()));
  CHECK((difference > 1e-4 && difference < 3e-2));
}

TEST_CASE("what a device cannot do is refused by name") {
  const ModelConfig config = small(false, false, false);
  CHECK_THROWS_WITH_AS((void)(device_model(config, DType::kF16)),
                       doctest::Contains("bfloat16 or float32"), InvalidArgument);
  CHECK_THROWS_WITH_AS(
      (void)(device_model(config, DType::kBF16)),
      doctest::Contains("intermediate_size: expected a multiple of 8 in BF16, the model has 52"),
      InvalidArgument);
  ModelConfig broad = config;
  broad.head_dim = broad.rope.rotary_dim = 160;
  CHECK_THROWS_WITH_AS((void)(device_model(broad)),
                       doctest::Contains("head_dim: expected at most 128"), InvalidArgument);
  ModelConfig large = config;
  large.vocab_size = 500000;
  CHECK_THROWS_WITH_AS((void)(device_model(large)),
                       doctest::Contains("MB in F32, 64 MB of emulated"), Unavailable);
}

TEST_CASE("weights that give nan are an error and the engine lives") {
  const ModelConfig config = small(false, false, false);
  const auto device = device_model(config);
  Engine engine(device, options(*device, 8));
  LoraStore broken(config, 1, 3, false);
  for (auto& [path, pair] : broken.values) pair.first[0] = NAN;
  const auto adapter = broken.adapter(config);
  CHECK_THROWS_WITH_AS((void)(generate(engine, {{{1, 2}, 0, 1.0f, adapter}})),
                       doctest::Contains("no finite softmax"), NumericError);
  CHECK_EQ(generate(engine, {{{1, 2}, 0, 1.0f, nullptr}}, 2)[0].tokens.size(), size_t{2});
}
