// The arithmetic that host and device share (core/float_bits.h, ops/shared): against float64, and
// beside the vector kernels of every instruction set of this machine, whose scalar form it is.

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/cpu_isa.h"
#include "alignpro/core/float_bits.h"
#include "alignpro/core/rng.h"
#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/shared/activation.h"
#include "alignpro/ops/shared/attention_rows.h"
#include "alignpro/ops/shared/row_softmax.h"
#include "alignpro/ops/shared/sampling.h"
#include "numbers.h"

using namespace alignpro;
using namespace alignpro::ops;

namespace {

constexpr float kInf = INFINITY;

std::vector<const cpu::Kernels*> machine_kernels() {
  std::vector<const cpu::Kernels*> all;
  for (const CpuIsa isa : compiled_isas()) {
    if (machine_supports(isa)) all.push_back(&cpu::kernels_of(isa));
  }
  return all;
}

// Logits of one row and its reference, and what makes them awkward.
struct Case {
  const char* name;
  Floats z, r;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto noise = [](size_t count, uint32_t seed, float offset) {
    Floats z = normal(count, seed, 2.0f), r = normal(count, seed + 1, 0.3f);
    for (size_t i = 0; i < count; ++i) r[i] = (z[i] += offset) + r[i];
    return Case{"", z, r};
  };
  all.push_back(noise(1, 1, 0.0f));
  all.push_back(noise(111, 2, 0.0f));
  all.push_back(noise(256, 3, 1e4f));
  all.push_back(noise(1000, 4, -1e4f));
  Case hot{"one hot", Floats(300, 0.0f), Floats(300, 0.0f)};
  hot.z[17] = 90.0f;
  hot.r[18] = 90.0f;
  all.push_back(hot);
  Case holes = noise(300, 5, 0.0f);  // both -inf where either is: the divergence stays finite
  for (size_t i = 0; i < 300; i += 3) holes.z[i] = holes.r[i] = -kInf;
  std::fill(holes.z.begin() + 128, holes.z.begin() + 192, -kInf);
  std::fill(holes.r.begin() + 128, holes.r.begin() + 192, -kInf);
  all.push_back(holes);
  const char* names[] = {"one token", "111", "offset 1e4", "offset -1e4", "one hot", "-inf"};
  for (size_t i = 0; i < all.size(); ++i) all[i].name = names[i];
  return all;
}

// float64, in one pass over the whole row.
struct Truth {
  double lse, entropy, ref_lse, kl, reverse_kl;
};
Truth truth(const Case& c) {
  const auto lse_of = [](const Floats& x) {
    double top = -INFINITY, sum = 0;
    for (const float v : x) top = std::max(top, double{v});
    for (const float v : x) sum += std::exp(v - top);
    return top + std::log(sum);
  };
  Truth t{lse_of(c.z), 0, lse_of(c.r), 0, 0};
  for (size_t i = 0; i < c.z.size(); ++i) {
    const double logp = c.z[i] - t.lse, logq = c.r[i] - t.ref_lse;
    if (c.z[i] == -kInf) continue;
    t.entropy -= std::exp(logp) * logp;
    t.kl += std::exp(logp) * (logp - logq);
    t.reverse_kl += std::exp(logq) * (logq - logp);
  }
  return t;
}

TileStats stats_of(const Floats& z, const Floats& r, size_t begin, size_t end) {
  float max = -kInf, ref_max = -kInf;
  for (size_t i = begin; i < end; ++i) {
    max = larger(max, z[i]);
    ref_max = larger(ref_max, r[i]);
  }
  TileStats stats = open_tile(max, ref_max);
  for (size_t i = begin; i < end; ++i) add_logit(z[i], r[i], &stats);
  return stats;
}

bool near(double x, double y, double budget) {
  return std::abs(x - y) <= budget * std::max(1.0, std::abs(y));
}

// The tile of one row as the vector kernels take it, [panels][1][16] padded by -inf.
Floats padded(const Floats& z) {
  Floats tile = z;
  tile.resize((z.size() + 15) / 16 * 16, -kInf);
  return tile;
}

}  // namespace

