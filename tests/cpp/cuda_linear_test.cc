// linear of csrc/cuda on the CPU: its tiles by a block of fibers and its launcher, against float64
// and against one another to the bit, whichever tile the number of rows chooses.

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cuda/bodies/linear.h"
#include "cuda/ops.h"
#include "cuda/shared_library.h"
#include "host_block.h"
#include "numbers.h"

using namespace alignpro;
using namespace alignpro::cuda;

namespace {

constexpr int64_t kRank = 8;
constexpr float kScale = 0.5f;

template <typename T>
constexpr DType kDtype = sizeof(T) == 2 ? DType::kBF16 : DType::kF32;

// out = x W^T + kScale u up^T + bias + residual.
template <typename T>
struct Problem {
  int64_t rows, n, k;
  Tensor<T> x, w, u, up, bias, residual;

  Problem(int64_t rows_, int64_t n_, int64_t k_)
      : rows(rows_),
        n(n_),
        k(k_),
        x(make(rows * k, 1)),
        w(make(n * k, 2)),
        u(make(rows * kRank, 3)),
        up(make(n * kRank, 4)),
        bias(make(n, 5)),
        residual(make(rows * n, 6)) {}
  static Floats make(int64_t count, uint32_t seed) {
    return normal(static_cast<size_t>(count), seed);
  }

  Doubles expected(bool all) {
    const Floats xs = x.floats(), ws = w.floats(), us = u.floats(), ups = up.floats();
    const Floats bs = bias.floats(), rs = residual.floats();
    const auto dot = [](const Floats& a, int64_t m, const Floats& b, int64_t c, int64_t depth) {
      double sum = 0;
      for (int64_t i = 0; i < depth; ++i) {
        sum +=
            double{a[static_cast<size_t>(m * depth + i)]} * b[static_cast<size_t>(c * depth + i)];
      }
      return sum;
    };
    Doubles values;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = 0; c < n; ++c) {
        values.push_back(dot(xs, m, ws, c, k));
        if (!all) continue;
        values.back() += kScale * dot(us, m, ups, c, kRank) + bs[static_cast<size_t>(c)] +
                         rs[static_cast<size_t>(m * n + c)];
      }
    }
    return values;
  }

  // By tiles of the shape; `all`: with adapter, bias and residual.
  template <typename Shape, bool kAll>
  Floats by() {
    Tensor<T> out(static_cast<size_t>(rows * n));
    const Linear<T> args{{x.data(), k, rows, k},
                         {w.data(), k, n, k},
                         1.0f,
                         {u.data(), kRank, rows, kRank},
                         {up.data(), kRank, n, kRank},
                         kScale,
                         kAll ? bias.data() : nullptr,
                         {kAll ? residual.data() : nullptr, n},
                         {out.data(), n}};
    static uint32_t seed = 0;
    for (int64_t row = 0; row < rows; row += Shape::kRows) {
      for (int64_t column = 0; column < n; column += Shape::kColumns) {
        std::vector<Pack<uint32_t>> shared(kProductBytes<T, Shape> / 16);
        std::memset(shared.data(), 0xff, shared.size() * 16);
        HostBlock::run(Shape::kThreads, ++seed, [&](HostBlock& block) {
          linear_tile<Shape, kAll>(block, args, row, column, shared.data());
        });
      }
    }
    return out.floats();
  }

  // By the launcher, of `count` rows from `first` on.
  Floats launched(int64_t first, int64_t count) {
    const auto matrix = [](Tensor<T>& t, int64_t row, int64_t r, int64_t c) {
      return Matrix{t.data() + row * c, r, c, c, kDtype<T>};
    };
    Tensor<T> out(static_cast<size_t>(count * n));
    linear(matrix(x, first, count, k), matrix(w, 0, n, k),
           {.bias = bias.data(),
            .residual = matrix(residual, first, count, n),
            .lora_x = matrix(u, first, count, kRank),
            .lora_up = matrix(up, 0, n, kRank),
            .lora_scale = kScale},
           matrix(out, 0, count, n), nullptr);
    return out.floats();
  }
};

