// The ops of csrc/cuda/ops.h as callers see them, compiled for the CPU (host_launch.h): launchers,
// grids and workspaces, beside the CPU's own ops.

#include <algorithm>
#include <cmath>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/rng.h"
#include "alignpro/ops/head_sample.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/rms_norm.h"
#include "alignpro/ops/swiglu.h"
#include "cuda/ops.h"
#include "host_block.h"
#include "numbers.h"

using namespace alignpro;

namespace {

cuda::Matrix matrix(Tensor<float>& t, int64_t rows, int64_t cols) {
  return {t.data(), rows, cols, cols, DType::kF32};
}

double difference(const Floats& a, const Floats& b) {
  return relative_error(a, Doubles(b.begin(), b.end()));
}

struct Outputs {
  Floats logprob, entropy, kl, reverse_kl, ref_logprob;
  Doubles lse, ref_lse;

  explicit Outputs(int64_t rows) {
    const auto count = static_cast<size_t>(rows);
    for (Floats* f : {&logprob, &entropy, &kl, &reverse_kl, &ref_logprob}) f->assign(count, NAN);
    lse = ref_lse = Doubles(count, NAN);
  }
  template <typename Output>
  Output views() {
    return {logprob.data(),     entropy.data(), kl.data(),     reverse_kl.data(),
            ref_logprob.data(), lse.data(),     ref_lse.data()};
  }
};

// Forward and backward of both engines.
void check_logprob(int64_t rows, int64_t vocab, int64_t cols) {
  ThreadPool pool(1);
  Tensor<float> hidden(normal(static_cast<size_t>(rows * cols), 1));
  Tensor<float> ref(normal(static_cast<size_t>(rows * cols), 2));
  Tensor<float> weight(normal(static_cast<size_t>(vocab * cols), 3, 0.4f));
  std::vector<int32_t> tokens;
  for (int64_t m = 0; m < rows; ++m) tokens.push_back(static_cast<int32_t>((m * 4111 + 7) % vocab));

  const ops::QuantizedMatrix stored{reinterpret_cast<const std::byte*>(weight.data()), DType::kF32,
                                    vocab, cols};
  const ops::LogprobInput cpu_in{.rows = rows,
                                 .hidden = hidden.data(),
                                 .weight = stored,
                                 .tokens = tokens,
                                 .temperature = 0.8f,
                                 .ref_hidden = ref.data()};
  Outputs cpu(rows), gpu(rows);
  ops::linear_logprob(cpu_in, cpu.views<ops::LogprobOutput>(), nullptr, pool);

  cuda::LogprobInput in;
  in.hidden = matrix(hidden, rows, cols);
  in.weight = in.ref_weight = matrix(weight, vocab, cols);
  in.ref_hidden = matrix(ref, rows, cols);
  in.tokens = tokens.data();
  in.temperature = 0.8f;
  Tensor<float> workspace(static_cast<size_t>(cuda::linear_logprob_bytes(in) / 4));
  cuda::linear_logprob(in, gpu.views<cuda::LogprobOutput>(), workspace.data(), nullptr);
  CHECK(difference(gpu.logprob, cpu.logprob) < kBudget);
  CHECK(difference(gpu.entropy, cpu.entropy) < kBudget);
  CHECK(difference(gpu.kl, cpu.kl) < 2e-5);
  CHECK(difference(gpu.reverse_kl, cpu.reverse_kl) < 2e-5);
  CHECK(difference(gpu.ref_logprob, cpu.ref_logprob) < kBudget);

  const auto count = static_cast<size_t>(rows);
  Floats cpu_tv(count), cpu_above(count), tv(count, NAN), above(count, NAN);
  ops::total_variation(cpu_in, cpu.views<ops::LogprobOutput>(), cpu_tv.data(), cpu_above.data(),
                       pool);
  Tensor<float> second(static_cast<size_t>(cuda::total_variation_bytes(in) / 4));
  cuda::total_variation(in, gpu.views<cuda::LogprobOutput>(), tv.data(), above.data(),
                        second.data(), nullptr);
  CHECK(difference(tv, cpu_tv) < 2e-5);
  CHECK(difference(above, cpu_above) < 2e-5);
  const Floats u[5] = {normal(count, 4), normal(count, 5), normal(count, 6), normal(count, 7),
                       normal(count, 8)};
  Floats d_hidden(static_cast<size_t>(rows * cols)), d_weight(static_cast<size_t>(vocab * cols));
  ops::linear_logprob_backward(
      cpu_in, cpu.views<ops::LogprobOutput>(), nullptr,
      {u[0].data(), u[1].data(), u[2].data(), u[3].data(), u[4].data(), cpu_above.data()},
      d_hidden.data(), d_weight.data(), pool);
  Tensor<float> to_hidden(d_hidden.size()), to_weight(d_weight.size());
  Tensor<float> memory(static_cast<size_t>(cuda::linear_logprob_backward_bytes(in) / 4));
  cuda::linear_logprob_backward(
      in, gpu.views<cuda::LogprobOutput>(),
      {u[0].data(), u[1].data(), u[2].data(), u[3].data(), u[4].data(), above.data()},
      matrix(to_hidden, rows, cols), matrix(to_weight, vocab, cols), memory.data(), nullptr);
  CHECK(difference(to_hidden.floats(), d_hidden) < 2e-5);
  CHECK(difference(to_weight.floats(), d_weight) < 2e-5);
}

}  // namespace