TEST_CASE("bfloat16 rounds to the nearest") {
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const float value = to_float(Bfloat16{static_cast<uint16_t>(bits)});
    CHECK(round_bfloat16(value).bits == bits);
    CHECK(round_bfloat16(-value).bits == (bits | 0x8000u));
    const float middle = float_of(bits << 16 | 0x8000u);
    CHECK(round_bfloat16(middle).bits == (bits % 2 == 0 ? bits : bits + 1));
    CHECK(round_bfloat16(float_of(bits_of(middle) - 1)).bits == bits);
    CHECK(round_bfloat16(float_of(bits_of(middle) + 1)).bits == bits + 1);
  }
  CHECK(round_bfloat16(kInf).bits == 0x7f80);
  for (const uint32_t nan : {0x7fc00000u, 0x7f800001u, 0xffffffffu}) {
    CHECK(std::isnan(to_float(round_bfloat16(float_of(nan)))));
  }
}

TEST_CASE("statistics of any split are those of one pass") {
  std::mt19937 random(7);
  for (const Case& c : cases()) {
    const Truth t = truth(c);
    for (int split = 0; split < 20; ++split) {
      std::vector<TileStats> tiles;
      for (size_t begin = 0; begin < c.z.size();) {
        const size_t width = split == 0 ? c.z.size() : 1 + random() % (split == 1 ? 1 : 97);
        const size_t end = std::min(c.z.size(), begin + width);
        // A tile's columns may be summed apart, too.
        const size_t middle = begin + random() % (end - begin + 1);
        TileStats whole = stats_of(c.z, c.r, begin, end);
        TileStats left = open_tile(whole.max, whole.ref_max), right = left;
        for (size_t i = begin; i < end; ++i) {
          add_logit(c.z[i], c.r[i], i < middle ? &left : &right);
        }
        add_columns(right, &left);
        tiles.push_back(split % 2 == 0 ? whole : left);
        begin = end;
      }
      const RowStats merged = merge_tiles(tiles.data(), static_cast<int64_t>(tiles.size()));
      // The same in a tree, as a block of threads does it.
      std::vector<RowSums> sums(tiles.size());
      for (size_t i = 0; i < tiles.size(); ++i) {
        float ref_max = -kInf;
        for (const TileStats& tile : tiles) ref_max = larger(ref_max, tile.ref_max);
        add_tile(tiles[i], static_cast<float>(merged.max), ref_max, &sums[i]);
        if (i + 1 == tiles.size()) {
          for (size_t step = 1; step < sums.size(); step *= 2) {
            for (size_t k = 0; k + step < sums.size(); k += 2 * step) {
              add_sums(sums[k + step], &sums[k]);
            }
          }
          CHECK(near(finish_row(sums[0], static_cast<float>(merged.max), ref_max).lse, t.lse,
                     1e-9 + kBudget));
        }
      }
      CHECK(merged.valid());
      const RowValues values = row_values(merged, c.z[0], c.r[0]);
      const bool offset = std::abs(c.z[0]) > 1e3f && std::isfinite(c.z[0]);
      // Of logits near 1e4 a float32 itself keeps 5e-4; what is exact is their difference.
      CHECK(near(merged.lse, t.lse, kBudget));
      CHECK(near(values.entropy, t.entropy, offset ? 1e-5 : kBudget));
      CHECK(near(values.kl, t.kl, 1e-5));
      CHECK(near(values.reverse_kl, t.reverse_kl, 1e-5));
      if (std::isfinite(c.z[0])) CHECK(near(values.logprob, c.z[0] - t.lse, 1e-5));
    }
  }
}

TEST_CASE("rows without a softmax are invalid") {
  for (const float bad : {-kInf, kInf, static_cast<float>(NAN)}) {
    Floats z(40, -kInf), r(40, 0.0f);
    z[11] = bad;
    std::vector<TileStats> tiles = {stats_of(z, r, 0, 16), stats_of(z, r, 16, 40)};
    CHECK(!merge_tiles(tiles.data(), 2).valid());
  }
}

