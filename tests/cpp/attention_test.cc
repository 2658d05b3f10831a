// Attention against a float64 reference written plainly here, and rows to the bit whatever shares
// their blocks, their batch or their chunk of a prefill.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/dtype.h"
#include "alignpro/core/error.h"
#include "alignpro/ops/attention.h"
#include "alignpro/ops/attention_shape.h"
#include "alignpro/ops/kv_view.h"
#include "numbers.h"

using namespace alignpro;
using namespace alignpro::ops;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Attention {
  AttentionShape shape;
  int64_t tokens;
  Floats qkv;
  std::vector<std::byte> kv_pool;
  KvView kv;
  std::vector<int32_t> blocks;

  Attention(AttentionShape s, int64_t count, uint32_t seed, DType dtype = DType::kF32)
      : shape(s), tokens(count), qkv(normal(static_cast<size_t>(count * s.qkv_size()), seed)) {
    const int64_t half = s.head_dim * kKvBlock * block_bytes(dtype), head = 2 * half;
    const int64_t block = s.num_kv_heads * head, needed = (count + kKvBlock - 1) / kKvBlock;
    // Slots that nobody wrote hold NaN, in either format: reading one would show.
    kv_pool.assign(static_cast<size_t>((needed + 1) * block + 64), std::byte{0xff});
    kv = {kv_pool.data(), block, head, half, dtype};
    for (int64_t b = 0; b < needed; ++b) blocks.push_back(static_cast<int32_t>(needed - b));
  }

  void write(int64_t begin, int64_t end, ThreadPool& pool) {
    std::vector<KvWrite> writes;
    for (int64_t t = begin; t < end; ++t) {
      writes.push_back({static_cast<int32_t>(t), blocks[static_cast<size_t>(t / kKvBlock)],
                        static_cast<int32_t>(t % kKvBlock)});
    }
    kv_write(shape, qkv.data(), writes, kv, pool);
  }

  // Rows [begin, end) of `out`, their keys and those before them being written.
  void attend(int64_t begin, int64_t end, Floats& out, ThreadPool& pool) const {
    const std::vector<Segment> segments{{begin, end - begin, begin, blocks}};
    const AttentionPlan plan(shape, segments, pool.size());
    attention(shape, qkv.data(), plan, kv, out.data(), pool);
  }

  Floats whole(ThreadPool& pool) {
    write(0, tokens, pool);
    Floats out(static_cast<size_t>(tokens * shape.q_size()), NAN);
    attend(0, tokens, out, pool);
    return out;
  }

  const float* at(int64_t token, int64_t head_offset) const {
    return qkv.data() + token * shape.qkv_size() + head_offset * shape.head_dim;
  }

  // An element of a key or a value, as it is stored.
  float held(float x) const {
    return kv.dtype == DType::kF16 ? half_to_float(float_to_half(x)) : x;
  }

  // softmax weights of one query head: the definition, in double, or plainly in float32
  template <typename Real>
  std::vector<Real> weights(int64_t t, int64_t head) const {
    const int64_t first = shape.first_visible(t);
    std::vector<Real> p(static_cast<size_t>(t + 1), Real{0});
    const float* q = at(t, head);
    Real most = -std::numeric_limits<Real>::infinity();
    for (int64_t j = first; j <= t; ++j) {
      const float* k = at(j, shape.num_heads + head / shape.group());
      Real s = 0;
      for (int64_t i = 0; i < shape.head_dim; ++i) s += Real{q[i]} * Real{held(k[i])};
      most = std::max(most, p[static_cast<size_t>(j)] = s * shape.scale);
    }
    Real sum = 0;
    for (int64_t j = first; j <= t; ++j) {
      Real& value = p[static_cast<size_t>(j)];
      sum += value = std::exp(value - most);
    }
    for (Real& value : p) value /= sum;
    return p;
  }

  template <typename Real>
  std::vector<Real> plain() const {
    std::vector<Real> out(static_cast<size_t>(tokens * shape.q_size()));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < shape.num_heads; ++h) {
        const std::vector<Real> p = weights<Real>(t, h);
        Real* to = out.data() + t * shape.q_size() + h * shape.head_dim;
        for (int64_t j = shape.first_visible(t); j <= t; ++j) {
          const float* v = at(j, shape.num_heads + shape.num_kv_heads + h / shape.group());
          for (int64_t i = 0; i < shape.head_dim; ++i) {
            to[i] += p[static_cast<size_t>(j)] * Real{held(v[i])};
          }
        }
      }
    }
    return out;
  }
};

