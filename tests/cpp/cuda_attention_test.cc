// Attention of csrc/cuda over paged keys, launchers and bodies as callers see them, on the CPU:
// against float64, and decode against prefill to the bit.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/aligned.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/attention.h"
#include "cuda/ops.h"
#include "host_block.h"
#include "numbers.h"

using namespace alignpro;

namespace {

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 2 ? DType::kBF16 : DType::kF32;
}

template <typename T>
cuda::Matrix matrix(Tensor<T>& t, int64_t rows, int64_t cols) {
  return {t.data(), rows, cols, cols, dtype_of<T>()};
}

struct Heads {
  int64_t group, kv_heads, head_dim, window;
};

// Sequences of some lengths in a kv_pool whose blocks lie in no order; what no position wrote is
// NaN. Rows are the last `rows` positions of each sequence, one sequence after another.
template <typename T>
struct Sequences {
  Heads heads;
  cuda::AttentionShape shape;
  std::vector<int32_t> lengths, table, row_of, position_of;
  int64_t blocks = 0, width, q_size, rows = 0;
  Tensor<T> kv_pool, qkv;

  Sequences(const Heads& h, const std::vector<int32_t>& all, const std::vector<int32_t>& live)
      : heads(h),
        shape{h.group * h.kv_heads, h.kv_heads, h.head_dim, h.window,
              1.0f / std::sqrt(static_cast<float>(h.head_dim))},
        lengths(all),
        width((h.group + 2) * h.kv_heads * h.head_dim),
        q_size(h.group * h.kv_heads * h.head_dim),
        kv_pool(1),
        qkv(1) {
    for (const int32_t length : lengths) blocks = std::max<int64_t>(blocks, (length + 15) / 16);
    std::vector<int32_t> order(lengths.size() * static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    table = order;
    const int64_t d = h.head_dim, block = h.kv_heads * 2 * 16 * d;
    Floats values = normal(order.size() * static_cast<size_t>(block), 6);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t p = lengths[s]; p < 16 * blocks; ++p) {
        for (int64_t head = 0; head < 2 * h.kv_heads; ++head) {
          const int64_t at = block_of(s, p) * block + (head * 16 + p % 16) * d;
          std::fill_n(values.begin() + at, d, NAN);
        }
      }
      for (int32_t i = 0; i < live[s]; ++i) {
        row_of.push_back(static_cast<int32_t>(s));
        position_of.push_back(lengths[s] - live[s] + i);
      }
    }
    rows = static_cast<int64_t>(row_of.size());
    kv_pool = Tensor<T>(values);
    qkv = Tensor<T>(normal(static_cast<size_t>(rows * width), 7));
  }
  int64_t block_of(size_t sequence, int64_t position) const {
    return table[sequence * static_cast<size_t>(blocks) + static_cast<size_t>(position / 16)];
  }
  cuda::PagedKv kv() {
    const int64_t half = 16 * heads.head_dim;
    return {kv_pool.data(), heads.kv_heads * 2 * half, 2 * half, half};
  }

  struct Result {
    Floats out, lse;
  };
  // In segments of at most `most` rows.
  Result prefill(int32_t most) {
    std::vector<cuda::Segment> segments;
    std::vector<int32_t> tables;
    for (int32_t row = 0; row < rows;) {
      const auto at = static_cast<size_t>(row);
      int32_t count = 1;
      while (count < most && row + count < rows &&
             row_of[at + static_cast<size_t>(count)] == row_of[at]) {
        ++count;
      }
      segments.push_back({row, count, position_of[at]});
      const auto* from = table.data() + row_of[at] * blocks;
      tables.insert(tables.end(), from, from + blocks);
      row += count;
    }
    Tensor<T> out(static_cast<size_t>(rows * q_size));
    Result result{{}, Floats(static_cast<size_t>(rows * shape.num_heads), -7.0f)};
    cuda::attention_prefill(shape, matrix(qkv, rows, width), segments.data(),
                            static_cast<int64_t>(segments.size()), std::min<int64_t>(most, rows),
                            tables.data(), blocks, kv(), matrix(out, rows, q_size),
                            result.lse.data(), nullptr);
    result.out = out.floats();
    return result;
  }
  // Row by row of the named ones.
  Floats decode(const std::vector<int32_t>& which) {
    Tensor<T> queries(which.size() * static_cast<size_t>(width)),
        out(which.size() * static_cast<size_t>(q_size));
    std::vector<int32_t> tables, positions;
    for (size_t i = 0; i < which.size(); ++i) {
      const auto row = static_cast<size_t>(which[i]);
      std::copy_n(qkv.data() + which[i] * width, width,
                  queries.data() + static_cast<int64_t>(i) * width);
      const auto* from = table.data() + row_of[row] * blocks;
      tables.insert(tables.end(), from, from + blocks);
      positions.push_back(position_of[row]);
    }
    const auto count = static_cast<int64_t>(which.size());
    Tensor<float> workspace(
        static_cast<size_t>(cuda::attention_decode_bytes(shape, count, 16 * blocks) / 4));
    cuda::attention_decode(shape, matrix(queries, count, width), positions.data(), tables.data(),
                           blocks, 16 * blocks, kv(), workspace.data(), matrix(out, count, q_size),
                           nullptr);
    return out.floats();
  }
  // float64
  void truth(Doubles* out, Doubles* lse) {
    const int64_t d = heads.head_dim;
    const Floats stored = kv_pool.floats(), q = qkv.floats();
    for (int64_t row = 0; row < rows; ++row) {
      const auto sequence = static_cast<size_t>(row_of[static_cast<size_t>(row)]);
      const int64_t position = position_of[static_cast<size_t>(row)];
      const int64_t first =
          heads.window > 0 ? std::max<int64_t>(0, position + 1 - heads.window) : 0;
      for (int64_t head = 0; head < shape.num_heads; ++head) {
        const auto key = [&](int64_t p) {
          const int64_t unit = block_of(sequence, p) * heads.kv_heads + head / heads.group;
          return stored.data() + (unit * 32 + p % 16) * d;
        };
        Doubles score;
        double top = -INFINITY, total = 0;
        for (int64_t p = first; p <= position; ++p) {
          double dot = 0;
          for (int64_t i = 0; i < d; ++i) {
            dot += double{q[static_cast<size_t>(row * width + head * d + i)]} * key(p)[i];
          }
          score.push_back(dot * shape.scale);
          top = std::max(top, score.back());
        }
        Doubles sum(static_cast<size_t>(d));
        for (int64_t p = first; p <= position; ++p) {
          const double e = std::exp(score[static_cast<size_t>(p - first)] - top);
          total += e;
          for (int64_t i = 0; i < d; ++i) sum[static_cast<size_t>(i)] += e * key(p)[16 * d + i];
        }
        for (const double s : sum) out->push_back(s / total);
        lse->push_back(top + std::log(total));
      }
    }
  }
};

