// linear of csrc/cuda on the CPU: its tiles, which its gradient takes too, by a block of fibers and
// its launcher, against float64 and against one another to the bit, whichever tile the number of
// rows chooses.

#include <cmath>
#include <cstring>
#include <vector>

#include <doctest/doctest.h>
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
#if defined(__SANITIZE_ADDRESS__)  // fibers take twenty times as long there
constexpr int64_t kRowStep = 40;
#else
constexpr int64_t kRowStep = 1;
#endif

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

  // By tiles of the shape, of `count` rows from `first` on; `all`: with adapter, bias and residual.
  template <typename Shape, bool kAll>
  Floats by(int64_t first, int64_t count) {
    Tensor<T> out(static_cast<size_t>(count * n));
    const Linear<T> args{{x.data() + first * k, k, count, k},
                         {w.data(), k, n, k},
                         1.0f,
                         {u.data() + first * kRank, kRank, count, kRank},
                         {up.data(), kRank, n, kRank},
                         kScale,
                         kAll ? bias.data() : nullptr,
                         {kAll ? residual.data() + first * n : nullptr, n},
                         {out.data(), n}};
    static uint32_t seed = 0;
    for (int64_t row = 0; row < count; row += Shape::kRows) {
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
  const Floats wide = p.template by<WideTile, kAll>(0, rows);
  CHECK(relative_error(wide, p.expected(kAll)) < budget<T>());
  CHECK(same(p.template by<Rows16, kAll>(0, rows), wide));
  CHECK(same(p.template by<Rows64, kAll>(0, rows), wide));
  CHECK(same(p.template by<Rows64Narrow, kAll>(0, rows), wide));
}

template <typename T>
void check_rows(int64_t n, int64_t k) {
  Problem<T> p(130, n, k);
  const Floats all = p.launched(0, p.rows);
  CHECK(relative_error(all, p.expected(true)) < budget<T>());
  for (int64_t count = 1; count <= p.rows; count += kRowStep) {
    const int64_t first = (count * 7) % (p.rows - count + 1);
    const auto check = [&](const Floats& some) {
      CHECK((some.size() == static_cast<size_t>(count * n) &&
             same_bits(some.data(), all.data() + first * n, some.size())));
    };
    check(p.launched(first, count));
    if (count % 8 != 1) continue;
    check(p.template by<Rows64, true>(first, count));
    check(p.template by<Rows64Narrow, true>(first, count));
  }
}

// dx = x W + u up + residual, W and up read across: what linear_backward launches.
template <typename T, typename Shape>
Floats backward_by(Problem<T>& p) {
  Tensor<T> out(static_cast<size_t>(p.rows * p.n));
  const Linear<T, true> args{{p.x.data(), p.k, p.rows, p.k},
                             {p.w.data(), p.n, p.n, p.k},
                             1.0f,
                             {p.u.data(), kRank, p.rows, kRank},
                             {p.up.data(), p.n, p.n, kRank},
                             1.0f,
                             nullptr,
                             {p.residual.data(), p.n},
                             {out.data(), p.n}};
  static uint32_t seed = 0;
  for (int64_t row = 0; row < p.rows; row += Shape::kRows) {
    for (int64_t column = 0; column < p.n; column += Shape::kColumns) {
      std::vector<Pack<uint32_t>> shared(kProductBytes<T, Shape, true> / 16);
      std::memset(shared.data(), 0xff, shared.size() * 16);
      HostBlock::run(Shape::kThreads, ++seed, [&](HostBlock& block) {
        linear_tile<Shape, true>(block, args, row, column, shared.data());
      });
    }
  }
  return out.floats();
}

template <typename T>
void check_backward(int64_t rows, int64_t n, int64_t k) {
  Problem<T> p(rows, n, k);
  const Floats wide = backward_by<T, WideTile>(p);
  CHECK(same(backward_by<T, Rows16>(p), wide));
  CHECK(same(backward_by<T, Rows64>(p), wide));
  CHECK(same(backward_by<T, Rows64Narrow>(p), wide));
  const Floats xs = p.x.floats(), ws = p.w.floats(), us = p.u.floats(), ups = p.up.floats();
  const Floats rs = p.residual.floats();
  Doubles expected;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < n; ++c) {
      double sum = rs[static_cast<size_t>(m * n + c)];
      for (int64_t i = 0; i < k; ++i) {
        sum += double{xs[static_cast<size_t>(m * k + i)]} * ws[static_cast<size_t>(i * n + c)];
      }
      for (int64_t i = 0; i < kRank; ++i) {
        sum += double{us[static_cast<size_t>(m * kRank + i)]} * ups[static_cast<size_t>(i * n + c)];
      }
      expected.push_back(sum);
    }
  }
  CHECK(relative_error(wide, expected) < budget<T>());
}

}  // namespace