AttentionShape make_shape(int64_t heads, int64_t kv_heads, int64_t d, int64_t window) {
  return {heads, kv_heads, d, window, static_cast<float>(1 / std::sqrt(static_cast<double>(d)))};
}

bool same_rows(const AttentionShape& shape, const Floats& a, int64_t row, const Floats& b,
               int64_t other, int64_t count = 1) {
  return same_bits(a.data() + row * shape.q_size(), b.data() + other * shape.q_size(),
                   static_cast<size_t>(count * shape.q_size()));
}

}  // namespace

TEST_CASE("attention matches double and chunking a prefill changes no bit") {
  ThreadPool one(1), two(2), five(5);
  struct Case {
    AttentionShape shape;
    int64_t tokens;
    DType dtype = DType::kF32;
  };
  for (const auto& [shape, tokens, dtype] :
       std::vector<Case>{{make_shape(4, 2, 12, 0), 53},
                         {make_shape(3, 1, 16, 0), 1},
                         {make_shape(9, 3, 64, 0), 53},
                         {make_shape(2, 2, 8, 5), 53},
                         {make_shape(4, 2, 16, 20), 53},
                         {make_shape(7, 1, 4, 0), 1100},
                         {make_shape(2, 1, 12, 600), 1100},
                         {make_shape(2, 2, 4, 3), 1050},
                         {make_shape(9, 3, 64, 0), 53, DType::kF16},
                         {make_shape(3, 1, 12, 700), 1100, DType::kF16},
                         {make_shape(2, 2, 5, 0), 20, DType::kF16}}) {
    Attention a(shape, tokens, 21, dtype);
    const Floats out = a.whole(two);
    const Doubles truth = a.plain<double>();
    const double error = relative_error(out, truth);
    CHECK(error < kBudget);
    CHECK(error < 2 * relative_error(a.plain<float>(), truth) + 5e-8);

    Attention b(shape, tokens, 21, dtype);
    Floats chunked(out.size(), NAN);
    int64_t begin = 0;
    for (const int64_t to : {1, 17, 30, 31, 53, 511, 512, 513, 1023, 1025, 1100}) {
      const int64_t end = std::min<int64_t>(to, tokens);
      if (end == begin) continue;
      b.write(begin, end, one);
      b.attend(begin, end, chunked, end % 2 == 0 ? one : five);
      begin = end;
    }
    CHECK(same_bits(out.data(), chunked.data(), out.size()));
    for (const int64_t t : {0, 15, 16, 510, 511, 512, 513, 1023, 1024, 1049}) {  // decoded
      if (t >= tokens) continue;
      for (ThreadPool* pool : {&one, &two, &five}) {
        Floats row(out.size(), NAN);
        b.attend(t, t + 1, row, *pool);
        CHECK(same_rows(shape, row, t, out, t));
      }
    }
  }
}

namespace {

// Sequences that fork from one another at block boundaries, as samples of a prompt do.
struct Forest {
  struct Sequence {
    std::vector<int32_t> blocks;
    int64_t size = 0;
  };
  AttentionShape shape;
  std::vector<Sequence> sequences;
  Floats kv_pool;  // as floats or as pairs of halves, random either way
  KvView kv;
  int32_t next = 0;

  Forest(AttentionShape s, int64_t most_blocks, DType dtype = DType::kF32) : shape(s) {
    const int64_t half = s.head_dim * kKvBlock * block_bytes(dtype), head = 2 * half;
    const int64_t block = s.num_kv_heads * head;
    kv_pool = normal(static_cast<size_t>(most_blocks * block / 4 + 16), 77);
    for (float& x : kv_pool) {
      if (dtype == DType::kF32) continue;
      const uint16_t halves[2] = {float_to_half(x), float_to_half(x * x - 1.0f)};
      std::memcpy(&x, halves, sizeof(x));
    }
    kv = {reinterpret_cast<std::byte*>(kv_pool.data()), block, head, half, dtype};
  }

