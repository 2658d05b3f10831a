// Bodies of csrc/cuda that multiply matrices (tile product, linear_logprob and its gradient,
// head_sample), run on the CPU by a block of fibers: tensor-core fragments, asynchronous
// copies and reduction trees as the device has them, against float64. Outputs are poisoned,
// schedules random.

#include <algorithm>
#include <cmath>
#include <random>
#include <tuple>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/rng.h"
#include "cuda/bodies/vocabulary.h"
#include "host_block.h"
#include "numbers.h"

using namespace alignpro;
using namespace alignpro::cuda;

namespace {

// Shared memory of a product, poisoned, and something behind it for masses.
template <typename T>
struct SharedMemory {
  SharedMemory() : packs((kProductBytes<T> + 4096) / 16) {
    std::memset(packs.data(), 0xff, packs.size() * 16);
  }
  void* data() { return packs.data(); }
  double* masses() {
    return reinterpret_cast<double*>(reinterpret_cast<char*>(packs.data()) + kProductBytes<T>);
  }
  std::vector<Pack<uint32_t>> packs;
};

uint32_t next_seed() {
  static uint32_t seed = 0;
  return ++seed;
}

template <typename T, bool kA, bool kB>
void check_product(int64_t rows, int64_t cols, int64_t depth, bool accumulate) {
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  const int64_t a_ld = (kA ? rows : depth) + 8, b_ld = (kB ? cols : depth) + 16;
  Tensor<T> a(normal(at((kA ? depth : rows) * a_ld), 1)),
      b(normal(at((kB ? depth : cols) * b_ld), 2));
  const Floats as = a.floats(), bs = b.floats();
  Floats out(at(rows * cols), accumulate ? 1.0f : NAN);
  const Operand<T, kA> left{a.data(), a_ld, rows, depth};
  const Operand<T, kB> right{b.data(), b_ld, cols, depth};
  for (int64_t m = 0; m < rows; m += kTile) {
    for (int64_t n = 0; n < cols; n += kTile) {
      SharedMemory<T> shared;
      HostBlock::run(kTileThreads, next_seed(), [&](HostBlock& block) {
        store_product_tile(block, left, m, right, n, rows, cols, out.data(), cols, accumulate,
                           shared.data());
      });
    }
  }
  Doubles expected;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < cols; ++n) {
      double sum = accumulate ? 1.0 : 0.0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += double{as[at(kA ? k * a_ld + m : m * a_ld + k)]} *
               bs[at(kB ? k * b_ld + n : n * b_ld + k)];
      }
      expected.push_back(sum);
    }
  }
  CHECK(relative_error(out, expected) < kBudget);
}

template <typename T>
struct Problem {
  int64_t rows, vocab, cols;
  Tensor<T> hidden, ref, weight;
  std::vector<int32_t> tokens;
  Vocabulary<T> v;
  std::vector<ops::TileStats> stats;
  Floats logit, ref_logit, logprob, entropy, kl, reverse_kl, ref_logprob;
  Doubles lse, ref_lse;