TEST_CASE("vector kernels compute the shared statistics") {
  for (const cpu::Kernels* k : machine_kernels()) {
    for (const Case& c : cases()) {
      const Floats z = padded(c.z), r = padded(c.r);
      const auto panels = static_cast<int64_t>(z.size() / 16);
      TileStats vector;
      k->tile_stats_row(z.data(), r.data(), 1, 0, panels, &vector);
      const TileStats scalar = stats_of(z, r, 0, z.size());
      CHECK_EQ(vector.max, scalar.max);
      CHECK_EQ(vector.ref_max, scalar.ref_max);
      CHECK(near(vector.sum, scalar.sum, 1e-5));
      CHECK(near(vector.sum_z, scalar.sum_z, 1e-5));
      CHECK(near(vector.ref_sum, scalar.ref_sum, 1e-5));
      CHECK(near(vector.sum_cross, scalar.sum_cross, 1e-5));
      CHECK(near(vector.ref_cross, scalar.ref_cross, 1e-5));
    }
  }
}

TEST_CASE("vector kernels compute the shared gradient") {
  for (const cpu::Kernels* k : machine_kernels()) {
    for (const Case& c : cases()) {
      const Truth t = truth(c);
      for (const bool with_ref : {false, true}) {
        RowGradient g = {};
        split_lse(t.lse, &g.lse, &g.lse_low);
        split_lse(t.ref_lse, &g.ref_lse, &g.ref_lse_low);
        g.entropy = static_cast<float>(t.entropy);
        g.kl = static_cast<float>(t.kl);
        g.mass_above = 0.3f;
        g.d_logprob = 0.7f;
        g.d_entropy = -0.4f;
        g.d_kl = 1.1f;
        g.d_reverse_kl = with_ref ? -0.6f : 0.0f;
        g.d_total_variation = with_ref ? 0.5f : 0.0f;
        g.token = -1;
        Floats z = padded(c.z);
        const Floats r = padded(c.r), before = z;
        k->tile_gradient_row(z.data(), with_ref ? r.data() : nullptr, 1, 0,
                             static_cast<int64_t>(z.size() / 16), 0, &g, 1.0f);
        for (size_t i = 0; i < z.size(); ++i) {
          const float scalar = logit_gradient(g, with_ref, before[i], r[i]);
          CHECK(std::abs(z[i] - scalar) <= 2e-5f * std::max(1.0f, std::abs(scalar)));
        }
      }
    }
  }
}

TEST_CASE("vector kernels compute the shared variation") {
  const Floats z = normal(256, 1, 3.0f), r = normal(256, 2, 3.0f);
  RowGradient g = {};
  split_lse(7.5, &g.lse, &g.lse_low);
  split_lse(7.25, &g.ref_lse, &g.ref_lse_low);
  float variation = 0.0f, mass = 0.0f;
  for (size_t i = 0; i < z.size(); ++i) add_variation(g, z[i], r[i], &variation, &mass);
  CHECK((variation > 0.1f && mass > variation));
  for (const cpu::Kernels* k : machine_kernels()) {
    float by_vectors = NAN, mass_by_vectors = NAN;
    k->tile_variation_row(z.data(), r.data(), 1, 0, 16, &g, &by_vectors, &mass_by_vectors);
    CHECK((near(by_vectors, variation, 1e-5f) && near(mass_by_vectors, mass, 1e-5f)));
  }
}