TEST_CASE("linear logprob is the cpus") {
  check_logprob(3, 4200, 8);   // more than a chunk of tokens
  check_logprob(2050, 20, 4);  // more than a chunk of rows
}

TEST_CASE("head sample draws the cpus tokens") {
  const int64_t rows = 12, vocab = 900, cols = 24;
  ThreadPool pool(1);
  Tensor<float> hidden(normal(rows * cols, 1)), head(normal(vocab * cols, 2, 0.3f));
  const auto packed = ops::PackedMatrix::pack(vocab, cols, head.data());
  std::vector<cuda::SampleRow> draws;
  std::vector<ops::SampleRow> requests;
  for (uint32_t i = 0; i < rows; ++i) {
    const float temperature = i % 4 == 0 ? 0.0f : 0.5f + 0.1f * static_cast<float>(i);
    ops::SampleRow& request = requests.emplace_back();
    request.temperature = temperature;
    request.uniform = keyed_uniform(uint64_t{1} << 40, i % 2, i);
    draws.push_back({{temperature}, request.uniform});
  }
  std::vector<ops::SampledToken> expected(rows);
  ops::head_sample(packed, hidden.data(), requests, expected, pool);
  std::vector<int32_t> tokens(rows, -7);
  Floats logprobs(rows, NAN);
  Tensor<float> workspace(static_cast<size_t>(cuda::head_sample_bytes(rows, vocab) / 4));
  cuda::head_sample(matrix(hidden, rows, cols), matrix(head, vocab, cols), draws.data(),
                    tokens.data(), logprobs.data(), workspace.data(), nullptr);
  for (size_t i = 0; i < rows; ++i) {
    CHECK_EQ(tokens[i], expected[i].token);
    CHECK(std::abs(logprobs[i] - expected[i].logprob) < 1e-5f);
  }
}

