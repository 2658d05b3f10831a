// The products of sm_90 (set_products) as callers of csrc/cuda/ops.h see them, run
// on the CPU with barriers, TMA and wgmma emulated (host_hopper.h): against float64, and to the bit
// where rows, tiles or schedules differ. Three multiprocessors, so that a block takes several
// tiles.

#include <cmath>
#include <cstdlib>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/core/rng.h"
#include "cuda/bodies/vocabulary.h"
#include "cuda/ops.h"
#include "cuda/products.h"
#include "host_hopper.h"
#include "numbers.h"

using namespace alignpro;
using namespace alignpro::cuda;

namespace {

const bool kChosen = (set_products(Products::kWgmma), true);

using Half = Tensor<Bfloat16>;
// Sums of a few hundred products of bfloat16, rounded to bfloat16 at the end.
constexpr double kHalfBudget = 3e-3;

size_t at(int64_t i) { return static_cast<size_t>(i); }

Matrix matrix(Half& t, int64_t rows, int64_t cols, int64_t ld = 0, int64_t first = 0) {
  const int64_t width = ld == 0 ? cols : ld;
  return {t.data() + first * width, rows, cols, width, DType::kBF16};
}

// a b^T, times scale.
void add_product(const Floats& a, int64_t a_ld, const Floats& b, int64_t b_ld, int64_t rows,
                 int64_t cols, int64_t depth, double scale, Doubles& sums) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < cols; ++n) {
      for (int64_t k = 0; k < depth; ++k) {
        sums[at(m * cols + n)] += scale * a[at(m * a_ld + k)] * b[at(n * b_ld + k)];
      }
    }
  }
}

struct Layer {
  int64_t rows, cols, depth, rank;
  Half x, weight, lora_x, lora_up, bias, residual;

  Layer(int64_t m, int64_t n, int64_t k, int64_t r)
      : rows(m),
        cols(n),
        depth(k),
        rank(r),
        x(normal(at(m * (k + 8)), 1)),
        weight(normal(at(n * (k + 16)), 2)),
        lora_x(normal(at(m * r), 3)),
        lora_up(normal(at(n * r), 4)),
        bias(normal(at(n), 5)),
        residual(normal(at(m * n), 6)) {}

  // Rows [first, first + count).
  Floats run(int64_t first, int64_t count, bool with_extras) {
    Half out(at(count * cols));
    LinearExtras extras;
    if (with_extras) {
      extras.bias = bias.data();
      extras.residual = matrix(residual, count, cols, 0, first);
      extras.lora_x = matrix(lora_x, count, rank, 0, first);
      extras.lora_up = matrix(lora_up, cols, rank);
      extras.lora_scale = 0.75f;
    }
    linear(matrix(x, count, depth, depth + 8, first), matrix(weight, cols, depth, depth + 16),
           extras, matrix(out, count, cols), nullptr);
    return out.floats();
  }
  Doubles expected(bool with_extras) {
    Doubles sums(at(rows * cols), 0.0);
    add_product(x.floats(), depth + 8, weight.floats(), depth + 16, rows, cols, depth, 1.0, sums);
    if (!with_extras) return sums;
    add_product(lora_x.floats(), rank, lora_up.floats(), rank, rows, cols, rank, 0.75, sums);
    const Floats b = bias.floats(), beside = residual.floats();
    for (int64_t i = 0; i < rows * cols; ++i) sums[at(i)] += b[at(i % cols)] + beside[at(i)];
    return sums;
  }
};

void check_layer(int64_t rows, int64_t cols, int64_t depth, int64_t rank) {
  Layer layer(rows, cols, depth, rank);
  for (const bool with_extras : {false, true}) {
    const Floats out = layer.run(0, rows, with_extras);
    CHECK(relative_error(out, layer.expected(with_extras)) < kHalfBudget);
    for (const int64_t few : {int64_t{1}, int64_t{13}, int64_t{64}}) {
      if (few >= rows) continue;
      const Floats last = layer.run(rows - few, few, with_extras);
      CHECK(same_bits(last.data(), out.data() + (rows - few) * cols, last.size()));
    }
  }
}

struct Scored {
  Floats logprob, entropy, kl, reverse_kl, ref_logprob;
  Doubles lse, ref_lse;
};

enum class Ref { kNone, kShared, kApart };  // of the reference's weight

