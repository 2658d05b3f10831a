// Digests of what the CPU computes on small random models, recorded once: log-probabilities,
// entropy, KL, hidden states, gradients and sampled tokens. A change of structure changes no bit; a
// change of arithmetic records them anew and says so. AVX2, AVX-512 and all of
// aarch64 give equal bits; the generic kernels of other machines do not fuse multiply and add, so
// there nothing is compared.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/cpu_isa.h"
#include "alignpro/engine/client.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/model.h"
#include "alignpro/model/score.h"
#include "random_checkpoint.h"

using namespace alignpro;
using namespace alignpro::model;

namespace {

// FNV-1a.
class Digest {
 public:
  template <typename T>
  void add(const std::vector<T>& values) {
    for (const T& value : values) {
      unsigned char bytes[sizeof(T)];
      std::memcpy(bytes, &value, sizeof(T));
      for (const unsigned char byte : bytes) {
        hash_ = (hash_ ^ byte) * 0x100000001b3u;
      }
    }
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

std::vector<int32_t> text(int64_t size, int32_t start) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < size; ++i) {
    tokens.push_back(static_cast<int32_t>((start + i * 31) % 111));
  }
  return tokens;
}

// A beginning that ends inside a block under three continuations, a stranger, a single token.
ScoreRequest request_of(const ModelConfig& config) {
  ScoreRequest request;
  for (const int32_t branch : {40, 60, 80}) {
    std::vector<int32_t> sequence = text(21, 5);
    for (const int32_t token : text(branch / 8, branch)) sequence.push_back(token);
    request.sequences.push_back(sequence);
    request.starts.push_back(19);
  }
  request.sequences.push_back(text(7, 90));
  request.starts.push_back(1);
  request.sequences.push_back({7});
  request.starts.push_back(1);
  request.adapter = LoraStore(config, 3, 6, false).adapter(config);
  request.reference = LoraStore(config, 5, 8, false).adapter(config);
  request.with_reference = true;
  request.with_hidden = true;
  request.temperature = 0.8f;
  return request;
}

std::vector<float> upstream(size_t count, float step) {
  std::vector<float> values;
  for (size_t i = 0; i < count; ++i) values.push_back(step * static_cast<float>(i % 7) - 0.4f);
  return values;
}

uint64_t digest_of_scores(const std::shared_ptr<Model>& model, bool with_gradients) {
  Digest digest;
  for (const auto activations : {Activations::kKeep, Activations::kRecompute}) {
    ScoreRequest request = request_of(model->config());
    request.keep_graph = with_gradients;
    request.activations = activations;
    Score score(model, request);
    for (const auto* values : {&score.logprob(), &score.entropy(), &score.kl(),
                               &score.reference_logprob(), &score.hidden()}) {
      digest.add(*values);
    }
    if (!with_gradients) continue;
    const size_t count = score.logprob().size();
    const AdapterGradients gradients =
        score.backward(upstream(count, 0.1f), upstream(count, 0.2f), upstream(count, 0.3f));
    for (const auto& [a, b] : gradients.modules) {
      digest.add(a);
      digest.add(b);
    }
  }
  return digest.value();
}

uint64_t digest_of_samples(const std::shared_ptr<Model>& model) {
  const auto engine = std::make_shared<engine::Engine>(model, engine::EngineOptions{0, 12, true});
  const auto client = std::make_shared<engine::Client>(engine);
  const auto adapter = LoraStore(model->config(), 3, 6, false).adapter(model->config());
  std::vector<std::shared_ptr<engine::Sequence>> handles;
  for (int32_t i = 0; i < 5; ++i) {
    engine::SamplingParams params;
    params.max_new_tokens = 6;
    params.temperature = i == 0 ? 0.0f : 0.9f;
    params.top_p = i == 3 ? 0.7f : 1.0f;
    params.seed = static_cast<uint64_t>(i);
    params.ignore_eos = true;
    handles.push_back(client->submit(text(17 + i, 5), params, i % 2 == 0 ? adapter : nullptr));
  }
  client->run();
  Digest digest;
  for (const auto& handle : handles) {
    const auto output = handle->read(0);
    digest.add(output.tokens);
    digest.add(output.logprobs);
  }
  return digest.value();
}

struct Recorded {
  std::string name;
  ModelConfig config;
  ops::Arithmetic arithmetic;
  DType kv_dtype;
  uint64_t scores, samples;
};

// Shapes whose rows are whole groups of 32, which int8 needs.
ModelConfig in_groups() {
  ModelConfig config = tiny(true, false, false);
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.head_dim = config.rope.rotary_dim = 16;
  return config;
}

}  // namespace

TEST_CASE("the bits are those recorded") {
#if !defined(__aarch64__)
  if (cpu_isa() == CpuIsa::kGeneric) return;
#endif
  ModelConfig window = tiny(false, false, true);
  window.sliding_window = 9;
  const std::vector<Recorded> all = {
      {"bias", tiny(true, false, false), ops::Arithmetic::kFloat32, DType::kF32,
       0xa758398d26bb4565u, 0x192cdcdc3f9821cbu},
      {"qk_norm", tiny(false, true, false), ops::Arithmetic::kFloat32, DType::kF32,
       0x9d566c79364cdf09u, 0xe58892202384aa38u},
      {"fused, window", window, ops::Arithmetic::kFloat32, DType::kF32, 0xc792987d8f02ba11u,
       0x4de60172a2d4befu},
      {"gemma", tiny_gemma(), ops::Arithmetic::kFloat32, DType::kF32, 0x949b0042224de1b1u,
       0xdbfebe4ca85b77c5u},
      {"float16 keys and values", tiny(true, false, false), ops::Arithmetic::kFloat32, DType::kF16,
       0x230e99daa1147f5du, 0xdb52e5b21d79f118u},
      {"int8", in_groups(), ops::Arithmetic::kInt8, DType::kF32, 0xe1cc941ab32194c9u,
       0x1db7be38adf058aeu},
  };
  for (const Recorded& one : all) {
    for (const int threads : {1, 2}) {
      const auto model = cpu_model(one.config, threads, one.arithmetic, one.kv_dtype);
      const bool trains =
          one.arithmetic == ops::Arithmetic::kFloat32 && one.kv_dtype == DType::kF32;
      CAPTURE(one.name);
      CHECK_EQ(digest_of_scores(model, trains), one.scores);
      CHECK_EQ(digest_of_samples(model), one.samples);
    }
  }
}