  // `size` positions, the first `shared` of them (a multiple of 16) those of sequence `from`.
  int64_t add(int64_t size, int64_t from = -1, int64_t shared = 0) {
    Sequence s;
    if (from >= 0) {
      const auto& other = sequences[static_cast<size_t>(from)].blocks;
      s.blocks.assign(other.begin(), other.begin() + shared / kKvBlock);
    }
    s.size = size;
    while (static_cast<int64_t>(s.blocks.size()) * kKvBlock < size) s.blocks.push_back(next++);
    sequences.push_back(s);
    return static_cast<int64_t>(sequences.size()) - 1;
  }

  // The last `count` positions of each of `some`; q of a row depends on sequence and position.
  Floats attend(const std::vector<std::pair<int64_t, int64_t>>& some, ThreadPool& pool,
                std::vector<int64_t>* run_rows = nullptr) const {
    std::vector<Segment> segments;
    Floats qkv;
    int64_t rows = 0;
    for (const auto& [index, count] : some) {
      const Sequence& s = sequences[static_cast<size_t>(index)];
      segments.push_back({rows, count, s.size - count, s.blocks});
      for (int64_t t = s.size - count; t < s.size; ++t) {
        const Floats row = normal(static_cast<size_t>(shape.qkv_size()),
                                  static_cast<uint32_t>(index * 100000 + t));
        qkv.insert(qkv.end(), row.begin(), row.end());
      }
      rows += count;
    }
    const AttentionPlan plan(shape, segments, pool.size());
    for (const auto& tile : plan.tiles) {
      for (const auto& run : tile.runs) {
        for (int64_t b = run.first_block; run_rows != nullptr && b < run.end_block; ++b) {
          run_rows->push_back(run.token_end - run.token_begin);
        }
      }
    }
    Floats out(static_cast<size_t>(rows * shape.q_size()), NAN);
    attention(shape, qkv.data(), plan, kv, out.data(), pool);
    return out;
  }
};

}  // namespace

TEST_CASE("a row does not know who shares its blocks") {
  ThreadPool one(1), two(2), nine(9);
  for (const auto& [shape, dtype] :
       std::vector<std::pair<AttentionShape, DType>>{{make_shape(9, 3, 16, 0), DType::kF32},
                                                     {make_shape(14, 2, 12, 0), DType::kF32},
                                                     {make_shape(2, 1, 8, 40), DType::kF32},
                                                     {make_shape(4, 4, 4, 700), DType::kF16}}) {
    Forest forest(shape, 600, dtype);
    const int64_t a = forest.add(900);
    for (int64_t i = 0; i < 7; ++i) forest.add(897 + i, a, 896);  // samples of one prompt
    const int64_t b = forest.add(530, a, 64);                     // a system prompt in common
    for (int64_t i = 0; i < 3; ++i) forest.add(529 + 9 * i, b, 528);
    forest.add(1040);  // a stranger
    forest.add(5);
    forest.add(512, a, 512 - 16);
    std::vector<std::pair<int64_t, int64_t>> all;
    for (int64_t s = 0; s < static_cast<int64_t>(forest.sequences.size()); ++s) {
      all.emplace_back(s, std::vector<int64_t>{1, 1, 3, 1, 20}[static_cast<size_t>(s % 5)]);
      const int64_t size = forest.sequences[static_cast<size_t>(s)].size;
      all.back().second = std::min(all.back().second, size);
    }
    std::mt19937 generator(5);
    std::vector<Floats> alone;
    for (const auto& one_segment : all) alone.push_back(forest.attend({one_segment}, one));
    for (int round = 0; round < 4; ++round) {
      std::vector<size_t> order(all.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), generator);
      if (round > 1) order.resize(static_cast<size_t>(3 + 4 * (round - 2)));
      std::vector<std::pair<int64_t, int64_t>> some;
      for (const size_t i : order) some.push_back(all[i]);
      for (ThreadPool* pool : {&one, &two, &nine}) {
        const Floats out = forest.attend(some, *pool);
        int64_t row = 0;
        for (const size_t i : order) {
          CHECK(same_rows(shape, out, row, alone[i], 0, all[i].second));
          row += all[i].second;
        }
      }
    }
  }
}