  Problem(int64_t r, int64_t n, int64_t c, float temperature, float offset = 0.0f)
      : rows(r),
        vocab(n),
        cols(c),
        hidden(make(r * c, 31, 1.0f, offset, c)),
        ref(make(r * c, 31, 1.2f, offset, c)),
        weight(make(n * c, 33, 0.4f, offset == 0.0f ? 0.0f : 1.0f, c)) {
    for (int64_t m = 0; m < rows; ++m) tokens.push_back(static_cast<int32_t>((m * 37 + 5) % vocab));
    v = {{hidden.data(), cols, rows, cols},
         {weight.data(), cols, vocab, cols},
         {ref.data(), cols, rows, cols},
         {weight.data(), cols, vocab, cols},
         1.0f / temperature,
         tokens.data()};
    const auto count = static_cast<size_t>(rows);
    stats.resize(count * static_cast<size_t>(vocabulary_tiles(vocab)));
    std::memset(stats.data(), 0xff, stats.size() * sizeof stats[0]);
    for (Floats* f : {&logit, &ref_logit, &logprob, &entropy, &kl, &reverse_kl, &ref_logprob}) {
      f->assign(count, NAN);
    }
    lse = ref_lse = Doubles(count, NAN);
  }
  // A nonzero `first` in every row's first column.
  static Floats make(int64_t count, uint32_t seed, float scale, float first, int64_t cols) {
    Floats values = normal(static_cast<size_t>(count), seed, scale);
    for (int64_t i = 0; first != 0.0f && i < count; i += cols)
      values[static_cast<size_t>(i)] = first;
    return values;
  }
  LogprobOutput out() {
    return {logprob.data(),     entropy.data(), kl.data(),     reverse_kl.data(),
            ref_logprob.data(), lse.data(),     ref_lse.data()};
  }
  const ops::TileStats* row_stats(int64_t row) const {
    return stats.data() + row * vocabulary_tiles(vocab);
  }
  template <bool kRef>
  void measure(const SampleRow* draws = nullptr) {
    for (int64_t m = 0; m < rows; m += kTile) {
      for (int64_t tile = 0; tile < vocabulary_tiles(vocab); ++tile) {
        SharedMemory<T> shared;
        HostBlock::run(kTileThreads, next_seed(), [&](HostBlock& block) {
          tile_stats<kRef>(block, v, draws, m, tile, 0, stats.data(), logit.data(),
                           ref_logit.data(), nullptr, shared.data());
        });
      }
    }
  }
  template <bool kRef>
  void forward() {
    measure<kRef>();
    for (int64_t row = 0; row < rows; ++row) {
      RowShared shared;
      HostBlock::run(kRowThreads, next_seed(), [&](HostBlock& block) {
        finish_logprob_row(block, row, row_stats(row), vocab, tokens.data(), logit.data(),
                           ref_logit.data(), kRef, out(), shared);
      });
    }
  }
  // Log softmax of every row in float64.
  Doubles log_softmax(const Floats& h, float temperature) {
    const Floats w = weight.floats();
    Doubles z;
    for (int64_t m = 0; m < rows; ++m) {
      double top = -INFINITY, sum = 0;
      for (int64_t t = 0; t < vocab; ++t) {
        double dot = 0;
        for (int64_t k = 0; k < cols; ++k) {
          dot +=
              double{h[static_cast<size_t>(m * cols + k)]} * w[static_cast<size_t>(t * cols + k)];
        }
        z.push_back(dot / temperature);
        top = std::max(top, z.back());
      }
      double* row = z.data() + m * vocab;
      for (int64_t t = 0; t < vocab; ++t) sum += std::exp(row[t] - top);
      for (int64_t t = 0; t < vocab; ++t) row[t] -= top + std::log(sum);
    }
    return z;
  }
};

template <typename T>
void check_forward(int64_t rows, int64_t vocab, int64_t cols, float temperature, float offset,
                   double budget) {
  Problem<T> p(rows, vocab, cols, temperature, offset);
  p.template forward<true>();
  const Doubles logp = p.log_softmax(p.hidden.floats(), temperature);
  const Doubles logq = p.log_softmax(p.ref.floats(), temperature);
  Doubles lp, lq, entropy, kl, reverse;
  for (int64_t m = 0; m < rows; ++m) {
    double h = 0, forth = 0, back = 0;
    for (int64_t t = 0; t < vocab; ++t) {
      const auto at = static_cast<size_t>(m * vocab + t);
      h -= std::exp(logp[at]) * logp[at];
      forth += std::exp(logp[at]) * (logp[at] - logq[at]);
      back += std::exp(logq[at]) * (logq[at] - logp[at]);
    }
    const auto at = static_cast<size_t>(m * vocab + p.tokens[static_cast<size_t>(m)]);
    lp.push_back(logp[at]);
    lq.push_back(logq[at]);
    entropy.push_back(h);
    kl.push_back(forth);
    reverse.push_back(back);
  }
  if (vocab == 1) {
    CHECK((p.logprob[0] == 0.0f && p.entropy[0] == 0.0f && p.kl[0] == 0.0f));
    return;
  }
  CHECK(relative_error(p.logprob, lp) < budget);
  CHECK(relative_error(p.ref_logprob, lq) < budget);
  CHECK(relative_error(p.entropy, entropy) < budget);
  CHECK(relative_error(p.kl, kl) < 10 * budget);  // a difference of larger numbers
  CHECK(relative_error(p.reverse_kl, reverse) < 10 * budget);
  // Without a reference the same, to the bit.
  Problem<T> alone(rows, vocab, cols, temperature, offset);
  alone.template forward<false>();
  CHECK(same_bits(alone.logprob.data(), p.logprob.data(), p.logprob.size()));
  CHECK(same_bits(alone.entropy.data(), p.entropy.data(), p.entropy.size()));
}