template <typename T>
double budget() {
  return sizeof(T) == 2 ? 3e-3 : kBudget;  // out is rounded to bfloat16
}

bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

// Every tile gives the bits of the wide one.
template <typename T, bool kAll>
void check_shapes(int64_t rows, int64_t n, int64_t k) {
  Problem<T> p(rows, n, k);
  const Floats wide = p.template by<WideTile, kAll>();
  CHECK(relative_error(wide, p.expected(kAll)) < budget<T>());
  CHECK(same(p.template by<Rows16, kAll>(), wide));
  CHECK(same(p.template by<Rows64, kAll>(), wide));
  CHECK(same(p.template by<Rows64Narrow, kAll>(), wide));
}

template <typename T>
void check_rows(int64_t n, int64_t k) {
  Problem<T> p(130, n, k);
  const Floats all = p.launched(0, p.rows);
  CHECK(relative_error(all, p.expected(true)) < budget<T>());
#if defined(__SANITIZE_ADDRESS__)
  constexpr int64_t kStep = 16;  // 1, 17, 33, ...: every tile
#else
  constexpr int64_t kStep = 1;
#endif
  for (int64_t count = 1; count <= p.rows; count += kStep) {
    const int64_t first = (count * 7) % (p.rows - count + 1);
    const Floats some = p.launched(first, count);
    CHECK(same_bits(some.data(), all.data() + first * n, some.size()));
  }
}

}  // namespace

TEST(every_tile_gives_the_same_bits) {
  check_shapes<float, true>(131, 72, 36);
  check_shapes<Bfloat16, true>(131, 72, 40);
  check_shapes<float, false>(3, 36, 420);      // slices go around the stages
  check_shapes<Bfloat16, false>(3, 40, 1096);  // and end inside a load
}

TEST(a_row_is_the_same_among_any_number_of_rows) {
  check_rows<float>(40, 20);
  check_rows<Bfloat16>(40, 24);
}

// 128 blocks and more of a shape: the launcher takes the larger.
TEST(wide_outputs_take_wide_tiles) {
  Problem<Bfloat16> p(66, 16392, 8);
  const Floats all = p.launched(0, p.rows);
  CHECK(relative_error(all, p.expected(true)) < budget<Bfloat16>());
  const Floats some = p.launched(1, 17);
  CHECK(same_bits(some.data(), all.data() + p.n, some.size()));
}

// Products too small for float32 leave a sum of -0, which the zeros behind a slice's end turn.
TEST(a_sum_of_minus_zero_is_zero) {
  Problem<float> p(1, 32, 16);
  for (int64_t i = 0; i < 16; ++i) p.x.data()[i] = 1e-30f;
  for (int64_t i = 0; i < 32 * 16; ++i) p.w.data()[i] = -1e-30f;
  for (const float v : p.by<WideTile, false>()) CHECK(v == 0.0f && !std::signbit(v));
  for (const float v : p.by<Rows16, false>()) CHECK(v == 0.0f && !std::signbit(v));
}

TEST(a_library_is_the_first_that_opens) {
  const SharedLibrary math("what", {"libnone.so.1", "libm.so.6"}, "");
  CHECK_EQ(math.symbol<double(double)>("cos")(0.0), 1.0);
  CHECK_THROWS(math.symbol<double(double)>("nothing"), Unavailable,
               "libm.so.6: expected a function nothing");
  CHECK_THROWS(SharedLibrary("what", {"libnone.so.1", "/nowhere/libm.so.6"}, "do this"),
               Unavailable, "what: not found, looked for libnone.so.1: ");
  CHECK_THROWS(SharedLibrary("what", {"/nowhere/libm.so.6"}, "do this"), Unavailable, "; do this");
}

CHECK_MAIN()