TEST_CASE("head sample truncates as the cpu") {
  const int64_t rows = 134, vocab = 300, cols = 8;
  ThreadPool pool(1);
  Tensor<float> hidden(normal(rows * cols, 1)), head(normal(vocab * cols, 2, 0.8f));
  // Tokens 0, 17 and 250 tie, for rows 11 and 21 as the best; both have top_k 1, and 21 bans.
  for (const int64_t token : {17, 250}) {
    std::copy_n(head.data(), cols, head.data() + token * cols);
  }
  for (const int64_t row : {11, 21}) {
    for (int64_t k = 0; k < cols; ++k) hidden.data()[row * cols + k] = 4 * head.data()[k];
  }
  const auto packed = ops::PackedMatrix::pack(vocab, cols, head.data());
  std::vector<cuda::SampleRow> draws;
  std::vector<ops::SampleRow> requests;
  const std::vector<int32_t> banned = {3, 17, 40, 299};
  for (uint32_t i = 0; i < rows; ++i) {
    cuda::SampleRow draw{{0.8f}, keyed_uniform(9, 1, i)};
    ops::SampleRow request;
    const bool some = i % 16 == 5 || i % 16 == 11;  // the others are plain
    const int32_t top_k[] = {0, 1, 2, 5, 1000}, k = top_k[i % 5];
    const float top_p[] = {1.0f, 0.0f, 0.3f, 0.9f}, min_p[] = {0.0f, 0.02f, 1.0f};
    if (some) {
      draw.top_k = request.top_k = k;
      draw.top_p = request.top_p = top_p[i / 16 % 4];
      draw.min_p = request.min_p = min_p[i / 5 % 3];
      draw.ban_begin = 1;
      draw.ban_count = i % 3 == 0 ? 3 : 0;
      if (i % 16 == 11 && i % 3 == 0) draw.temperature = 0.0f;
      request.banned =
          std::span<const int32_t>(banned).subspan(1, static_cast<size_t>(draw.ban_count));
    }
    request.temperature = draw.temperature;
    request.uniform = draw.uniform;
    draws.push_back(draw);
    requests.push_back(request);
  }
  std::vector<ops::SampledToken> expected(rows);
  ops::head_sample(packed, hidden.data(), requests, expected, pool);
  std::vector<int32_t> tokens(rows, -7);
  Floats logprobs(rows, NAN), kept(rows, NAN);
  Tensor<float> workspace(static_cast<size_t>(cuda::head_sample_bytes(rows, vocab, true) / 4));
  const cuda::Truncation truncation{banned.data(), kept.data()};
  const auto draw = [&](const cuda::Truncation* with) {
    cuda::head_sample(matrix(hidden, rows, cols), matrix(head, vocab, cols), draws.data(),
                      tokens.data(), logprobs.data(), workspace.data(), nullptr, with);
  };
  draw(&truncation);
  for (size_t i = 0; i < rows; ++i) {
    CHECK_EQ(tokens[i], expected[i].token);
    CHECK(std::abs(logprobs[i] - expected[i].logprob) < 1e-5f);
    CHECK(std::abs(kept[i] - expected[i].kept_mass) < 1e-5f);
  }
  CHECK((tokens[11] == 0 && tokens[21] == 0));
  // What was truncated and is not: no token is better than a wrong one.
  draw(nullptr);
  CHECK_EQ(tokens[5], -1);
  CHECK_EQ(tokens[6], expected[6].token);
  // Nothing left to draw.
  std::vector<int32_t> all(vocab);
  for (int32_t t = 0; t < vocab; ++t) all[static_cast<size_t>(t)] = t;
  draws[0].ban_count = vocab;
  draws.resize(1);
  requests.resize(1);
  const cuda::Truncation nothing{all.data(), kept.data()};
  cuda::head_sample(matrix(hidden, 1, cols), matrix(head, vocab, cols), draws.data(), tokens.data(),
                    logprobs.data(), workspace.data(), nullptr, &nothing);
  CHECK((tokens[0] == -1 && std::isnan(logprobs[0]) && std::isnan(kept[0])));
}

TEST_CASE("row ops are the cpus") {
  const int64_t rows = 5, n = 40;
  ThreadPool pool(1);
  Tensor<float> x(normal(rows * 2 * n, 1)), weight(normal(2 * n, 2)), y(rows * 2 * n), h(rows * n);
  Floats expected(rows * 2 * n), activated(rows * n);
  ops::rms_norm(rows, 2 * n, x.data(), 2 * n, weight.data(), 1e-5f, expected.data(), 2 * n, pool);
  cuda::rms_norm(matrix(x, rows, 2 * n), weight.data(), 1e-5f, matrix(y, rows, 2 * n), nullptr);
  CHECK(difference(y.floats(), expected) < kBudget);
  ops::swiglu(rows, n, x.data(), activated.data(), pool);
  cuda::swiglu(matrix(x, rows, 2 * n), matrix(h, rows, n), nullptr);
  CHECK(difference(h.floats(), activated) < kBudget);
  ops::geglu(rows, n, x.data(), activated.data(), pool);
  cuda::geglu(matrix(x, rows, 2 * n), matrix(h, rows, n), nullptr);
  CHECK(difference(h.floats(), activated) < kBudget);
  ops::rms_norm_add(rows, n, h.data(), n, weight.data(), 1e-5f, x.data(), 2 * n, expected.data(), n,
                    pool);
  Tensor<float> sum(rows * n);
  cuda::rms_norm_add(matrix(h, rows, n), weight.data(), 1e-5f,
                     {x.data(), rows, n, 2 * n, DType::kF32}, matrix(sum, rows, n), nullptr);
  CHECK(difference(sum.floats(), Floats(expected.begin(), expected.begin() + rows * n)) < kBudget);
  const int32_t tokens[] = {4, 0};
  Tensor<float> out(2 * n);
  cuda::embedding(matrix(h, rows, n), tokens, 1.0f, matrix(out, 2, n), nullptr);
  CHECK((same_bits(out.data(), h.data() + 4 * n, n) && same_bits(out.data() + n, h.data(), n)));
}