TEST_CASE("every tile gives the same bits") {
  check_shapes<float, true>(131, 72, 36);
  check_shapes<Bfloat16, true>(131, 72, 40);
  check_shapes<float, false>(3, 36, 420);      // slices go around the stages
  check_shapes<Bfloat16, false>(3, 40, 1096);  // and end inside a load
}

TEST_CASE("every tile gives a gradient the same bits") {
  check_backward<float>(70, 72, 36);
  check_backward<Bfloat16>(70, 72, 40);
  check_backward<float>(3, 36, 420);
  check_backward<Bfloat16>(3, 40, 1096);
}

TEST_CASE("a row is the same among any number of rows") {
  check_rows<float>(40, 20);
  check_rows<Bfloat16>(40, 24);
}

// Of so many columns 66 rows take Rows64Narrow, Rows64 and WideTile, 17 one of 64 rows, 5 Rows16.
TEST_CASE("the launcher covers outputs by every tile") {
  for (const int64_t n : {2056, 8200, 16392}) {
    Problem<Bfloat16> p(66, n, 8);
    const Floats all = p.launched(0, p.rows);
    CHECK(relative_error(all, p.expected(true)) < budget<Bfloat16>());
    for (const int64_t count : {17, 5}) {
      const Floats some = p.launched(1, count);
      CHECK(same_bits(some.data(), all.data() + n, some.size()));
    }
    if (kRowStep > 1) break;
  }
}

// Products too small for float32 leave a sum of -0, which the zeros behind a slice's end turn.
TEST_CASE("a sum of minus zero is zero") {
  Problem<float> p(1, 32, 16);
  for (int64_t i = 0; i < 16; ++i) p.x.data()[i] = 1e-30f;
  for (int64_t i = 0; i < 32 * 16; ++i) p.w.data()[i] = -1e-30f;
  for (const float v : p.by<WideTile, false>(0, 1)) CHECK((v == 0.0f && !std::signbit(v)));
  for (const float v : p.by<Rows16, false>(0, 1)) CHECK((v == 0.0f && !std::signbit(v)));
}

TEST_CASE("a library is the first that opens") {
  const SharedLibrary math("what", {"libnone.so.1", "libm.so.6"}, "");
  CHECK_EQ(math.symbol<double(double)>("cos")(0.0), 1.0);
  CHECK_THROWS_WITH_AS((void)(math.symbol<double(double)>("nothing")),
                       doctest::Contains("libm.so.6: expected a function nothing"), Unavailable);
  CHECK_THROWS_WITH_AS(
      (void)(SharedLibrary("what", {"libnone.so.1", "/nowhere/libm.so.6"}, "do this")),
      doctest::Contains("what: not found, looked for libnone.so.1: "), Unavailable);
  CHECK_THROWS_WITH_AS((void)(SharedLibrary("what", {"/nowhere/libm.so.6"}, "do this")),
                       doctest::Contains("; do this"), Unavailable);
}