template <typename T>
void check_backward(double budget) {
  const int64_t rows = 133, vocab = 261, cols = 40, width = 384;
  const float temperature = 0.8f;
  Problem<T> p(rows, vocab, cols, temperature);
  p.template forward<true>();
  const Floats u[4] = {normal(rows, 1), normal(rows, 2), normal(rows, 3), normal(rows, 4)};
  const LogprobUpstream upstream{u[0].data(), u[1].data(), u[2].data(), u[3].data()};
  std::vector<ops::RowGradient> gradients;
  for (int64_t m = 0; m < rows; ++m) {
    gradients.push_back(row_gradient(m, true, p.tokens.data(), p.out(), upstream));
  }
  Tensor<T> dz(static_cast<size_t>(rows * width));
  for (int64_t m = 0; m < rows; m += kTile) {
    for (int64_t tile = 0; tile < 3; ++tile) {
      SharedMemory<T> shared;
      HostBlock::run(kTileThreads, next_seed(), [&](HostBlock& block) {
        tile_gradient<true>(block, p.v, gradients.data(), m, tile, 0, dz.data(), width,
                            shared.data());
      });
    }
  }
  Floats d_hidden(static_cast<size_t>(rows * cols), NAN),
      d_weight(static_cast<size_t>(vocab * cols), NAN);
  const auto multiply = [&](auto a, auto b, int64_t out_rows, Floats& out) {
    for (int64_t m = 0; m < out_rows; m += kTile) {
      SharedMemory<T> shared;
      HostBlock::run(kTileThreads, next_seed(), [&](HostBlock& block) {
        store_product_tile(block, a, m, b, 0, out_rows, cols, out.data(), cols, false,
                           shared.data());
      });
    }
  };
  multiply(Operand<T>{dz.data(), width, rows, width},
           Operand<T, true>{p.weight.data(), cols, cols, vocab}, rows, d_hidden);
  multiply(Operand<T, true>{dz.data(), width, width, rows},
           Operand<T, true>{p.hidden.data(), cols, cols, rows}, vocab, d_weight);
  const Doubles logp = p.log_softmax(p.hidden.floats(), temperature);
  const Doubles logq = p.log_softmax(p.ref.floats(), temperature);
  const Floats h = p.hidden.floats(), w = p.weight.floats();
  Doubles to_hidden(d_hidden.size()), to_weight(d_weight.size());
  for (int64_t m = 0; m < rows; ++m) {
    const auto row = static_cast<size_t>(m);
    double entropy = 0, kl = 0;
    for (int64_t t = 0; t < vocab; ++t) {
      const auto at = static_cast<size_t>(m * vocab + t);
      entropy -= std::exp(logp[at]) * logp[at];
      kl += std::exp(logp[at]) * (logp[at] - logq[at]);
    }
    for (int64_t t = 0; t < vocab; ++t) {
      const auto at = static_cast<size_t>(m * vocab + t);
      const double prob = std::exp(logp[at]);
      const double d =
          (u[0][row] * ((t == p.tokens[row] ? 1.0 : 0.0) - prob) -
           u[1][row] * prob * (logp[at] + entropy) + u[2][row] * prob * (logp[at] - logq[at] - kl) +
           u[3][row] * (prob - std::exp(logq[at]))) /
          temperature;
      for (int64_t k = 0; k < cols; ++k) {
        to_hidden[static_cast<size_t>(m * cols + k)] += d * w[static_cast<size_t>(t * cols + k)];
        to_weight[static_cast<size_t>(t * cols + k)] += d * h[static_cast<size_t>(m * cols + k)];
      }
    }
  }
  CHECK(relative_error(d_hidden, to_hidden) < budget);
  CHECK(relative_error(d_weight, to_weight) < budget);
}

template <typename T>
void draw(Problem<T>& p, const std::vector<SampleRow>& draws, std::vector<int32_t>& tokens,
          Floats& logprobs) {
  p.template measure<false>(draws.data());
  tokens.assign(static_cast<size_t>(p.rows), -7);
  logprobs.assign(static_cast<size_t>(p.rows), NAN);
  for (int64_t row = 0; row < p.rows; ++row) {
    SharedMemory<T> shared;
    RowShared row_shared;
    HostBlock::run(kTileThreads, next_seed(), [&](HostBlock& block) {
      draw_row(block, row, p.v, draws[static_cast<size_t>(row)], p.row_stats(row), tokens.data(),
               logprobs.data(), shared.masses(), row_shared, shared.data());
    });
  }
}

}  // namespace