TEST_CASE("qk norm is the cpus rms norm of each head") {
  const int64_t rows = 3, d = 12, heads = 4, kv_heads = 2, width = (heads + 2 * kv_heads) * d;
  ThreadPool pool(1);
  Tensor<float> qkv(normal(rows * width, 1)), q_weight(normal(d, 2)), k_weight(normal(d, 3));
  Floats expected = qkv.floats();
  for (int64_t row = 0; row < rows; ++row) {
    float* q = expected.data() + row * width;
    ops::rms_norm(heads, d, q, d, q_weight.data(), 1e-5f, q, d, pool);
    float* k = q + heads * d;
    ops::rms_norm(kv_heads, d, k, d, k_weight.data(), 1e-5f, k, d, pool);
  }
  cuda::qk_norm({heads, kv_heads, d, 0, 1.0f}, matrix(qkv, rows, width), q_weight.data(),
                k_weight.data(), 1e-5f, nullptr);
  CHECK(difference(qkv.floats(), expected) < kBudget);
}

// Queries of zero attend to all keys alike: the output is the mean of the values, head by head.
TEST_CASE("decode attention reads every value once") {
  const int64_t heads = 4, kv_heads = 2, d = 8, width = (heads + 2 * kv_heads) * d, count = 1030;
  const int64_t blocks = (count + 15) / 16;
  const cuda::AttentionShape shape{heads, kv_heads, d, 0, 1.0f};
  Tensor<float> pool(static_cast<size_t>(blocks * kv_heads * 2 * 16 * d));
  const cuda::PagedKv kv{pool.data(), kv_heads * 2 * 16 * d, 2 * 16 * d, 16 * d};
  Tensor<float> tokens(normal(static_cast<size_t>(count * width), 1));
  const Floats before = tokens.floats();
  std::vector<int32_t> positions, to, table;
  for (int64_t b = 0; b < blocks; ++b) table.push_back(static_cast<int32_t>(blocks - 1 - b));
  for (int32_t p = 0; p < count; ++p) {
    positions.push_back(p);
    to.push_back(table[static_cast<size_t>(p / 16)]);
  }
  const Floats cos(static_cast<size_t>(count * 2), 1.0f), sin(cos.size(), 0.0f);
  cuda::rope_kv_write(shape, matrix(tokens, count, width), 4, cos.data(), sin.data(),
                      positions.data(), to.data(), kv, nullptr);
  Tensor<float> qkv(Floats(2 * width, 0.0f)), out(2 * heads * d);
  const int32_t at[] = {1029, 3};
  std::vector<int32_t> tables = table;
  tables.insert(tables.end(), table.begin(), table.end());
  Tensor<float> workspace(
      static_cast<size_t>(cuda::attention_decode_bytes(shape, 2, 16 * blocks) / 4));
  cuda::attention_decode(shape, matrix(qkv, 2, width), at, tables.data(), blocks, 16 * blocks, kv,
                         workspace.data(), matrix(out, 2, heads * d), nullptr);
  Doubles expected;
  for (const int32_t last : at) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < d; ++i) {
        double sum = 0;
        for (int64_t p = 0; p <= last; ++p) {
          sum += before[static_cast<size_t>(p * width + (heads + kv_heads + head / 2) * d + i)];
        }
        expected.push_back(sum / (last + 1));
      }
    }
  }
  CHECK(relative_error(out.floats(), expected) < 5e-6);
}
