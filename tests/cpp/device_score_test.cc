// Scores with gradients on a device, the device being the CPU (tests/emulated), beside the CPU
// engine's.

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/model/model.h"
#include "alignpro/model/score.h"
#include "cuda/ops.h"
#include "device_models.h"
#include "host_launch.h"
#include "numbers.h"
#include "random_checkpoint.h"

using namespace alignpro;
using namespace alignpro::model;

namespace {

Tokens joined(Tokens first, const Tokens& then) {
  first.insert(first.end(), then.begin(), then.end());
  return first;
}

// A beginning of 18 tokens, which ends inside a block, under three continuations, two of which part
// later, inside the same block; a stranger; one that is the beginning of another, and one of a
// single token. Soft rows stand in the beginning, in one branch, and never: of the policy and of
// the reference.
std::vector<float> soft_rows(const ModelConfig& config, uint32_t seed) {
  return normal(static_cast<size_t>(3 * config.hidden_size), seed);
}

ScoreRequest request_of(const ModelConfig& config) {
  Tokens start = text(18, 5);
  start[0] = -3;
  start[9] = -1;
  const Tokens branch = joined(start, {-3, 40, 71});
  ScoreRequest request;
  request.sequences = {joined(branch, text(5, 60)), joined(branch, text(2, 70)),
                       joined(start, text(9, 80)),  text(7, 90),
                       joined(start, {3}),          {7}};
  request.starts = {19, 20, 18, 1, 18, 1};
  request.adapter = LoraStore(config, 3, 6, false).adapter(config, soft_rows(config, 1));
  request.reference = LoraStore(config, 5, 8, false).adapter(config, soft_rows(config, 2));
  request.with_reference = true;
  request.temperature = 0.8f;
  request.keep_graph = true;
  return request;
}

struct Upstream {
  std::vector<float> logprob, entropy, kl;

  explicit Upstream(size_t values)
      : logprob(normal(values, 1)), entropy(normal(values, 2)), kl(normal(values, 3)) {}
};

AdapterGradients gradients_of(Score& score) {
  const Upstream up(score.logprob().size());
  return score.backward(up.logprob, up.entropy,
                        score.has_reference() ? up.kl : std::vector<float>());
}

std::vector<float> flat(const AdapterGradients& gradients) {
  std::vector<float> all;
  for (const auto& [a, b] : gradients.modules) {
    all.insert(all.end(), a.begin(), a.end());
    all.insert(all.end(), b.begin(), b.end());
  }
  all.insert(all.end(), gradients.soft_rows.begin(), gradients.soft_rows.end());
  return all;
}

double difference(const AdapterGradients& got, const AdapterGradients& expected) {
  // Of any module: a wrong one does not hide among the others.
  const std::vector<float>& rows = expected.soft_rows;
  double most = relative_error(got.soft_rows, Doubles(rows.begin(), rows.end()));
  for (size_t i = 0; i < expected.modules.size(); ++i) {
    const auto& [a, b] = expected.modules[i];
    most = std::max({most, relative_error(got.modules[i].a, Doubles(a.begin(), a.end())),
                     relative_error(got.modules[i].b, Doubles(b.begin(), b.end()))});
  }
  return most;
}

// Sums in another order through two layers and back.
constexpr double kBudgetOfGradients = 2e-5;

void check_gradients(const ModelConfig& config, ScoreRequest request) {
  const auto device = device_model(config);
  const auto cpu = cpu_model(config, 1);
  Score expected(cpu, request);
  const AdapterGradients truth = gradients_of(expected);
  Score got(device, request);
  CHECK(relative_error(got.logprob(), Doubles(expected.logprob().begin(),
                                              expected.logprob().end())) < kBudgetOfGradients);
  const AdapterGradients kept = gradients_of(got);
  CHECK(difference(kept, truth) < kBudgetOfGradients);
  request.activations = Activations::kRecompute;
  Score again(device, request);
  CHECK_EQ(again.logprob(), got.logprob());
  CHECK_EQ(flat(gradients_of(again)), flat(kept));
}

}  // namespace