TEST_CASE("a shared block is read once for a group") {
  ThreadPool one(1);
  Forest forest(make_shape(9, 3, 16, 0), 200);
  const int64_t prompt = forest.add(300);
  std::vector<std::pair<int64_t, int64_t>> decoding;
  for (int64_t i = 0; i < 16; ++i) decoding.emplace_back(forest.add(320, prompt, 288), 1);
  std::vector<int64_t> rows;
  (void)forest.attend(decoding, one, &rows);
  // 18 blocks for all sixteen, and two more for each.
  CHECK_EQ(std::count(rows.begin(), rows.end(), 16), 18);
  CHECK_EQ(std::count(rows.begin(), rows.end(), 1), 32);
  CHECK_EQ(rows.size(), size_t{50});
}

TEST_CASE("a plan shows every token each of its blocks once") {
  for (const int64_t window : {0, 33}) {
    for (const int threads : {1, 2, 16}) {
      const AttentionShape shape = make_shape(6, 2, 8, window);
      std::vector<int32_t> shared(70), mine(70);
      for (int32_t b = 0; b < 70; ++b) {
        shared[static_cast<size_t>(b)] = b;
        mine[static_cast<size_t>(b)] = b < 34 ? b : 100 + b;
      }
      const std::vector<Segment> segments{{0, 40, 1080, shared},
                                          {40, 1, 543, std::span(mine).first(34)},
                                          {41, 1, 1000, std::span(mine).first(63)},
                                          {42, 17, 0, std::span(shared).first(2)},
                                          {59, 1, 1119, mine}};
      const AttentionPlan plan(shape, segments, threads);
      std::map<int64_t, std::vector<int32_t>> seen;  // by row
      for (const auto& tile : plan.tiles) {
        for (const auto& run : tile.runs) {
          for (int64_t t = run.token_begin; t < run.token_end; ++t) {
            auto& blocks = seen[tile.tokens[static_cast<size_t>(t)].row];
            for (int64_t b = run.first_block; b < run.end_block; ++b) {
              blocks.push_back(run.blocks[b]);
            }
          }
        }
      }
      for (const Segment& s : segments) {
        for (int64_t t = 0; t < s.row_count; ++t) {
          const auto& blocks = seen[s.row_begin + t];
          // In order, none twice, and all from the window's first to its own.
          CHECK_EQ((std::set<int32_t>(blocks.begin(), blocks.end()).size()), blocks.size());
          const int64_t position = s.position + t;
          for (int64_t b = shape.first_visible(position) / kKvBlock; b <= position / kKvBlock;
               ++b) {
            CHECK(std::count(blocks.begin(), blocks.end(), s.blocks[static_cast<size_t>(b)]) == 1);
          }
        }
      }
      std::set<std::pair<const void*, std::pair<int64_t, int64_t>>> items;
      for (const auto& item : plan.items) {
        items.insert({item.tile, {item.kv_head, item.chunk}});
      }
      CHECK_EQ(items.size(), plan.items.size());
      CHECK((threads > 1 || plan.merges.empty()));
    }
  }
}

TEST_CASE("attention keeps infinities and nan where they belong") {
  ThreadPool pool(3);
  const AttentionShape shape = make_shape(1, 1, 4, 0);
  const auto set_key = [](Attention& a, int64_t token, float value) {
    for (int64_t i = 0; i < 4; ++i) a.qkv[static_cast<size_t>(token * 12 + 4 + i)] = value;
  };
  const auto make = [&](float query) {
    Attention a(shape, 1030, 3);
    for (int64_t t = 0; t < a.tokens; ++t) {
      for (int64_t i = 0; i < 4; ++i) a.qkv[static_cast<size_t>(t * 12 + i)] = query;
    }
    return a;
  };
  const auto is_nan = [](const Floats& out, int64_t row) {
    return std::isnan(out[static_cast<size_t>(row * 4)]);
  };
  // Scores of -inf in a whole chunk weigh nothing beside those of others, first or later.
  for (const int64_t dead : {0, 1}) {
    Attention a = make(1.0f);
    for (int64_t t = 512 * dead; t < 512 * (dead + 1); ++t) set_key(a, t, -kInf);
    const Floats out = a.whole(pool);
    CHECK_EQ(is_nan(out, 511), dead == 0);  // nothing else to see: no softmax
    CHECK(!is_nan(out, 1029));
    double sum = 0, mass = 0;  // by hand, over the rest
    for (int64_t t = 0; t < 1030; ++t) {
      if (t / 512 == dead) continue;
      const float* k = a.at(t, 1);
      const double e = std::exp(0.5 * (double{k[0]} + k[1] + k[2] + k[3]));
      mass += e;
      sum += e * a.at(t, 2)[0];
    }
    CHECK(std::abs(out[1029 * 4] - sum / mass) < 1e-5);
  }
  // A NaN spreads to who sees it and to nobody else; so does a score of +inf.
  for (const float bad : {NAN, kInf}) {
    Attention a = make(1.0f);
    set_key(a, 600, bad);
    const Floats out = a.whole(pool);
    CHECK(!is_nan(out, 599));
    for (const int64_t row : {600, 611, 1023, 1024, 1029}) CHECK(is_nan(out, row));
  }
}

