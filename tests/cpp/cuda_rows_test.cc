// Bodies of csrc/cuda that take one row or one token, run on the CPU by a block of fibers, against
// float64. Outputs are poisoned, schedules random.

#include <algorithm>
#include <cmath>
#include <random>
#include <tuple>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/ops/mix_rows.h"
#include "cuda/bodies/attention_decode.h"
#include "cuda/bodies/rows.h"
#include "cuda/checks.h"
#include "host_block.h"
#include "numbers.h"

using namespace alignpro;
using namespace alignpro::cuda;

namespace {

// A rounding to T, relative.
template <typename T>
constexpr double rounding() {
  return sizeof(T) == 2 ? 3e-3 : kBudget;
}

template <typename Fn>
void for_rows(int64_t rows, int threads, const Fn& fn) {
  for (int64_t row = 0; row < rows; ++row) {
    HostBlock::run(threads, static_cast<uint32_t>(row + 1),
                   [&](HostBlock& block) { fn(block, row); });
  }
}

template <typename T>
void check_row_ops() {
  const int64_t rows = 3, n = 8 * 19;
  const auto count = static_cast<size_t>(rows * n);
  Tensor<T> x(normal(count, 1)), weight(normal(static_cast<size_t>(n), 2)), y(count);
  for_rows(rows, 64, [&](HostBlock& block, int64_t row) {
    static float scratch[kMaxWarps];
    rms_norm_row<T>(block, row, n, {x.data(), n}, weight.data(), 1e-5f, {}, {y.data(), n}, scratch);
  });
  const Floats xs = x.floats(), ws = weight.floats();
  Doubles expected(count);
  for (size_t m = 0; m < 3; ++m) {
    double sum = 0;
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      sum += double{xs[m * n + i]} * xs[m * n + i];
    }
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      expected[m * n + i] = ws[i] * xs[m * n + i] / std::sqrt(sum / n + 1e-5);
    }
  }
  CHECK(relative_error(y.floats(), expected) < rounding<T>());

  // Sums of none, one and three rows are the CPU's.
  const std::vector<int32_t> begins = {0, 0, 1, 4}, places = {2, 0, 2, 1};
  const Floats weights = {1.0f, 0.75f, 0.5f, -0.25f};
  Tensor<T> mixed(count);
  for_rows(rows, 64, [&](HostBlock& block, int64_t row) {
    mix_rows_row<T>(block, row, n, {x.data(), n}, begins.data(), places.data(), weights.data(),
                    {mixed.data(), n});
  });
  Floats sums(count);
  ops::mix_rows({begins, places, weights}, n, xs.data(), n, sums.data(), n);
  CHECK_EQ(mixed.floats(), Tensor<T>(sums).floats());
  CHECK_EQ(Floats(sums.begin() + n, sums.begin() + 2 * n), Floats(xs.begin() + 2 * n, xs.end()));

  Tensor<T> gate_up(normal(2 * count, 3, 2.0f)), h(count);
  for_rows(rows, 64, [&](HostBlock& block, int64_t row) {
    glu_row<Silu, T>(block, row, n, {gate_up.data(), 2 * n}, {h.data(), n});
  });
  const Floats gs = gate_up.floats();
  for (size_t m = 0; m < 3; ++m) {
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      const double gate = gs[m * 2 * n + i];
      expected[m * n + i] = gate / (1 + std::exp(-gate)) * gs[m * 2 * n + n + i];
    }
  }
  CHECK(relative_error(h.floats(), expected) < rounding<T>());

  const int32_t tokens[] = {2, 3, 0};  // 3 is past the table
  Tensor<T> out(count);
  for_rows(rows, 32, [&](HostBlock& block, int64_t row) {
    embedding_row<T>(block, row, {x.data(), n}, 3, n, tokens, 1.0f, {out.data(), n});
  });
  const Floats rows_out = out.floats();
  CHECK(same_bits(rows_out.data(), xs.data() + 2 * n, static_cast<size_t>(n)));
  CHECK(same_bits(rows_out.data() + 2 * n, xs.data(), static_cast<size_t>(n)));
  CHECK(std::all_of(rows_out.begin() + n, rows_out.begin() + 2 * n,
                    [](float v) { return std::isnan(v); }));

  const int32_t named[] = {-2, 0, -4};  // -4 is past the rows
  Tensor<T> with_soft(xs);
  for_rows(rows, 32, [&](HostBlock& block, int64_t row) {
    soft_rows_row<T>(block, row, {x.data(), n}, 3, n, named, {with_soft.data(), n});
  });
  const Floats soft_out = with_soft.floats();
  CHECK(same_bits(soft_out.data(), xs.data() + n, static_cast<size_t>(n)));
  CHECK(same_bits(soft_out.data() + n, xs.data() + n, static_cast<size_t>(2 * n)));
}