TEST_CASE("products match double whichever way operands lie") {
  check_product<float, false, false>(130, 72, 44, false);
  check_product<float, true, true>(136, 40, 33, true);
  check_product<float, false, true>(5, 136, 12, false);
  check_product<Bfloat16, false, false>(131, 70, 104, false);
  check_product<Bfloat16, true, true>(136, 72, 45, true);
  check_product<Bfloat16, false, true>(3, 136, 24, false);
}

TEST_CASE("forward matches double") {
  check_forward<float>(1, 1, 8, 1.0f, 0.0f, kBudget);
  check_forward<float>(3, 111, 48, 1.0f, 0.0f, kBudget);
  check_forward<float>(130, 300, 36, 0.7f, 0.0f, kBudget);
  check_forward<Bfloat16>(1, 1, 8, 1.0f, 0.0f, kBudget);
  check_forward<Bfloat16>(9, 300, 40, 1.3f, 0.0f, kBudget);
  // A common offset of 1e4: a logit keeps 1e-3 of float32, the differences no less.
  check_forward<float>(4, 200, 16, 1.0f, 1e4f, 1e-3);
}

TEST_CASE("a divergence from oneself is zero to the bit") {
  Problem<Bfloat16> p(5, 200, 24, 1.0f);
  p.v.ref_hidden = p.v.hidden;
  p.forward<true>();
  for (const float kl : p.kl) CHECK_EQ(kl, 0.0f);
  for (const float kl : p.reverse_kl) CHECK_EQ(kl, 0.0f);
}

TEST_CASE("a row without a softmax is nan alone") {
  Problem<float> p(3, 140, 8, 1.0f);
  p.hidden.data()[8] = NAN;
  p.forward<true>();
  CHECK((std::isnan(p.logprob[1]) && std::isnan(p.entropy[1]) && std::isnan(p.kl[1])));
  CHECK((std::isfinite(p.logprob[0]) && std::isfinite(p.logprob[2]) && std::isfinite(p.kl[2])));
}

TEST_CASE("a token outside the vocabulary has no log probability") {
  Problem<float> p(2, 140, 8, 1.0f);
  p.tokens[1] = 140;
  p.forward<true>();
  CHECK((std::isnan(p.logprob[1]) && std::isnan(p.ref_logprob[1]) && std::isfinite(p.entropy[1])));
  CHECK(std::isfinite(p.logprob[0]));
}

TEST_CASE("backward matches double") {
  check_backward<float>(2e-5);
  check_backward<Bfloat16>(4e-3);  // dz is stored in bfloat16
}

TEST_CASE("drawn and scored log probabilities are equal to the bit") {
  const auto check = [](auto type) {
    using T = decltype(type);
    const float temperature = 0.7f;
    Problem<T> p(18, 300, 40, 1.0f);
    std::vector<SampleRow> draws;
    for (uint32_t i = 0; i < 18; ++i) draws.push_back({{temperature}, keyed_uniform(9, i % 3, i)});
    std::vector<int32_t> tokens;
    Floats logprobs;
    draw(p, draws, tokens, logprobs);
    Problem<T> scored(18, 300, 40, temperature);
    std::copy(tokens.begin(), tokens.end(), scored.tokens.begin());
    scored.template forward<true>();
    CHECK(same_bits(scored.logprob.data(), logprobs.data(), logprobs.size()));
    // Alone, in another place of a tile, under another schedule: the same.
    Problem<T> one(1, 300, 40, 1.0f);
    one.v.hidden.data = p.v.hidden.data + 13 * 40;
    std::vector<int32_t> token;
    Floats logprob;
    draw(one, {draws[13]}, token, logprob);
    CHECK((token[0] == tokens[13] && same_bits(&logprob[0], &logprobs[13], 1)));
  };
  check(float{});
  check(Bfloat16{});
}

// Drawn and scored rows are merged by blocks of different sizes.
TEST_CASE("a row is merged in one tree by any block") {
  const int64_t tiles = 1000;
  const Floats logits = normal(tiles, 21, 3.0f);
  std::vector<ops::TileStats> stats;
  for (const float z : logits) {
    stats.push_back(ops::open_tile(z, 0.5f * z));
    ops::add_logit(z - 0.3f, 0.4f * z, &stats.back());
  }
  ops::RowStats merged[2];
  for (const int threads : {kRowThreads, kTileThreads}) {
    RowShared shared;
    HostBlock::run(threads, next_seed(), [&](HostBlock& block) {
      const ops::RowStats s = merge_row(block, stats.data(), tiles, shared);
      if (block.thread() == 0) merged[threads == kRowThreads ? 0 : 1] = s;
    });
  }
  CHECK_EQ(merged[0].lse, merged[1].lse);
  CHECK_EQ(merged[0].mean_z, merged[1].mean_z);
  CHECK_EQ(merged[0].ref_lse, merged[1].ref_lse);
}