template <typename T>
void check_prefill(const Heads& heads, const std::vector<int32_t>& lengths,
                   const std::vector<int32_t>& live, int32_t chunk) {
  Sequences<T> s(heads, lengths, live);
  Doubles out, lse;
  s.truth(&out, &lse);
  const auto whole = s.prefill(static_cast<int32_t>(s.rows));
  CHECK(relative_error(whole.out, out) < (sizeof(T) == 2 ? 8e-3 : 4e-6));
  CHECK(relative_error(whole.lse, lse) < (sizeof(T) == 2 ? 1e-3 : 4e-6));
  // Cut otherwise, and alone in a decode step: the same bits.
  const auto cut = s.prefill(chunk);
  CHECK(same_bits(cut.out.data(), whole.out.data(), out.size()));
  CHECK(same_bits(cut.lse.data(), whole.lse.data(), lse.size()));
  std::vector<int32_t> which;
  for (int32_t row = 0; row < s.rows; row += 5) which.push_back(row);
  which.push_back(static_cast<int32_t>(s.rows - 1));
  const Floats alone = s.decode(which);
  for (size_t i = 0; i < which.size(); ++i) {
    const auto size = static_cast<size_t>(s.q_size);
    CHECK(same_bits(alone.data() + i * size,
                    whole.out.data() + static_cast<size_t>(which[i]) * size, size));
  }
}