TEST_CASE("vector kernels compute the shared activations") {
  const Floats gate = normal(37, 1, 4.0f), up = normal(37, 2);
  const Floats cos = normal(18, 3), sin = normal(18, 4);
  for (const cpu::Kernels* k : machine_kernels()) {
    Floats h(37), turned = gate;
    k->swiglu_row(gate.data(), up.data(), 37, h.data());
    k->rope_row(turned.data(), cos.data(), sin.data(), 18);
    for (size_t i = 0; i < 37; ++i) CHECK(near(h[i], silu(gate[i]) * up[i], kBudget));
    Floats d_gate(37), d_up(37);
    const auto gradients_are = [&](const auto& gradient) {
      for (size_t i = 0; i < 37; ++i) {
        float to_gate = NAN, to_up = NAN;
        gradient(gate[i], up[i], h[i], &to_gate, &to_up);
        CHECK((near(d_gate[i], to_gate, 4 * kBudget) && near(d_up[i], to_up, kBudget)));
      }
    };
    k->swiglu_backward_row(gate.data(), up.data(), h.data(), 37, d_gate.data(), d_up.data());
    gradients_are(silu_gradient);
    k->geglu_row(gate.data(), up.data(), 37, h.data());
    for (size_t i = 0; i < 37; ++i) CHECK(near(h[i], gelu(gate[i]) * up[i], kBudget));
    k->geglu_backward_row(gate.data(), up.data(), h.data(), 37, d_gate.data(), d_up.data());
    gradients_are(gelu_gradient);
    for (size_t i = 0; i < 18; ++i) {
      float a = gate[i], b = gate[i + 18];
      rotate(cos[i], sin[i], &a, &b);
      CHECK((near(turned[i], a, kBudget) && near(turned[i + 18], b, kBudget)));
    }
  }
}

TEST_CASE("inversion takes the token that the target falls into") {
  const double mass[] = {0.0, 0.25, 0.0, 0.5, 0.25, 0.0};
  const auto of = [&](int64_t i) { return mass[i]; };
  double below = -1.0;
  CHECK_EQ(invert(6, 0.0, of, &below), 1);
  CHECK_EQ(below, 0.0);
  CHECK_EQ(invert(6, 0.25, of, &below), 3);
  CHECK_EQ(below, 0.25);
  CHECK_EQ(invert(6, 0.7499, of), 3);
  CHECK_EQ(invert(6, 0.75, of, &below), 4);
  CHECK_EQ(below, 0.75);
  CHECK_EQ(invert(6, 1.0, of, &below), 4);  // rounding past the end: the last with any mass
  CHECK_EQ(below, 0.75);
  CHECK_EQ(invert(3, 0.0, [](int64_t) { return 0.0; }), -1);
}

TEST_CASE("joined softmaxes are the whole one") {
  std::mt19937 random(3);
  const Floats scores = normal(200, 5, 5.0f), values = normal(200, 6);
  double top = -INFINITY, sum = 0, mean = 0;
  for (const float s : scores) top = std::max(top, double{s});
  for (size_t i = 0; i < 200; ++i) {
    sum += std::exp(scores[i] - top);
    mean += std::exp(scores[i] - top) * values[i];
  }
  for (int split = 0; split < 20; ++split) {
    float max = -kInf, total = 0.0f, out = 0.0f;
    for (size_t begin = 0; begin < 200;) {
      const size_t end = std::min<size_t>(200, begin + 1 + random() % 64);
      float part_max = -kInf, part_sum = 0.0f, part_out = 0.0f;
      if (random() % 4 != 0) {
        for (size_t i = begin; i < end; ++i) part_max = larger(part_max, scores[i]);
        for (size_t i = begin; i < end; ++i) {
          part_sum += std::exp(scores[i] - part_max);
          part_out += std::exp(scores[i] - part_max) * values[i];
        }
        part_out /= part_sum;
      } else {  // nothing visible here; its keys come with the next piece
        const SoftmaxJoin none = join_softmax(max, total, -kInf, 0.0f);
        CHECK((none.max == max && none.sum == total && none.keep == 1.0f && none.add == 0.0f));
        continue;
      }
      const SoftmaxJoin join = join_softmax(max, total, part_max, part_sum);
      max = join.max;
      total = join.sum;
      out = join.keep * out + join.add * part_out;
      begin = end;
    }
    CHECK(near(max, top, 0.0));
    CHECK(near(total, sum, 1e-6));
    CHECK(near(out, mean / sum, 1e-6));
  }
}

TEST_CASE("a window counts the token itself") {
  CHECK_EQ(first_visible(0, 0), 0);
  CHECK_EQ(first_visible(1000, 0), 0);
  CHECK_EQ(first_visible(9, 10), 0);
  CHECK_EQ(first_visible(10, 10), 1);
  CHECK_EQ(first_visible(10, 1), 10);
}