struct Heads {
  int64_t group, kv_heads, head_dim, window;
};

// Rows at some positions, their keys written by rope_kv_write into shuffled blocks; the first
// `shared` blocks are one and the same for all rows.
template <typename T>
void check_attention(const Heads& heads, const std::vector<int32_t>& positions, int64_t shared,
                     uint32_t seed) {
  const int64_t d = heads.head_dim, q_heads = heads.group * heads.kv_heads;
  const int64_t width = (q_heads + 2 * heads.kv_heads) * d, rotary = d / 4 * 2, half = rotary / 2;
  const auto rows = static_cast<int64_t>(positions.size());
  const int64_t longest = *std::max_element(positions.begin(), positions.end()) + 1;
  const int64_t blocks = (longest + 15) / 16;
  // Tables of blocks.
  std::vector<int32_t> order(static_cast<size_t>(shared + rows * blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  std::vector<int32_t> table;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t b = 0; b < blocks; ++b) {
      table.push_back(order[static_cast<size_t>(b < shared ? b : shared + row * blocks + b)]);
    }
  }
  const int64_t head_stride = 2 * 16 * d;
  Tensor<T> pool(order.size() * static_cast<size_t>(heads.kv_heads * head_stride));
  const KvBlocks<T> kv{pool.data(), heads.kv_heads * head_stride, head_stride, 16 * d, d};
  Floats cos, sin;
  for (int64_t i = 0; i < longest * half; ++i) {
    const double angle =
        static_cast<double>(i / half) * std::pow(100.0, -(i % half) / double(half));
    cos.push_back(static_cast<float>(std::cos(angle)));
    sin.push_back(static_cast<float>(std::sin(angle)));
  }
  // Histories: the tokens of one row after another; row 0's prefix is everyone's.
  std::vector<Floats> history;
  Floats last;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = positions[static_cast<size_t>(row)] + 1;
    Floats values =
        normal(static_cast<size_t>(count * width), seed + 10 + static_cast<uint32_t>(row));
    const int64_t common = row == 0 ? 0 : std::min(shared * 16, count);
    std::copy_n(history.empty() ? values.begin() : history[0].begin(), common * width,
                values.begin());
    Tensor<T> qkv(values);
    std::vector<int32_t> at, to;
    for (int64_t p = 0; p < count; ++p) {
      at.push_back(static_cast<int32_t>(p));
      to.push_back(p < common ? -1 : table[static_cast<size_t>(row * blocks + p / 16)]);
    }
    const RopeKvWrite<T> write{{qkv.data(), width}, q_heads,   heads.kv_heads, rotary, cos.data(),
                               sin.data(),          at.data(), to.data(),      kv};
    for_rows(count, 32,
             [&](HostBlock& block, int64_t p) { rope_kv_write_row<T>(block, p, write); });
    const Floats turned = qkv.floats();
    last.insert(last.end(), turned.end() - width, turned.end());
    Tensor<T> rounded(values);
    history.push_back(rounded.floats());
    CHECK(same_bits(turned.data() + q_heads * d, history.back().data() + q_heads * d,
                    static_cast<size_t>(2 * heads.kv_heads * d)));  // qkv keeps its k and v
  }
  Tensor<T> qkv(last), out(static_cast<size_t>(rows * q_heads * d));
  const int64_t chunks = (longest + kAttentionChunk - 1) / kAttentionChunk;
  Floats partial(static_cast<size_t>(rows * q_heads * chunks * (2 + d)), NAN);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const AttentionDecode<T> args{{qkv.data(), width},
                                kv,
                                table.data(),
                                blocks,
                                positions.data(),
                                static_cast<int>(heads.group),
                                static_cast<int>(heads.kv_heads),
                                heads.window,
                                scale,
                                partial.data(),
                                chunks,
                                {out.data(), q_heads * d}};
  static DecodeShared<T, 128> memory;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < heads.kv_heads; ++head) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::memset(&memory, 0xff, sizeof memory);
        HostBlock::run(kDecodeThreads, seed + static_cast<uint32_t>(row), [&](HostBlock& block) {
          attention_decode_chunk<128>(block, row, head, 0, chunk, args, memory);
        });
      }
      HostBlock::run(64, seed,
                     [&](HostBlock& block) { attention_decode_join<T>(block, row, head, args); });
    }
  }
  // float64
  Doubles expected;
  for (int64_t row = 0; row < rows; ++row) {
    const Floats& h = history[static_cast<size_t>(row)];
    const int64_t position = positions[static_cast<size_t>(row)];
    const auto turned = [&](int64_t p, int64_t head) {
      Doubles x(static_cast<size_t>(d));
      const float* from = h.data() + p * width + head * d;
      for (int64_t i = 0; i < d; ++i) {
        const int64_t lane = i < half ? i : i - half;
        const double c = i < rotary ? cos[static_cast<size_t>(p * half + lane)] : 1.0;
        const double s = i < rotary ? sin[static_cast<size_t>(p * half + lane)] : 0.0;
        const double other = i < half ? -from[i + half] : i < rotary ? from[i - half] : 0.0;
        x[static_cast<size_t>(i)] = from[i] * c + other * s;
      }
      return x;
    };
    for (int64_t head = 0; head < q_heads; ++head) {
      const Doubles q = turned(position, head);
      Doubles score, sum(static_cast<size_t>(d));
      double top = -INFINITY, total = 0;
      const int64_t first =
          heads.window > 0 ? std::max<int64_t>(0, position + 1 - heads.window) : 0;
      for (int64_t p = first; p <= position; ++p) {
        const Doubles k = turned(p, q_heads + head / heads.group);
        double dot = 0;
        for (size_t i = 0; i < k.size(); ++i) dot += q[i] * k[i];
        score.push_back(dot * scale);
        top = std::max(top, score.back());
      }
      for (int64_t p = first; p <= position; ++p) {
        const double e = std::exp(score[static_cast<size_t>(p - first)] - top);
        total += e;
        const float* v = h.data() + p * width + (q_heads + heads.kv_heads + head / heads.group) * d;
        for (int64_t i = 0; i < d; ++i) sum[static_cast<size_t>(i)] += e * v[i];
      }
      for (const double s : sum) expected.push_back(s / total);
    }
  }
  CHECK(relative_error(out.floats(), expected) < (sizeof(T) == 2 ? 8e-3 : 4e-6));
}

}  // namespace