// A segment of rows whose cached positions are the rows of `parent` (-1: none) and what that has
// cached.
struct Node {
  int32_t parent, rows;
};

// Gradients through attention over a tree of segments, beside the CPU's op on the same values.
template <typename T>
void check_backward(const Heads& heads, const std::vector<Node>& nodes) {
  const int64_t d = heads.head_dim, kv_heads = heads.kv_heads, q_heads = heads.group * kv_heads;
  const int64_t width = (q_heads + 2 * kv_heads) * d, q_size = q_heads * d;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  std::vector<cuda::Segment> segments;
  std::vector<std::vector<int32_t>> key_rows, seen_by(nodes.size());
  int32_t rows = 0;
  int64_t longest = 0, most = 0;
  for (size_t s = 0; s < nodes.size(); ++s) {
    const bool root = nodes[s].parent < 0;
    auto keys = root ? std::vector<int32_t>() : key_rows[static_cast<size_t>(nodes[s].parent)];
    segments.push_back({rows, nodes[s].rows, static_cast<int32_t>(keys.size())});
    for (int32_t i = 0; i < nodes[s].rows; ++i) keys.push_back(rows++);
    for (auto at = static_cast<int32_t>(s); at >= 0; at = nodes[static_cast<size_t>(at)].parent) {
      seen_by[static_cast<size_t>(at)].push_back(static_cast<int32_t>(s));
    }
    longest = std::max(longest, static_cast<int64_t>(keys.size()));
    most = std::max<int64_t>(most, nodes[s].rows);
    key_rows.push_back(keys);
  }
  std::vector<int32_t> child_begin = {0}, children;
  for (const auto& of : seen_by) {
    children.insert(children.end(), of.begin(), of.end());
    child_begin.push_back(static_cast<int32_t>(children.size()));
  }
  const auto count = [](int64_t n) { return static_cast<size_t>(n); };
  Tensor<T> qkv(normal(count(rows * width), 1)), out(count(rows * q_size)),
      dout(normal(count(rows * q_size), 2)), d_qkv(count(rows * width));
  // Every segment's keys in blocks of its own.
  const int64_t blocks = (longest + 15) / 16;
  std::vector<int32_t> table(nodes.size() * count(blocks));
  std::iota(table.rbegin(), table.rend(), 0);
  Tensor<T> kv_pool(table.size() * count(kv_heads * 32 * d));
  for (size_t s = 0; s < nodes.size(); ++s) {
    for (size_t p = 0; p < key_rows[s].size(); ++p) {
      for (int64_t i = 0; i < 2 * kv_heads * d; ++i) {
        const int64_t head = i / d % kv_heads, half = i / d / kv_heads;
        const int64_t block = table[s * count(blocks) + p / 16];
        kv_pool.data()[((block * kv_heads + head) * 32 + half * 16 + static_cast<int64_t>(p) % 16) *
                           d +
                       i % d] = qkv.data()[key_rows[s][p] * width + q_size + i];
      }
    }
  }
  const cuda::AttentionShape shape{q_heads, kv_heads, d, heads.window, scale};
  const cuda::PagedKv kv{kv_pool.data(), kv_heads * 32 * d, 32 * d, 16 * d};
  Floats lse(count(rows * q_heads), NAN);
  const auto segment_count = static_cast<int64_t>(segments.size());
  cuda::attention_prefill(shape, matrix(qkv, rows, width), segments.data(), segment_count, most,
                          table.data(), blocks, kv, matrix(out, rows, q_size), lse.data(), nullptr);
  Tensor<float> workspace(count(cuda::attention_backward_bytes(shape, rows) / 4));
  const bool tree = rows != nodes[0].rows;
  const cuda::AttentionBackwardInput in{matrix(qkv, rows, width),
                                        matrix(out, rows, q_size),
                                        matrix(dout, rows, q_size),
                                        lse.data(),
                                        segments.data(),
                                        segment_count,
                                        most,
                                        tree ? child_begin.data() : nullptr,
                                        tree ? children.data() : nullptr,
                                        table.data(),
                                        blocks,
                                        kv};
  cuda::attention_backward(shape, in, matrix(d_qkv, rows, width), workspace.data(), nullptr);

  std::vector<ops::SegmentRows> own;
  for (size_t s = 0; s < nodes.size(); ++s) {
    own.push_back({segments[s].row_begin, segments[s].row_count, segments[s].position,
                   std::span<const int32_t>(key_rows[s])});
  }
  Floats expected(count(rows * width));
  ThreadPool pool(1);
  const ops::AttentionShape on_cpu{q_heads, kv_heads, d, heads.window, scale};
  AlignedBuffer scratch;
  ops::attention_backward(on_cpu, qkv.floats().data(), out.floats().data(), dout.floats().data(),
                          own, expected.data(),
                          scratch.reserve(ops::attention_backward_floats(on_cpu, own)), pool);
  const Floats got = d_qkv.floats();
  const double budget = sizeof(T) == 2 ? 1e-2 : 1e-5;  // P and dS are rounded to bfloat16
  const int64_t ends[] = {0, q_size, q_size + kv_heads * d, width};
  for (int part = 0; part < 3; ++part) {
    Floats a;
    Doubles b;
    for (int64_t i = 0; i < rows * width; ++i) {
      if (i % width < ends[part] || i % width >= ends[part + 1]) continue;
      a.push_back(got[count(i)]);
      b.push_back(expected[count(i)]);
    }
    CHECK(relative_error(a, b) < budget);
  }
}

}  // namespace