struct Vocabularies {
  int64_t rows, vocab, cols;
  Half hidden, ref, weight, same_weight;
  std::vector<int32_t> tokens;

  Vocabularies(int64_t m, int64_t n, int64_t k)
      : rows(m),
        vocab(n),
        cols(k),
        hidden(normal(at(m * k), 11)),
        ref(normal(at(m * k), 12, 1.2f)),
        weight(normal(at(n * k), 13, 0.4f)),
        same_weight(weight.floats()) {
    for (int64_t i = 0; i < m; ++i) tokens.push_back(static_cast<int32_t>((i * 37 + 5) % n));
  }

  Scored score(int64_t first, int64_t count, float temperature, Ref reference) {
    Scored s;
    for (Floats* f : {&s.logprob, &s.entropy, &s.kl, &s.reverse_kl, &s.ref_logprob}) {
      f->assign(at(count), NAN);
    }
    s.lse = s.ref_lse = Doubles(at(count), NAN);
    LogprobInput in;
    in.hidden = matrix(hidden, count, cols, 0, first);
    in.weight = matrix(weight, vocab, cols);
    in.tokens = tokens.data() + first;
    in.temperature = temperature;
    if (reference != Ref::kNone) {
      in.ref_hidden = matrix(ref, count, cols, 0, first);
      in.ref_weight = matrix(reference == Ref::kShared ? weight : same_weight, vocab, cols);
    }
    Tensor<float> workspace(at(linear_logprob_bytes(in) / 4));
    linear_logprob(in,
                   {s.logprob.data(), s.entropy.data(), s.kl.data(), s.reverse_kl.data(),
                    s.ref_logprob.data(), s.lse.data(), s.ref_lse.data()},
                   workspace.data(), nullptr);
    return s;
  }

  Doubles log_softmax(Half& h, float temperature) {
    Doubles z(at(rows * vocab), 0.0);
    add_product(h.floats(), cols, weight.floats(), cols, rows, vocab, cols, 1.0 / temperature, z);
    for (int64_t m = 0; m < rows; ++m) {
      double sum = 0.0;
      for (int64_t t = 0; t < vocab; ++t) sum += std::exp(z[at(m * vocab + t)]);
      for (int64_t t = 0; t < vocab; ++t) z[at(m * vocab + t)] -= std::log(sum);
    }
    return z;
  }
};

void check_scores(int64_t rows, int64_t vocab, int64_t cols) {
  const float temperature = 0.8f;
  Vocabularies v(rows, vocab, cols);
  const Scored s = v.score(0, rows, temperature, Ref::kShared);
  if (vocab == 1) {
    CHECK((s.logprob[0] == 0.0f && s.entropy[0] == 0.0f && s.kl[0] == 0.0f));
    return;
  }
  const Doubles p = v.log_softmax(v.hidden, temperature), q = v.log_softmax(v.ref, temperature);
  Doubles logprob, ref_logprob, entropy, kl, reverse;
  for (int64_t m = 0; m < rows; ++m) {
    double h = 0, forth = 0, back = 0;
    for (int64_t i = m * vocab; i < (m + 1) * vocab; ++i) {
      h -= std::exp(p[at(i)]) * p[at(i)];
      forth += std::exp(p[at(i)]) * (p[at(i)] - q[at(i)]);
      back += std::exp(q[at(i)]) * (q[at(i)] - p[at(i)]);
    }
    logprob.push_back(p[at(m * vocab + v.tokens[at(m)])]);
    ref_logprob.push_back(q[at(m * vocab + v.tokens[at(m)])]);
    entropy.push_back(h);
    kl.push_back(forth);
    reverse.push_back(back);
  }
  CHECK(relative_error(s.logprob, logprob) < kBudget);
  CHECK(relative_error(s.ref_logprob, ref_logprob) < kBudget);
  CHECK(relative_error(s.entropy, entropy) < kBudget);
  CHECK(relative_error(s.kl, kl) < 10 * kBudget);  // a difference of larger numbers
  CHECK(relative_error(s.reverse_kl, reverse) < 10 * kBudget);
  // The reference's weight beside, or no reference, and fewer rows: the same bits.
  const int64_t few = rows < 7 ? 1 : 7;
  for (const Ref reference : {Ref::kShared, Ref::kApart, Ref::kNone}) {
    for (const int64_t count : {rows, few}) {
      const Scored last = v.score(rows - count, count, temperature, reference);
      const auto same = [&](const Floats& a, const Floats& b) {
        return same_bits(a.data(), b.data() + rows - count, at(count));
      };
      CHECK((same(last.logprob, s.logprob) && same(last.entropy, s.entropy)));
      if (reference == Ref::kNone) continue;
      CHECK((same(last.kl, s.kl) && same(last.reverse_kl, s.reverse_kl)));
      CHECK(same(last.ref_logprob, s.ref_logprob));
    }
  }
}

}  // namespace