TEST_CASE("row ops match double") {
  check_row_ops<float>();
  check_row_ops<Bfloat16>();
}

TEST_CASE("decode attention matches double") {
  check_attention<float>({3, 2, 8, 0}, {40, 5, 0}, 1, 1);
  check_attention<float>({1, 1, 64, 7}, {0, 6, 7, 100}, 0, 2);
  check_attention<float>({8, 1, 16, 0}, {530}, 0, 3);
  check_attention<Bfloat16>({4, 1, 128, 0}, {17, 33}, 1, 4);
  check_attention<Bfloat16>({7, 1, 80, 600}, {1100}, 0, 5);
}

TEST_CASE("a row attends alone as in company") {
  // The same row and keys with and without others beside it, under different schedules.
  const auto run = [](int64_t row, int64_t rows, uint32_t seed) {
    const int64_t d = 16;
    Tensor<float> qkv(normal(static_cast<size_t>(rows * 3 * d), 1));
    const Floats only = normal(static_cast<size_t>(3 * d), 9);
    std::copy(only.begin(), only.end(), qkv.data() + row * 3 * d);
    Tensor<float> pool(normal(40 * 2 * 16 * 16, 2));
    std::vector<int32_t> table, positions(static_cast<size_t>(rows), 37);
    for (int64_t r = 0; r < rows; ++r) {
      for (int32_t b = 0; b < 3; ++b) table.push_back(r == row ? b : 3 + b);
    }
    Tensor<float> out(static_cast<size_t>(rows * d));
    Floats partial(static_cast<size_t>(rows * (2 + d)), NAN);
    const AttentionDecode<float> args{{qkv.data(), 3 * d},
                                      {pool.data(), 2 * 16 * d, 2 * 16 * d, 16 * d, d},
                                      table.data(),
                                      3,
                                      positions.data(),
                                      1,
                                      1,
                                      0,
                                      0.25f,
                                      partial.data(),
                                      1,
                                      {out.data(), d}};
    static DecodeShared<float, 64> memory;
    for (int64_t r = 0; r < rows; ++r) {
      HostBlock::run(kDecodeThreads, seed, [&](HostBlock& block) {
        attention_decode_chunk<64>(block, r, 0, 0, 0, args, memory);
      });
      HostBlock::run(32, seed,
                     [&](HostBlock& block) { attention_decode_join<float>(block, r, 0, args); });
    }
    const Floats all = out.floats();
    return Floats(all.begin() + row * d, all.begin() + (row + 1) * d);
  };
  const Floats alone = run(0, 1, 1);
  for (uint32_t seed = 2; seed < 6; ++seed) {
    const Floats among = run(2, 4, seed);
    CHECK(same_bits(alone.data(), among.data(), alone.size()));
  }
}