TEST_CASE("prefill matches double and decode to the bit") {
  check_prefill<float>({3, 2, 8, 0}, {40, 1, 23}, {40, 1, 7}, 9);
  check_prefill<float>({2, 1, 100, 7}, {50}, {50}, 13);
  check_prefill<Bfloat16>({4, 1, 128, 0}, {45, 20}, {45, 2}, 11);
  check_prefill<Bfloat16>({3, 2, 64, 20}, {70}, {60}, 32);
}

TEST_CASE("chunks of keys are joined alike") {
  check_prefill<Bfloat16>({2, 1, 64, 0}, {1060}, {40}, 7);
  check_prefill<Bfloat16>({1, 1, 80, 520}, {1100}, {90}, 64);
  check_prefill<float>({1, 1, 16, 0}, {530}, {30}, 8);
}

TEST_CASE("groups may have more than a warps rows") {
  check_prefill<Bfloat16>({20, 1, 64, 0}, {37}, {9}, 2);
  check_prefill<float>({33, 1, 8, 0}, {20}, {3}, 1);
}

TEST_CASE("a nan stays in its row") {
  Sequences<Bfloat16> s({1, 1, 64, 0}, {40}, {40});
  s.qkv.data()[3 * s.width] = stored<Bfloat16>(NAN);
  const auto result = s.prefill(40);
  for (int64_t row = 0; row < 40; ++row) {
    CHECK_EQ(std::isnan(result.out[static_cast<size_t>(row * 64)]), row == 3);
    CHECK_EQ(std::isnan(result.lse[static_cast<size_t>(row)]), row == 3);
  }
  CHECK((std::isnan(s.decode({3})[0]) && !std::isnan(s.decode({4})[0])));
}

TEST_CASE("gradients of attention are the cpus") {
  check_backward<float>({2, 1, 8, 0}, {{-1, 70}});
  check_backward<float>({3, 2, 100, 9}, {{-1, 20}, {0, 7}, {0, 40}, {2, 5}});
  check_backward<Bfloat16>({4, 1, 128, 0}, {{-1, 37}, {0, 20}, {0, 1}});
  check_backward<Bfloat16>({1, 2, 64, 30}, {{-1, 130}});
  check_backward<Bfloat16>({3, 1, 96, 12}, {{-1, 9}, {0, 50}, {1, 30}});
}