TEST_CASE("draws invert the distribution in token order") {
  Problem<float> p(24, 300, 16, 1.0f);
  std::vector<SampleRow> draws;
  for (uint32_t i = 0; i < 24; ++i) draws.push_back({{1.0f}, keyed_uniform(3, 1, i)});
  std::vector<int32_t> tokens;
  Floats logprobs;
  draw(p, draws, tokens, logprobs);
  const Doubles logp = p.log_softmax(p.hidden.floats(), 1.0f);
  for (size_t row = 0; row < 24; ++row) {
    const double u = draws[row].uniform;
    double below = 0.0;
    for (int32_t t = 0; t < tokens[row]; ++t)
      below += std::exp(logp[row * 300 + static_cast<size_t>(t)]);
    const double above = below + std::exp(logp[row * 300 + static_cast<size_t>(tokens[row])]);
    CHECK((u > below - 1e-5 && u < above + 1e-5));
  }
}

TEST_CASE("greedy takes the lowest id on a tie") {
  Problem<float> p(2, 300, 8, 1.0f);
  for (int i = 0; i < 16; ++i) p.hidden.data()[i] = i % 8 == 0 ? 1.0f : 0.0f;
  for (int64_t t = 0; t < 300; ++t) p.weight.data()[t * 8] = t == 139 || t == 270 ? 5.0f : 1.0f;
  std::vector<int32_t> tokens;
  Floats logprobs;
  p.hidden.data()[8] = NAN;
  draw(p, {{{0.0f}, 0.3}, {{0.0f}, 0.3}}, tokens, logprobs);
  CHECK_EQ(tokens[0], 139);
  CHECK(std::abs(logprobs[0] - (5.0 - std::log(2 * std::exp(5.0) + 298 * std::exp(1.0)))) < 1e-5);
  CHECK((tokens[1] == -1 && std::isnan(logprobs[1])));
}

TEST_CASE("draws reach more tiles than threads") {
  const int64_t vocab = 300 * kTile - 5, cols = 8;
  Problem<float> p(1, vocab, cols, 1.0f);
  for (int64_t k = 0; k < cols; ++k) p.hidden.data()[k] = k == 0 ? 1.0f : 0.0f;
  // Two of the same maximum, a block's width of tiles apart: one thread sees both.
  for (const int64_t tile : {2, 2 + kTileThreads})
    p.weight.data()[(tile * kTile + 7) * cols] = 9.0f;
  for (int64_t tile = 0; tile < vocabulary_tiles(vocab); ++tile) {
    float max = -INFINITY;
    const int64_t end = std::min<int64_t>(vocab, (tile + 1) * kTile);
    const auto logit = [&](int64_t t) { return p.weight.data()[t * cols]; };
    for (int64_t t = tile * kTile; t < end; ++t) max = std::max(max, logit(t));
    ops::TileStats stats = ops::open_tile(max, -INFINITY);
    for (int64_t t = tile * kTile; t < end; ++t) ops::add_logit(logit(t), &stats);
    p.stats[static_cast<size_t>(tile)] = stats;
  }
  const Doubles logp = p.log_softmax(p.hidden.floats(), 1.0f);
  for (uint32_t position = 0; position < 12; ++position) {
    const SampleRow how{{position == 0 ? 0.0f : 1.0f}, keyed_uniform(5, 0, position)};
    int32_t token = -7;
    float logprob = NAN;
    SharedMemory<float> shared;
    RowShared row_shared;
    HostBlock::run(kTileThreads, next_seed(), [&](HostBlock& block) {
      draw_row(block, 0, p.v, how, p.row_stats(0), &token, &logprob, shared.masses(), row_shared,
               shared.data());
    });
    CHECK((token >= 0 && token < vocab));
    if (position == 0) {
      CHECK_EQ(token, 2 * kTile + 7);
      continue;
    }
    double below = 0.0;
    for (int32_t t = 0; t < token; ++t) below += std::exp(logp[static_cast<size_t>(t)]);
    const double mass = std::exp(logp[static_cast<size_t>(token)]);
    const double u = how.uniform;
    CHECK((u > below - 1e-5 && u < below + mass + 1e-5));
    CHECK(std::abs(logprob - std::log(mass)) < 1e-5);
  }
}