TEST_CASE("halves are written rounded and never beyond their range") {
  ThreadPool pool(2);
  const AttentionShape shape = make_shape(1, 1, 9, 0);
  for (const int64_t tokens : {3, 50}) {  // by the caller alone, and by the pool
    for (const float value : {65519.0f, -65504.0f, 6e-8f, 1e-9f, -kInf, kInf, NAN, 0.1f}) {
      for (const int64_t at : {9, 17, 25, 26}) {  // lanes of K and of V, in vectors and past them
        Attention a(shape, tokens, 4, DType::kF16);
        a.qkv[static_cast<size_t>(27 * (tokens - 1) + at)] = value;
        a.write(0, tokens, pool);
        const int32_t block = a.blocks.back();
        const int64_t slot = (tokens - 1) % kKvBlock;
        const uint16_t bits = at < 18 ? a.kv.keys<uint16_t>(block, 0)[(at - 9) * kKvBlock + slot]
                                      : a.kv.values<uint16_t>(block, 0)[slot * 9 + at - 18];
        const float got = half_to_float(bits), expected = half_to_float(float_to_half(value));
        CHECK((got == expected || (std::isnan(got) && std::isnan(value))));
        CHECK_EQ(std::isinf(got), std::isinf(value));
      }
    }
    for (const float value : {65520.0f, -1e30f, std::numeric_limits<float>::max()}) {
      for (const int64_t at : {9, 26}) {
        Attention a(shape, tokens, 4, DType::kF16);
        a.qkv[static_cast<size_t>(27 * (tokens - 1) + at)] = value;
        CHECK_THROWS_WITH_AS((void)(a.write(0, tokens, pool)),
                             doctest::Contains("kv_dtype float16: expected keys"), NumericError);
        a.qkv[static_cast<size_t>(27 * (tokens - 1) + at - 9)] = value;  // the query may be larger
        if (at == 9) a.qkv[static_cast<size_t>(27 * (tokens - 1) + at)] = 1.0f;
        if (at == 9) a.write(0, tokens, pool);
      }
    }
  }
}

TEST_CASE("attention gradient by finite differences of the double reference") {
  ThreadPool pool(2);
  for (const int64_t window : {0, 6}) {
    const AttentionShape shape = make_shape(4, 2, 8, window);
    Attention a(shape, 19, 22);
    const Floats out = a.whole(pool);
    const Floats dout = normal(out.size(), 23);
    std::vector<int32_t> rows;
    for (int32_t t = 0; t < a.tokens; ++t) rows.push_back(t);
    const std::vector<SegmentRows> segments{{0, a.tokens, 0, rows}};
    Floats d(a.qkv.size(), 0.0f);
    Floats workspace(static_cast<size_t>(attention_backward_floats(shape, segments)));
    attention_backward(shape, a.qkv.data(), out.data(), dout.data(), segments, d.data(),
                       workspace.data(), pool);
    const auto loss = [&] {
      const Doubles y = a.plain<double>();
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dout[i];
      return sum;
    };
    for (size_t i = 5; i < a.qkv.size(); i += 41) {
      const float before = a.qkv[i];
      const float h = 1e-3f;  // truncation h^2 and rounding of the float inputs: 1e-5 together
      a.qkv[i] = before + h;
      const double up = loss();
      const float hi = a.qkv[i];
      a.qkv[i] = before - h;
      const double down = loss();
      const double step = double{hi} - a.qkv[i];
      a.qkv[i] = before;
      CHECK(std::abs((up - down) / step - d[i]) < 1e-4 * (1 + std::abs(d[i])));
    }
  }
}