TEST_CASE("gradients are the cpus with qk norm") {
  const ModelConfig config = small(false, true, false);
  check_gradients(config, request_of(config));
}
SLOW_TEST(gradients_are_the_cpus_with_bias) {
  const ModelConfig config = small(true, false, false);
  check_gradients(config, request_of(config));
}
SLOW_TEST(gradients_are_the_cpus_fused_in_a_window) {
  const ModelConfig config = small(false, false, true, 9);
  check_gradients(config, request_of(config));
}

// One module of a site, another of a layer alone; no reference; the upstream of log-probabilities.
SLOW_TEST(gradients_of_some_modules) {
  const ModelConfig config = small(false, true, false);
  LoraStore all(config, 2, 6, false);
  std::erase_if(all.values, [](const auto& module) {
    return module.first != "model.layers.0.self_attn.k_proj" &&
           module.first != "model.layers.1.mlp.up_proj";
  });
  ScoreRequest request = request_of(config);
  request.adapter = all.adapter(config, soft_rows(config, 1));
  request.reference = nullptr;
  request.with_reference = false;
  check_gradients(config, request);
}

SLOW_TEST(gradients_of_rows_alone) {
  const ModelConfig config = small(false, false, true, 9);
  ScoreRequest request = request_of(config);
  request.adapter = std::make_shared<Adapter>(config, std::map<std::string, LoraMatrices>(), 1.0f,
                                              soft_rows(config, 1));
  check_gradients(config, request);
}

// Forward by cuBLASLt's stand-in, whose sums go another way; backward as where it is deterministic.
TEST_CASE("fast gradients stay near") {
  const ModelConfig config = small(true, false, false);
  ScoreRequest request = request_of(config);
  Score strict(device_model(config), request);
  const auto model = device_model(config, DType::kF32, false);
  Score fast(model, request);
  const double apart =
      relative_error(fast.logprob(), Doubles(strict.logprob().begin(), strict.logprob().end()));
  CHECK((apart > 0 && apart < 1e-5));
  const AdapterGradients expected = gradients_of(strict), got = gradients_of(fast);
  CHECK(difference(got, expected) < 1e-4);
  request.activations = Activations::kRecompute;
  Score again(model, request);
  CHECK_EQ(again.logprob(), fast.logprob());
  CHECK_EQ(flat(gradients_of(again)), flat(got));
}

SLOW_TEST(bfloat16_gradients_stay_near) {
  const ModelConfig config = wide(small(false, true, false));
  ScoreRequest request = request_of(config);
  Score exact(device_model(config), request), rounded(device_model(config, DType::kBF16), request);
  const std::vector<float> truth = flat(gradients_of(exact)), got = flat(gradients_of(rounded));
  const double far = relative_error(got, Doubles(truth.begin(), truth.end()));
  // Eight bits of mantissa in weights, activations and their gradients: 0.055 here.
  CHECK((far > 1e-4 && far < 0.1));
}

// The formula is what is allocated, beside weights and adapters.
SLOW_TEST(bytes_are_what_is_held_at_the_peak) {
  const ModelConfig config = small(false, true, false);
  const auto device = device_model(config);
  cuda::EmulatedMemory& memory = cuda::emulated_memory();
  ScoreRequest request = request_of(config);
  request.sequences.erase(request.sequences.begin() + 1, request.sequences.begin() + 3);
  request.starts.erase(request.starts.begin() + 1, request.starts.begin() + 3);
  Score(device, request);  // uploads the adapters
  std::vector<int64_t> peaks;
  for (const bool graph : {true, false}) {
    for (const auto activations : {Activations::kKeep, Activations::kRecompute}) {
      request.keep_graph = graph;
      request.activations = activations;
      const int64_t before = memory.peak = memory.now;
      {
        Score score(device, request);
        if (graph) (void)gradients_of(score);
      }
      CHECK_EQ(memory.now, before);
      peaks.push_back(memory.peak - before);
      // An allocation of its own is a multiple of 256 bytes.
      CHECK_EQ(Score::bytes(*device, request), peaks.back());
    }
  }
  CHECK(peaks[0] > peaks[1]);  // what recomputing is for
}