TEST_CASE("reductions follow each other in the same scratch") {
  for (uint32_t seed = 1; seed < 20; ++seed) {
    float scratch[kMaxWarps];
    int wrong = 0;
    HostBlock::run(96, seed, [&](HostBlock& block) {
      const auto thread = static_cast<float>(block.thread());
      const float sum = reduce_block(block, thread, scratch, Add());
      const float max = reduce_block(block, 1000.0f - thread, scratch, Larger());
      const float quad = reduce_lanes(block, thread, 4, Add());
      const float expected = 4.0f * std::floor(thread / 4.0f) * 4.0f + 6.0f;
      wrong += sum == 4560.0f && max == 1000.0f && quad == expected ? 0 : 1;
    });
    CHECK_EQ(wrong, 0);
  }
}

TEST_CASE("a missing barrier is seen") {
  const auto neighbour = [](bool with_barrier, uint32_t seed) {
    int shown[64] = {}, bad = 0;
    HostBlock::run(64, seed, [&](HostBlock& block) {
      shown[block.thread()] = 1;
      if (with_barrier) block.sync();
      bad += shown[(block.thread() + 1) % 64] == 0 ? 1 : 0;
    });
    return bad;
  };
  for (uint32_t seed = 1; seed < 5; ++seed) {
    CHECK_EQ(neighbour(true, seed), 0);
    CHECK(neighbour(false, seed) > 0);
  }
  CHECK_THROWS_WITH_AS((void)(HostBlock::run(64, 1,
                                             [](HostBlock& block) {
                                               if (block.thread() != 5) block.sync();
                                             })),
                       doctest::Contains("63 wait"), std::runtime_error);
}

TEST_CASE("arguments that no kernel takes are refused") {
  alignas(16) float memory[64];
  const Matrix good{memory, 2, 8, 8, DType::kF32};
  check_matrix("op", "x", good, 2, 8, DType::kF32);
  const auto refused = [&](Matrix m, const char* text) {
    CHECK_THROWS_WITH_AS((void)(check_matrix("op", "x", m, 2, 8, DType::kF32)),
                         doctest::Contains(text), InvalidArgument);
  };
  Matrix bad = good;
  bad.dtype = DType::kBF16;
  refused(bad, "op: x: expected F32, got BF16");
  bad = good;
  bad.rows = 3;
  refused(bad, "expected shape [2, 8], got [3, 8]");
  bad = good;
  bad.ld = 10;
  refused(bad, "at a distance of 10");
  bad = good;
  bad.data = memory + 1;
  refused(bad, "multiple of 16 bytes");
  bad = {memory, 2, 6, 8, DType::kF32};
  CHECK_THROWS_WITH_AS((void)(check_matrix("op", "x", bad, 2, 6, DType::kF32)),
                       doctest::Contains("multiple of 4"), InvalidArgument);
  bad = {nullptr, 0, 8, 8, DType::kF32};
  check_matrix("op", "x", bad, 0, 8, DType::kF32);  // nothing to read

  CHECK_THROWS_WITH_AS((void)(dispatch("op", DType::kF16, [](auto) {})),
                       doctest::Contains("got F16"), InvalidArgument);
  const PagedKv kv{memory, 256, 256, 128};
  const Matrix qkv{memory, 1, 32, 32, DType::kF32};
  check_attention("op", {2, 1, 8, 0, 1.0f}, qkv, kv);
  CHECK_THROWS_WITH_AS((void)(check_attention("op", {3, 2, 8, 0, 1.0f}, qkv, kv)),
                       doctest::Contains("3 over 2"), InvalidArgument);
  CHECK_THROWS_WITH_AS(
      (void)(check_attention("op", {2, 1, 6, 0, 1.0f}, {memory, 1, 24, 24, DType::kF32}, kv)),
      doctest::Contains("head_dim"), InvalidArgument);
  LogprobInput in;
  in.hidden = {memory, 2, 8, 8, DType::kF32};
  in.weight = {memory, 4, 8, 8, DType::kF32};
  check_logprob("op", in);
  in.temperature = 0.0f;
  CHECK_THROWS_WITH_AS((void)(check_logprob("op", in)), doctest::Contains("temperature"),
                       InvalidArgument);
  in.temperature = NAN;
  CHECK_THROWS_WITH_AS((void)(check_logprob("op", in)), doctest::Contains("temperature"),
                       InvalidArgument);
  in.temperature = 1.0f;
  in.ref_hidden = in.hidden;
  in.ref_weight = {memory, 3, 8, 8, DType::kF32};
  CHECK_THROWS_WITH_AS((void)(check_logprob("op", in)), doctest::Contains("reference_weight"),
                       InvalidArgument);
}