TEST_CASE("products are those chosen") { CHECK((kChosen && products() == Products::kWgmma)); }

// The emulation itself, against what the PTX ISA says: chunk c of row r lies at chunk c ^ (r % 8),
// outside is zero, a step of 16 is 32 bytes on, and a lane's sums are those of its documented rows
// and columns.
TEST_CASE("boxes and products lie as documented") {
  const int64_t rows = 61, depth = 40;  // of 64 x 64
  Half a(normal(at(rows * depth), 1)), b(normal(at(rows * depth), 2));
  const Floats left = a.floats(), right = b.floats();
  const auto value = [&](const Floats& from, int64_t r, int64_t k) {
    return r < rows && k < depth ? from[at(r * depth + k)] : 0.0f;
  };
  using Tile = WgmmaTile<1, 64, 1>;
  std::memset(dynamic_shared(), 0xff, kHopperSharedBytes);
  const TensorMap map_a = tensor_map("test", {a.data(), depth, rows, depth}, 64);
  const TensorMap map_b = tensor_map("test", {b.data(), depth, rows, depth}, 64);
  HostBlock::run(Tile::kThreads, 5, [&](HostBlock&) {
    HopperBlock block;
    Ring<Tile> ring = make_ring<Tile>(block, dynamic_shared());
    const WgmmaShare<Tile> share(block.thread());
    if (share.copies) copy_operands(block, ring, 0, 0, depth, 64, map_b, map_a);
    if (share.produces) return;
    block.wait_phase(ring.full(), 0);
    if (block.thread() == 0) {
      bool same = block.shared_address(ring.a()) % 1024 == 0;
      for (int r = 0; r < 64; ++r) {
        for (int k = 0; k < 64; ++k) {
          const int to = r * 128 + ((k / 8) ^ (r % 8)) * 16 + k % 8 * 2;
          Bfloat16 there;
          std::memcpy(&there, ring.a() + to, sizeof there);
          same = same && to_float(there) == value(left, r, k);
        }
      }
      CHECK(same);
    }
    Tile::Sums sums;
    clear(sums);
    multiply_operands(block, ring, depth, sums);
    double worst = 0.0;
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int lane = block.thread() % 32, warp = block.thread() / 32;
        const int r = 16 * warp + 8 * (i / 2) + lane / 4, c = 8 * j + 2 * (lane % 4) + i % 2;
        double sum = 0.0;
        for (int k = 0; k < depth; ++k) sum += double{value(left, r, k)} * value(right, c, k);
        worst = std::max(worst, std::abs(sum - sums[j][i]));
      }
    }
    CHECK(worst < 1e-5);
  });
}

TEST_CASE("a phase that never ends is reported") {
  const auto wait = [](int arrivals, bool copied) {
    HostBlock::run(32, 1, [&](HostBlock& host) {
      HopperBlock block;
      auto* barrier = reinterpret_cast<uint64_t*>(dynamic_shared());
      if (host.thread() == 0) block.init_barrier(barrier, arrivals);
      host.sync();
      if (host.thread() == 1) block.expect(barrier, copied ? 0 : 16);
      block.wait_phase(barrier, 0);
    });
  };
  wait(1, true);
  CHECK_THROWS_WITH_AS((void)(wait(2, true)), doctest::Contains("a barrier was not reached"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS((void)(wait(1, false)), doctest::Contains("a barrier was not reached"),
                       std::runtime_error);
}

TEST_CASE("linear matches double and few rows the bits of many") {
  check_layer(131, 328, 264, 16);  // two waves, ragged in all three, more slices than stages
  check_layer(65, 8, 8, 8);
  check_layer(3, 200, 904, 72);  // few rows: fifteen slices and two in twelve stages
}

TEST_CASE("more tiles of rows than go beside each other") {
  const int64_t rows = 16 * 128 + 1;
  Layer layer(rows, 264, 8, 8);
  CHECK(relative_error(layer.run(0, rows, true), layer.expected(true)) < kHalfBudget);
}

TEST_CASE("an adapter of zeros changes no bit") {
  Layer layer(70, 72, 136, 16);
  const Floats plain = layer.run(0, 70, false);
  layer.lora_up = Half(Floats(72 * 16, 0.0f));
  layer.bias = Half(Floats(72, 0.0f));
  layer.residual = Half(Floats(70 * 72, 0.0f));
  const Floats adapted = layer.run(0, 70, true);
  CHECK(same_bits(plain.data(), adapted.data(), plain.size()));
}

TEST_CASE("linear logprob matches double") {
  check_scores(5, 300, 200);
  check_scores(70, 530, 72);
  check_scores(1, 1, 8);
}

TEST_CASE("a divergence from oneself is zero to the bit") {
  Vocabularies v(66, 200, 72);
  v.ref = v.hidden;
  const Scored s = v.score(0, 66, 1.0f, Ref::kShared);
  for (const float kl : s.kl) CHECK_EQ(kl, 0.0f);
  for (const float kl : s.reverse_kl) CHECK_EQ(kl, 0.0f);
}

TEST_CASE("a row without a softmax is nan alone") {
  Vocabularies v(3, 140, 8);
  v.hidden.data()[8] = stored<Bfloat16>(NAN);
  v.tokens[2] = 140;
  const Scored s = v.score(0, 3, 1.0f, Ref::kShared);
  CHECK((std::isfinite(s.logprob[0]) && std::isfinite(s.kl[0])));
  CHECK((std::isnan(s.logprob[1]) && std::isnan(s.entropy[1]) && std::isnan(s.kl[1])));
  CHECK((std::isnan(s.logprob[2]) && std::isfinite(s.entropy[2])));
}

TEST_CASE("what is sampled is what is scored") {
  const float temperature = 0.7f;
  const int64_t all = 130;
  Vocabularies v(all, 300, 72);
  std::vector<SampleRow> draws;
  for (uint32_t i = 0; i < all; ++i) {
    draws.push_back({{i % 7 == 3 ? 0.0f : temperature}, keyed_uniform(9, i % 3, i)});
  }
  const auto draw = [&](int64_t first, int64_t count, bool truncated, std::vector<int32_t>& tokens,
                        Floats& logprobs) {
    std::vector<SampleRow> own(draws.begin() + first, draws.begin() + first + count);
    for (size_t i = 0; truncated && i < own.size(); i += 2) own[i].top_k = 4;
    tokens.assign(at(count), -7);
    logprobs.assign(at(count), NAN);
    Floats kept(at(count), NAN);
    const Truncation truncation{nullptr, kept.data()};
    Tensor<float> workspace(at(head_sample_bytes(count, v.vocab, truncated) / 4));
    head_sample(matrix(v.hidden, count, v.cols, 0, first), matrix(v.weight, v.vocab, v.cols),
                own.data(), tokens.data(), logprobs.data(), workspace.data(), nullptr,
                truncated ? &truncation : nullptr);
    for (size_t i = 0; truncated && i < own.size(); ++i) {
      CHECK((i % 2 == 0 && own[i].temperature > 0.0f ? kept[i] < 1.0f : kept[i] == 1.0f));
    }
  };
  for (const bool truncated : {false, true}) {
    Floats logprobs, alone;
    std::vector<int32_t> one;
    const int64_t rows = truncated ? all : 70;  // truncated ones go by 128
    draw(0, rows, truncated, v.tokens, logprobs);
    const Scored s = v.score(0, rows, temperature, Ref::kShared);
    const Scored greedy = v.score(0, rows, 1.0f, Ref::kNone);
    for (int64_t i = 0; i < rows; ++i) {
      const Scored& own = draws[at(i)].temperature == 0.0f ? greedy : s;
      CHECK((v.tokens[at(i)] >= 0 && same_bits(&own.logprob[at(i)], &logprobs[at(i)], 1)));
    }
    draw(32, 5, truncated, one, alone);
    CHECK(std::equal(one.begin(), one.end(), v.tokens.begin() + 32));
    CHECK(same_bits(alone.data(), logprobs.data() + 32, 5));
  }
}
