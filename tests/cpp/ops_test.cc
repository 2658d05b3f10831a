// Every op against a float64 reference written plainly here, on awkward shapes; rows independent of
// their neighbours and of the pool, to the bit.
// Long because the references are the specification, and an op's sits beside its cases.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numbers>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/core/rng.h"
#include "alignpro/ops/cpu/panel_layout.h"
#include "alignpro/ops/embedding.h"
#include "alignpro/ops/head_sample.h"
#include "alignpro/ops/int8_rows.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/logprob_output.h"
#include "alignpro/ops/machine_limits.h"
#include "alignpro/ops/matrix_view.h"
#include "alignpro/ops/packed_matrix.h"
#include "alignpro/ops/packed_rows.h"
#include "alignpro/ops/quantized_matrix.h"
#include "alignpro/ops/quantized_panel.h"
#include "alignpro/ops/rms_norm.h"
#include "alignpro/ops/rope.h"
#include "alignpro/ops/row_parallel.h"
#include "alignpro/ops/swiglu.h"
#include "alignpro/ops/vocabulary.h"
#include "alignpro/ops/weight_tiles.h"
#include "numbers.h"
#include "quantized_rows.h"

using namespace alignpro;
using namespace alignpro::ops;

namespace {

Doubles product(const Floats& x, const Floats& w, int64_t m, int64_t n, int64_t k) {
  Doubles y(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < k; ++c) {
        sum += double{x[static_cast<size_t>(i * k + c)]} * w[static_cast<size_t>(j * k + c)];
      }
      y[static_cast<size_t>(i * n + j)] = sum;
    }
  }
  return y;
}

struct Shape {
  int64_t m, n, k;
};
const std::vector<Shape> kShapes = {{1, 1, 1},       {1, 111, 48},  {7, 16, 192},
                                    {252, 507, 123}, {97, 33, 385}, {500, 40, 17}};

}  // namespace

TEST_CASE("linear matches double") {
  ThreadPool pool(2);
  for (const auto& [m, n, k] : kShapes) {
    const Floats x = normal(static_cast<size_t>(m * k), 1),
                 w = normal(static_cast<size_t>(n * k), 2);
    const Floats bias = normal(static_cast<size_t>(n), 3);
    const Floats residual = normal(static_cast<size_t>(m * n), 4);
    const PackedMatrix packed = PackedMatrix::pack(n, k, w.data());
    Floats y(static_cast<size_t>(m * n), NAN);
    linear(m, {x.data(), k}, packed, y.data(), n,
           {.scale = 0.5f, .bias = bias.data(), .residual = residual.data()}, pool);
    Doubles truth = product(x, w, m, n, k);
    for (size_t i = 0; i < truth.size(); ++i) {
      truth[i] = 0.5 * truth[i] + bias[i % static_cast<size_t>(n)] + residual[i];
    }
    CHECK(relative_error(y, truth) < kBudget);
  }
}

TEST_CASE("linear backward matches double") {
  ThreadPool pool(2);
  for (const auto& [m, n, k] : kShapes) {
    const Floats dy = normal(static_cast<size_t>(m * n), 5),
                 w = normal(static_cast<size_t>(n * k), 6);
    Floats transposed(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < k; ++c) {
        transposed[static_cast<size_t>(c * n + i)] = w[static_cast<size_t>(i * k + c)];
      }
    }
    Floats dx(static_cast<size_t>(m * k), NAN);
    linear_backward(m, {dy.data(), n}, PackedMatrix::pack(n, k, w.data()), dx.data(), k, {}, pool);
    CHECK(relative_error(dx, product(dy, transposed, m, k, n)) < kBudget);
  }
}

TEST_CASE("matmul of a transposed view matches double") {
  ThreadPool pool(2);
  const int64_t rows = 300, rank = 5, width = 37;  // dA = dLow^T x
  const Floats low = normal(rows * rank, 7), x = normal(rows * width, 8);
  Floats out(rank * width, NAN);
  matmul(rank, width, rows, {low.data(), 1, rank}, x.data(), width, out.data(), width, {}, pool);
  Doubles truth(rank * width);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        truth[static_cast<size_t>(i * width + j)] +=
            double{low[static_cast<size_t>(r * rank + i)]} * x[static_cast<size_t>(r * width + j)];
      }
    }
  }
  CHECK(relative_error(out, truth) < kBudget);
}

TEST_CASE("linear rows do not depend on neighbours or threads") {
  const int64_t m = 203, n = 67, k = 400;
  const Floats x = normal(m * k, 9), w = normal(n * k, 10);
  const PackedMatrix packed = PackedMatrix::pack(n, k, w.data());
  ThreadPool one(1), two(2);
  Floats all(m * n), all_two(m * n), single(n), back(m * k), back_single(k);
  linear(m, {x.data(), k}, packed, all.data(), n, {}, one);
  linear(m, {x.data(), k}, packed, all_two.data(), n, {}, two);
  linear_backward(m, {all.data(), n}, packed, back.data(), k, {}, two);
  CHECK(same_bits(all.data(), all_two.data(), all.size()));
  for (const int64_t row : {int64_t{0}, int64_t{95}, int64_t{96}, int64_t{202}}) {
    linear(1, {x.data() + row * k, k}, packed, single.data(), n, {}, two);
    CHECK(same_bits(single.data(), all.data() + row * n, n));
    linear_backward(1, {all.data() + row * n, n}, packed, back_single.data(), k, {}, one);
    CHECK(same_bits(back_single.data(), back.data() + row * k, k));
  }
}

// Whatever the storage, products have the bits of the same values in float32, one row or many.
void check_storage(std::span<const QuantizedRow> rows, int64_t cols) {
  ThreadPool pool(2);
  const auto n = static_cast<int64_t>(rows.size());
  Floats values(static_cast<size_t>(n * cols));
  for (int64_t row = 0; row < n; ++row) {
    const QuantizedRow& from = rows[static_cast<size_t>(row)];
    dequantize(from.dtype, from.data, cols, values.data() + row * cols);
  }
  const PackedMatrix packed = PackedMatrix::pack(rows, cols, pool);
  const PackedMatrix wide = PackedMatrix::pack(n, cols, values.data());
  CHECK(packed.bytes() <= wide.bytes() + 64 * packed.panels());
  Floats row(static_cast<size_t>(cols));
  for (int64_t i = 0; i < n; ++i) {
    packed.read_row(i, row.data());
    CHECK(std::equal(row.begin(), row.end(), values.begin() + i * cols));
  }
  const int64_t m = 17;
  const Floats x = normal(static_cast<size_t>(m * cols), 5),
               dy = normal(static_cast<size_t>(m * n), 6);
  Floats y(static_cast<size_t>(m * n)), y_wide = y, some;
  Floats dx(static_cast<size_t>(m * cols)), dx_wide = dx;
  linear(m, {x.data(), cols}, packed, y.data(), n, {}, pool);
  linear(m, {x.data(), cols}, wide, y_wide.data(), n, {}, pool);
  CHECK(same_bits(y.data(), y_wide.data(), y.size()));
  for (const int64_t few : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}) {  // packed or not
    for (int64_t i = 0; i + few <= m; ++i) {
      some.resize(static_cast<size_t>(few * n));
      linear(few, {x.data() + i * cols, cols}, packed, some.data(), n, {}, pool);
      CHECK(same_bits(some.data(), y.data() + i * n, some.size()));
    }
  }
  linear_backward(m, {dy.data(), n}, packed, dx.data(), cols, {}, pool);
  linear_backward(m, {dy.data(), n}, wide, dx_wide.data(), cols, {}, pool);
  CHECK(same_bits(dx.data(), dx_wide.data(), dx.size()));
}

TEST_CASE("a short panel is zero where it has no rows") {
  const auto bytes = quantized_rows(DType::kQ5_K, 3, 256, 1);
  std::vector<std::byte> panel(static_cast<size_t>(cpu::panel_bytes(DType::kQ5_K, 256)),
                               std::byte{0xff});
  pack_quantized_panel(DType::kQ5_K, rows_in(DType::kQ5_K, bytes, 256), 256, panel.data());
  Floats wide(256 * 16, NAN);
  cpu::kernels().expand_panel(DType::kQ5_K, panel.data(), 256, 0, 256, wide.data());
  for (size_t i = 0; i < wide.size(); ++i) CHECK((i % 16 < 3 || wide[i] == 0.0f));
}

TEST_CASE("every storage format multiplies like its values") {
  for (const DType dtype : kAllTypes) {
    for (const int64_t blocks : {1, 3}) {
      const int64_t cols = block_values(dtype) == 1 ? 57 * blocks : 256 * blocks;
      for (const int64_t n : {1, 37, 64}) {
        const auto bytes = quantized_rows(dtype, n, cols, static_cast<uint32_t>(n + blocks));
        check_storage(rows_in(dtype, bytes, cols), cols);
      }
    }
  }
}

// x quantised in groups of 32 by a scale of its largest magnitude / 127, in double.
std::vector<double> quantised(std::span<const float> x) {
  std::vector<double> out;
  for (size_t g = 0; g < x.size(); g += 32) {
    float most = 0.0f;
    for (size_t i = 0; i < 32; ++i) most = std::max(most, std::abs(x[g + i]));
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f, scale = most / 127.0f;
    for (size_t i = 0; i < 32; ++i) out.push_back(std::nearbyint(x[g + i] * inverse) * scale);
  }
  return out;
}

// Integer products against double: the weights that the matrix itself reads back, times rows
// quantised apart; and a row's bits do not depend on the others.
TEST_CASE("integer products match double") {
  for (const DType dtype : kAllTypes) {
    const int64_t cols = 512, m = 7;
    for (const int64_t n : {1, 40}) {
      const auto bytes = quantized_rows(dtype, n, cols, static_cast<uint32_t>(n));
      const auto rows = rows_in(dtype, bytes, cols);
      ThreadPool pool(2);
      const PackedMatrix packed = PackedMatrix::pack(rows, cols, pool, Arithmetic::kInt8);
      const Floats x = normal(static_cast<size_t>(m * cols), 8);
      Floats y(static_cast<size_t>(m * n)), one(static_cast<size_t>(n)), w(512), stored(512);
      linear(m, {x.data(), cols}, packed, y.data(), n, {}, pool);
      for (int64_t row = 0; row < n; ++row) {
        packed.read_row(row, w.data());
        dequantize(dtype, rows[static_cast<size_t>(row)].data, cols, stored.data());
        for (size_t g = 0; g < w.size(); g += 32) {
          float most = 0.0f, worst = 0.0f;
          for (size_t i = g; i < g + 32; ++i) {
            most = std::max(most, std::abs(stored[i]));
            worst = std::max(worst, std::abs(stored[i] - w[i]));
          }
          // Kept as they stand, or within half a step of Q8_0 (and its scale's half precision).
          CHECK(worst <= (cpu::is_quantized(dtype) ? 0.0f : most * 0.0045f));
        }
        for (int64_t i = 0; i < m; ++i) {
          const auto codes = quantised({x.data() + i * cols, static_cast<size_t>(cols)});
          double expected = 0.0, size = 0.0;
          for (size_t k = 0; k < codes.size(); ++k) {
            expected += codes[k] * w[k];
            size += std::abs(codes[k] * w[k]);
          }
          CHECK(std::abs(y[static_cast<size_t>(i * n + row)] - expected) <= 1e-5 * size);
        }
      }
      for (int64_t i = 0; i < m; ++i) {
        linear(1, {x.data() + i * cols, cols}, packed, one.data(), n, {}, pool);
        CHECK(same_bits(one.data(), y.data() + i * n, one.size()));
      }
    }
  }
}

// Sums of the largest codes of either sign, which narrow integers must hold.
TEST_CASE("integer products hold the largest codes") {
  const int64_t cols = 256, n = 16;
  ThreadPool pool(1);
  for (const DType dtype : kAllTypes) {
    for (const std::byte fill : {std::byte{0xff}, std::byte{0x7f}, std::byte{0x00}}) {
      if (dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16) continue;
      const auto bytes = quantized_rows(dtype, n, cols, 1, fill);
      const PackedMatrix packed =
          PackedMatrix::pack(rows_in(dtype, bytes, cols), cols, pool, Arithmetic::kInt8);
      for (const float sign : {1.0f, -1.0f}) {
        const Floats x(static_cast<size_t>(cols), 127.0f * sign);
        Floats y(static_cast<size_t>(n)), w(static_cast<size_t>(cols));
        linear(1, {x.data(), cols}, packed, y.data(), n, {}, pool);
        for (int64_t row = 0; row < n; ++row) {
          packed.read_row(row, w.data());
          double expected = 0.0, size = 0.0;
          for (const float value : w) {
            expected += 127.0 * sign * value;
            size += std::abs(127.0 * value);
          }
          CHECK(std::abs(y[static_cast<size_t>(row)] - expected) <= 1e-5 * size + 1e-5);
        }
      }
    }
  }
}

TEST_CASE("integer products refuse what they cannot do") {
  ThreadPool pool(1);
  const auto bytes = quantized_rows(DType::kF32, 2, 33, 1);
  CHECK_THROWS_WITH_AS(
      (void)(PackedMatrix::pack(rows_in(DType::kF32, bytes, 33), 33, pool, Arithmetic::kInt8)),
      doctest::Contains("multiples of 32"), InvalidArgument);
  const auto even = quantized_rows(DType::kF32, 2, 32, 1);
  const PackedMatrix packed =
      PackedMatrix::pack(rows_in(DType::kF32, even, 32), 32, pool, Arithmetic::kInt8);
  for (const float bad : {NAN, INFINITY, 1e7f}) {
    auto broken = even;
    std::memcpy(broken.data() + 20, &bad, sizeof bad);
    CHECK_THROWS_WITH_AS(
        (void)(PackedMatrix::pack(rows_in(DType::kF32, broken, 32), 32, pool, Arithmetic::kInt8)),
        doctest::Contains("expected finite weights"), InvalidArgument);
  }
  Floats x(32, 1.0f), y(2);
  CHECK_THROWS_WITH_AS((void)(linear_backward(1, {y.data(), 2}, packed, x.data(), 32, {}, pool)),
                       doctest::Contains("gradients"), InvalidArgument);
  for (const float bad : {NAN, INFINITY}) {
    x[7] = bad;
    linear(1, {x.data(), 32}, packed, y.data(), 2, {}, pool);
    CHECK((!std::isfinite(y[0]) && !std::isfinite(y[1])));
  }
}

TEST_CASE("halves round to the nearest") {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = half_to_float(half), next = half_to_float(static_cast<uint16_t>(bits + 1));
    CHECK((float_to_half(value) == half && float_to_half(-value) == (half | 0x8000)));
    if (bits + 1 == 0x7c00) break;
    const float middle = value + (next - value) / 2;
    CHECK(float_to_half(std::nextafterf(middle, 0.0f)) == half);
    CHECK(float_to_half(middle) == (bits % 2 == 0 ? bits : bits + 1));
    CHECK(float_to_half(std::nextafterf(middle, INFINITY)) == bits + 1);
  }
  CHECK((float_to_half(65520.0f) == 0x7c00 && float_to_half(65519.0f) == 0x7bff));
  CHECK(std::isnan(half_to_float(float_to_half(NAN))));
}

TEST_CASE("a matrix may change its format between and within panels") {
  const int64_t cols = 512;
  std::vector<std::vector<std::byte>> parts;
  std::vector<QuantizedRow> rows;
  for (const DType dtype : {DType::kQ4_K, DType::kQ6_K, DType::kQ3_K, DType::kF16}) {
    parts.push_back(quantized_rows(dtype, 40, cols, 3));
    for (const QuantizedRow& row : rows_in(dtype, parts.back(), cols)) rows.push_back(row);
  }
  check_storage(rows, cols);
}

TEST_CASE("packing rows equals packing a matrix") {
  ThreadPool pool(2);
  const int64_t n = 37, k = 11;
  const Floats w = normal(n * k, 11);
  const PackedMatrix a = PackedMatrix::pack(n, k, w.data());
  std::vector<QuantizedRow> rows;
  for (int64_t row = 0; row < n; ++row) {
    rows.push_back({reinterpret_cast<const std::byte*>(w.data() + row * k), DType::kF32});
  }
  const PackedMatrix b = PackedMatrix::pack(rows, k, pool);
  for (int64_t p = 0; p < a.panels(); ++p) {
    CHECK(same_bits(a.block(p, 0, k, nullptr), b.block(p, 0, k, nullptr),
                    static_cast<size_t>(k * 16)));
  }
  const std::vector<int32_t> tokens = {36, 0, 17};
  Floats out(3 * k);
  embedding(a, tokens, 1.0f, out.data(), pool);
  for (size_t i = 0; i < tokens.size(); ++i) {
    CHECK(same_bits(out.data() + i * k, w.data() + tokens[i] * k, k));
  }
  embedding(a, tokens, 6.9f, out.data(), pool);
  CHECK((out[0] == 6.9f * w[36 * k] && out[3 * k - 1] == 6.9f * w[18 * k - 1]));
}

TEST_CASE("rms norm and its gradient") {
  ThreadPool pool(2);
  const int64_t rows = 3, n = 45;
  const float eps = 1e-5f;
  const Floats x = normal(rows * n, 12), w = normal(n, 13), dy = normal(rows * n, 14);
  Floats y(rows * n, NAN), dx(rows * n, 0.0f);
  rms_norm(rows, n, x.data(), n, w.data(), eps, y.data(), n, pool);
  rms_norm_backward(rows, n, x.data(), n, w.data(), eps, dy.data(), n, dx.data(), n, pool);
  Doubles truth(rows * n), gradient(rows * n);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, pull = 0;
    for (int64_t i = 0; i < n; ++i) mean += std::pow(x[static_cast<size_t>(r * n + i)], 2) / n;
    const double f = 1 / std::sqrt(mean + double{eps});
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(r * n + i);
      truth[at] = x[at] * f * w[static_cast<size_t>(i)];
      pull += double{dy[at]} * w[static_cast<size_t>(i)] * x[at] * f * f / n;
    }
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(r * n + i);
      gradient[at] = f * (double{dy[at]} * w[static_cast<size_t>(i)] - x[at] * pull);
    }
  }
  CHECK(relative_error(y, truth) < kBudget);
  CHECK(relative_error(dx, gradient) < kBudget);
  Floats stream = dy;  // in its place
  rms_norm_add(rows, n, x.data(), n, w.data(), eps, stream.data(), n, stream.data(), n, pool);
  for (size_t i = 0; i < y.size(); ++i) CHECK_EQ(stream[i], dy[i] + y[i]);
}

// gate(x): a gate's value and derivative.
template <typename Forward, typename Backward, typename Gate>
void check_glu(const Forward& forward, const Backward& backward, const Gate& gate) {
  ThreadPool pool(2);
  const int64_t rows = 2, n = 13;
  Floats gate_up = normal(rows * 2 * n, 15, 3.0f);
  gate_up[0] = -120.0f;  // the gate underflows, nothing overflows
  gate_up[1] = 120.0f;
  const Floats dh = normal(rows * n, 16);
  Floats h(rows * n, NAN), d(rows * 2 * n, NAN);
  forward(rows, n, gate_up.data(), h.data(), pool);
  backward(rows, n, gate_up.data(), dh.data(), d.data(), pool);
  Doubles truth(rows * n), gradient(rows * 2 * n);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const double u = gate_up[static_cast<size_t>(r * 2 * n + n + i)];
      const auto [value, slope] = gate(double{gate_up[static_cast<size_t>(r * 2 * n + i)]});
      const double dv = dh[static_cast<size_t>(r * n + i)];
      truth[static_cast<size_t>(r * n + i)] = value * u;
      gradient[static_cast<size_t>(r * 2 * n + i)] = dv * u * slope;
      gradient[static_cast<size_t>(r * 2 * n + n + i)] = dv * value;
    }
  }
  CHECK(relative_error(h, truth) < kBudget);
  CHECK(relative_error(d, gradient) < kBudget);
}

TEST_CASE("geglu and its gradient") {
  check_glu(geglu, geglu_backward, [](double g) {
    const double c = std::sqrt(2 / std::numbers::pi);
    const double t = std::tanh(c * (g + 0.044715 * g * g * g));
    const double slope = (1 - t * t) * c * (1 + 3 * 0.044715 * g * g);
    return std::pair(g * (1 + t) / 2, (1 + t + g * slope) / 2);
  });
}

TEST_CASE("swiglu and its gradient") {
  check_glu(swiglu, swiglu_backward, [](double g) {
    const double s = 1 / (1 + std::exp(-g));
    return std::pair(g * s, s * (1 + g * (1 - s)));
  });
}

TEST_CASE("rope turns and turns back") {
  ThreadPool pool(1);
  const int64_t rows = 2, heads = 3, d = 10, rotary = 6;
  const Floats x = normal(rows * heads * d, 17), angle = normal(rows * rotary / 2, 18);
  Floats cos(angle), sin(angle), minus(angle), y(x);
  for (size_t i = 0; i < angle.size(); ++i) {
    cos[i] = std::cos(angle[i]);
    sin[i] = std::sin(angle[i]);
    minus[i] = -sin[i];
  }
  rope(rows, y.data(), heads * d, heads, d, rotary, cos.data(), sin.data(), pool);
  const size_t at = (1 * heads + 2) * d;  // row 1, head 2
  CHECK(std::abs(y[at + 1] - (x[at + 1] * cos[4] - x[at + 4] * sin[4])) < 1e-6);
  CHECK(std::abs(y[at + 4] - (x[at + 4] * cos[4] + x[at + 1] * sin[4])) < 1e-6);
  CHECK_EQ(y[at + 6], x[at + 6]);  // past rotary_dim nothing turns
  rope(rows, y.data(), heads * d, heads, d, rotary, cos.data(), minus.data(), pool);
  CHECK(relative_error(y, Doubles(x.begin(), x.end())) < kBudget);
}

// ---- the vocabulary ----------------------------------------------------------------------------

namespace {

struct Vocabulary {
  int64_t rows, vocab, cols;
  Floats hidden, ref, weight;
  PackedMatrix packed;
  std::vector<int32_t> tokens;
  float temperature;
  Floats logprob, entropy, kl, reverse_kl, ref_logprob;
  Doubles lse, ref_lse;

  Vocabulary(int64_t r, int64_t v, int64_t c, float t, float offset = 0.0f)
      : rows(r),
        vocab(v),
        cols(c),
        hidden(normal(static_cast<size_t>(r * c), 31)),
        ref(hidden),
        weight(normal(static_cast<size_t>(v * c), 33, 0.4f)),
        temperature(t) {
    const Floats noise = normal(ref.size(), 32, 0.2f);
    for (size_t i = 0; i < ref.size(); ++i) ref[i] += noise[i];
    if (offset != 0.0f) {  // a common offset on all logits: one more column, constant in the weight
      for (int64_t m = 0; m < rows; ++m) {
        hidden[static_cast<size_t>(m * cols)] = ref[static_cast<size_t>(m * cols)] = offset;
      }
      for (int64_t n = 0; n < vocab; ++n) weight[static_cast<size_t>(n * cols)] = 1.0f;
    }
    packed = PackedMatrix::pack(vocab, cols, weight.data());
    for (int64_t m = 0; m < rows; ++m) tokens.push_back(static_cast<int32_t>((m * 37 + 5) % vocab));
    for (Floats* f : {&logprob, &entropy, &kl, &reverse_kl, &ref_logprob}) {
      f->assign(static_cast<size_t>(rows), NAN);
    }
    lse = ref_lse = Doubles(static_cast<size_t>(rows), NAN);
  }
  LogprobInput in(bool with_ref = true) const {
    return {.rows = rows,
            .hidden = hidden.data(),
            .weight = &packed,
            .tokens = tokens,
            .temperature = temperature,
            .ref_hidden = with_ref ? ref.data() : nullptr};
  }
  LogprobInput stored_in() const {
    LogprobInput input = in();
    input.weight = QuantizedMatrix{reinterpret_cast<const std::byte*>(weight.data()), DType::kF32,
                                   vocab, cols};
    return input;
  }
  LogprobOutput out() {
    return {logprob.data(),     entropy.data(), kl.data(),     reverse_kl.data(),
            ref_logprob.data(), lse.data(),     ref_lse.data()};
  }
  // log softmax of every row
  Doubles log_softmax(const Floats& h) const {
    Doubles z = product(h, weight, rows, vocab, cols);
    for (int64_t m = 0; m < rows; ++m) {
      double* row = z.data() + m * vocab;
      double top = -INFINITY, sum = 0;
      for (int64_t v = 0; v < vocab; ++v) top = std::max(top, row[v] /= temperature);
      for (int64_t v = 0; v < vocab; ++v) sum += std::exp(row[v] - top);
      for (int64_t v = 0; v < vocab; ++v) row[v] -= top + std::log(sum);
    }
    return z;
  }
};

}  // namespace

TEST_CASE("linear logprob matches double") {
  ThreadPool pool(2);
  for (const auto& [rows, vocab, cols, temperature] :
       {std::tuple{1, 1, 8, 1.0f}, std::tuple{3, 111, 48, 1.0f}, std::tuple{101, 1000, 61, 0.7f},
        std::tuple{490, 513, 33, 1.3f}}) {
    Vocabulary v(rows, vocab, cols, temperature);
    linear_logprob(v.in(), v.out(), nullptr, pool);
    const Doubles logp = v.log_softmax(v.hidden), logq = v.log_softmax(v.ref);
    Doubles lp, h, kl, reverse, lq, tv;
    for (int64_t m = 0; m < v.rows; ++m) {
      double entropy = 0, divergence = 0, back = 0, variation = 0;
      for (int64_t i = 0; i < v.vocab; ++i) {
        const auto at = static_cast<size_t>(m * v.vocab + i);
        entropy -= std::exp(logp[at]) * logp[at];
        divergence += std::exp(logp[at]) * (logp[at] - logq[at]);
        back += std::exp(logq[at]) * (logq[at] - logp[at]);
        variation += std::max(0.0, std::exp(logp[at]) - std::exp(logq[at]));
      }
      const auto at = static_cast<size_t>(m * v.vocab + v.tokens[static_cast<size_t>(m)]);
      lp.push_back(logp[at]);
      lq.push_back(logq[at]);
      h.push_back(entropy);
      kl.push_back(divergence);
      reverse.push_back(back);
      tv.push_back(variation);
    }
    Floats measured(static_cast<size_t>(rows)), above(measured.size());
    total_variation(v.in(), v.out(), measured.data(), above.data(), pool);
    if (vocab == 1) {
      CHECK_EQ(v.logprob[0], 0.0f);
      CHECK_EQ(v.kl[0], 0.0f);
      continue;
    }
    CHECK(relative_error(v.logprob, lp) < kBudget);
    CHECK(relative_error(v.ref_logprob, lq) < kBudget);
    CHECK(relative_error(v.entropy, h) < kBudget);
    CHECK(relative_error(v.kl, kl) < 2e-5);  // a difference of numbers a hundred times as large
    CHECK(relative_error(v.reverse_kl, reverse) < 2e-5);
    CHECK(relative_error(measured, tv) < 1e-5);
    CHECK(*std::max_element(v.logprob.begin(), v.logprob.end()) <= 0.0f);
  }
}

TEST_CASE("linear logprob survives a common offset") {
  ThreadPool pool(1);
  Vocabulary v(5, 300, 16, 1.0f, 1e4f);
  linear_logprob(v.in(), v.out(), nullptr, pool);
  const Doubles logp = v.log_softmax(v.hidden);
  for (int64_t m = 0; m < v.rows; ++m) {
    const double truth = logp[static_cast<size_t>(m * v.vocab + v.tokens[static_cast<size_t>(m)])];
    // float32 logits near 1e4 are spaced by 1e-3: that, and no more, is lost.
    CHECK(std::abs(v.logprob[static_cast<size_t>(m)] - truth) < 4e-3);
  }
}

TEST_CASE("kl to itself is zero to the bit") {
  ThreadPool pool(2);
  Vocabulary v(33, 700, 40, 0.8f);
  v.ref = v.hidden;
  linear_logprob(v.in(), v.out(), nullptr, pool);
  for (const float kl : v.kl) CHECK_EQ(kl, 0.0f);
  CHECK(same_bits(v.logprob.data(), v.ref_logprob.data(), v.logprob.size()));
}

TEST_CASE("linear logprob backward matches double") {
  ThreadPool pool(2), one(1);
  for (const auto& [rows, vocab, cols, temperature] :
       {std::tuple{3, 111, 48, 1.0f}, std::tuple{130, 600, 35, 0.7f},
        std::tuple{300, 300, 20, 1.3f}}) {
    Vocabulary v(rows, vocab, cols, temperature);
    LogprobOutput out = v.out();
    Floats by_logprob(v.hidden.size(), NAN), by_kl(v.hidden.size(), NAN);
    const LogprobJacobian jacobian{by_logprob.data(), by_kl.data()};
    linear_logprob(v.in(), out, &jacobian, pool);
    const Floats with_jacobian = v.logprob;
    linear_logprob(v.in(), out, nullptr, pool);
    CHECK(same_bits(with_jacobian.data(), v.logprob.data(), v.logprob.size()));
    Floats tv(static_cast<size_t>(rows)), above(tv.size());
    total_variation(v.in(), out, tv.data(), above.data(), pool);

    std::array<Floats, 5> d;
    for (size_t i = 0; i < d.size(); ++i) d[i] = normal(static_cast<size_t>(rows), 41 + i);
    const LogprobUpstream upstream{d[0].data(), d[1].data(), d[2].data(),
                                   d[3].data(), d[4].data(), above.data()};
    const Doubles logp = v.log_softmax(v.hidden), logq = v.log_softmax(v.ref);
    Doubles truth(v.hidden.size(), 0.0), weight_truth(v.weight.size(), 0.0);
    for (int64_t m = 0; m < rows; ++m) {
      const auto r = static_cast<size_t>(m);
      double entropy = 0, kl = 0, mass = 0;
      for (int64_t i = 0; i < vocab; ++i) {
        const auto at = static_cast<size_t>(m * vocab + i);
        entropy -= std::exp(logp[at]) * logp[at];
        kl += std::exp(logp[at]) * (logp[at] - logq[at]);
        if (logp[at] > logq[at]) mass += std::exp(logp[at]);
      }
      for (int64_t i = 0; i < vocab; ++i) {
        const auto at = static_cast<size_t>(m * vocab + i);
        const double p = std::exp(logp[at]), q = std::exp(logq[at]);
        const double dz = (d[0][r] * ((i == v.tokens[r]) - p) - d[1][r] * p * (logp[at] + entropy) +
                           d[2][r] * p * (logp[at] - logq[at] - kl) + d[3][r] * (p - q) +
                           d[4][r] * p * ((p > q) - mass)) /
                          temperature;
        for (int64_t c = 0; c < cols; ++c) {
          truth[static_cast<size_t>(m * cols + c)] +=
              dz * v.weight[static_cast<size_t>(i * cols + c)];
          weight_truth[static_cast<size_t>(i * cols + c)] +=
              dz * v.hidden[static_cast<size_t>(m * cols + c)];
        }
      }
    }
    // Through the forward's Jacobian, by computing the tiles again, and from the weight as it lies
    // in memory.
    Floats first_weight;
    for (const LogprobJacobian* through :
         {&jacobian, static_cast<const LogprobJacobian*>(nullptr)}) {
      for (const LogprobInput& in : {v.in(), v.stored_in()}) {
        Floats dh(v.hidden.size(), NAN), dw(v.weight.size(), NAN);
        linear_logprob_backward(in, out, through, upstream, dh.data(), dw.data(), pool);
        CHECK(relative_error(dh, truth) < 5e-6);
        CHECK(relative_error(dw, weight_truth) < 5e-6);
        Floats again(dh.size(), NAN), weight_again(dw.size(), NAN);
        linear_logprob_backward(in, out, through, upstream, again.data(), weight_again.data(), one);
        CHECK(same_bits(dh.data(), again.data(), dh.size()));
        CHECK(same_bits(dw.data(), weight_again.data(), dw.size()));
        if (first_weight.empty()) first_weight = dw;
        CHECK(same_bits(dw.data(), first_weight.data(), dw.size()));
      }
    }
  }
}

TEST_CASE("one hot rows keep their divergence") {
  ThreadPool pool(1);
  Vocabulary v(2, 300, 2, 1.0f);
  std::fill(v.weight.begin(), v.weight.end(), 0.0f);
  v.weight[2 * 7] = 1.0f;        // token 7 reads the first hidden value
  v.weight[2 * 270 + 1] = 1.0f;  // token 270 the second, in another tile
  v.hidden = {1000.0f, 0.0f, 1000.0f, 0.0f};
  v.ref = {0.0f, 1000.0f, 0.0f, 1000.0f};
  v.tokens = {7, 270};
  linear_logprob(v.stored_in(), v.out(), nullptr, pool);
  CHECK_EQ(v.logprob[0], 0.0f);
  CHECK_EQ(v.logprob[1], -1000.0f);
  CHECK_EQ(v.kl[0], 1000.0f);
  CHECK_EQ(v.reverse_kl[0], 1000.0f);
  CHECK_EQ(v.ref_logprob[0], -1000.0f);
}

TEST_CASE("what the vocabulary op allocates is bounded") {
  Vocabulary v(1000, 5000, 64, 1.0f);
  const int64_t jacobian = linear_logprob_bytes(v.in(), true, 2);
  const int64_t values = linear_logprob_bytes(v.in(), false, 2);
  CHECK((jacobian > 0 && values > 0));
  CHECK(linear_logprob_bytes(v.in(), true, 1) < jacobian);
  CHECK(jacobian < 1000 * 5000 * 4);  // nothing of rows x vocab
  CHECK(values < 1000 * 5000 * 4);
  CHECK(linear_logprob_bytes(v.stored_in(), true, 2) > jacobian);  // weight_tiles.h packs
}

TEST_CASE("linear logprob refuses nan") {
  ThreadPool pool(2);
  Vocabulary v(4, 300, 16, 1.0f);
  v.hidden[16 * 2] = NAN;
  CHECK_THROWS_WITH_AS((void)(linear_logprob(v.in(false), v.out(), nullptr, pool)),
                       doctest::Contains("row 2"), NumericError);
}

TEST_CASE("machine limits are positive") {
  ThreadPool pool(1);
  CHECK(fma_peak_gflops(pool) > 0.1);
  CHECK(read_bandwidth_gbps(pool) > 0.01);
}

// ---- sampling ----------------------------------------------------------------------------------

TEST_CASE("sampled logprob is the scored one to the bit") {
  ThreadPool pool(2), one(1);
  for (const float temperature : {0.7f, 1.0f, 1.3f}) {
    Vocabulary v(70, 1000, 61, temperature);
    std::vector<SampleRow> requests(70);
    for (size_t i = 0; i < requests.size(); ++i) {
      requests[i].temperature = temperature;
      requests[i].uniform = keyed_uniform(3, 0, static_cast<uint32_t>(i));
      if (i % 3 == 1) requests[i].top_k = 40;
      if (i % 3 == 2) requests[i].top_p = 0.9f;
    }
    std::vector<SampledToken> drawn(70), single(1);
    head_sample(v.packed, v.hidden.data(), requests, drawn, pool);
    for (size_t i = 0; i < drawn.size(); ++i) v.tokens[i] = drawn[i].token;
    linear_logprob(v.in(), v.out(), nullptr, pool);
    for (size_t i = 0; i < drawn.size(); ++i) {
      CHECK_EQ(drawn[i].logprob, v.logprob[i]);
      head_sample(v.packed, v.hidden.data() + static_cast<int64_t>(i) * v.cols, {&requests[i], 1},
                  single, one);
      CHECK_EQ(single[0].token, drawn[i].token);
      CHECK_EQ(single[0].logprob, drawn[i].logprob);
      CHECK_EQ(single[0].kept_mass, drawn[i].kept_mass);
    }
  }
}

TEST_CASE("sampling follows the distribution") {
  ThreadPool pool(2);
  Vocabulary v(1, 400, 12, 1.0f);
  const int draws = 20000;
  Floats hidden;
  for (int i = 0; i < 200; ++i) hidden.insert(hidden.end(), v.hidden.begin(), v.hidden.end());
  std::vector<double> counts(400, 0.0);
  for (int batch = 0; batch < draws / 200; ++batch) {
    std::vector<SampleRow> rows(200);
    for (int i = 0; i < 200; ++i) {
      rows[static_cast<size_t>(i)].uniform =
          keyed_uniform(11, 0, static_cast<uint32_t>(batch * 200 + i));
    }
    std::vector<SampledToken> out(200);
    head_sample(v.packed, hidden.data(), rows, out, pool);
    for (const SampledToken& t : out) counts[static_cast<size_t>(t.token)] += 1;
  }
  const Doubles logp = v.log_softmax(v.hidden);
  double chi = 0, rest_expected = 0, rest = 0;
  int cells = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const double expected = draws * std::exp(logp[i]);
    if (expected < 10) {
      rest_expected += expected;
      rest += counts[i];
      continue;
    }
    chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++cells;
  }
  chi += (rest - rest_expected) * (rest - rest_expected) / std::max(rest_expected, 1.0);
  // Chi-square with `cells` degrees: mean cells, deviation sqrt(2 cells); fixed seed, 4 deviations.
  CHECK(cells > 20);
  CHECK(std::abs(chi - cells) < 4 * std::sqrt(2.0 * cells));
}

TEST_CASE("truncation keeps what it says") {
  ThreadPool pool(1);
  Vocabulary v(1, 300, 12, 1.0f);
  const Doubles logp = v.log_softmax(v.hidden);
  std::vector<std::pair<double, int>> order;
  for (int i = 0; i < 300; ++i) order.push_back({-logp[static_cast<size_t>(i)], i});
  std::sort(order.begin(), order.end());
  const auto seen = [&](SampleRow row) {
    std::map<int, float> kept;
    for (uint32_t i = 0; i < 400; ++i) {
      row.uniform = keyed_uniform(5, 0, i);
      SampledToken out;
      head_sample(v.packed, v.hidden.data(), {&row, 1}, {&out, 1}, pool);
      kept[out.token] = out.kept_mass;
    }
    return kept;
  };
  SampleRow top_k;
  top_k.top_k = 3;
  double mass = 0;
  for (int i = 0; i < 3; ++i) mass += std::exp(-order[static_cast<size_t>(i)].first);
  for (const auto& [token, kept] : seen(top_k)) {
    CHECK((token == order[0].second || token == order[1].second || token == order[2].second));
    CHECK(std::abs(kept - mass) < 1e-5);
  }
  SampleRow top_p;
  top_p.top_p = 0.5f;
  double needed = 0;
  size_t count = 0;
  while (needed < 0.5) needed += std::exp(-order[count++].first);
  const auto nucleus = seen(top_p);
  CHECK(nucleus.size() <= count);
  CHECK(std::abs(nucleus.begin()->second - needed) < 1e-5);
  SampleRow min_p;
  min_p.min_p = 0.5f;
  for (const auto& [token, kept] : seen(min_p)) {
    CHECK(logp[static_cast<size_t>(token)] >= -order[0].first + std::log(0.5) - 1e-6);
    CHECK(kept <= 1.0f);
  }
  const std::vector<int32_t> banned = {order[0].second};
  SampleRow ban;
  ban.temperature = 0.0f;
  ban.banned = banned;
  const auto second = seen(ban);
  CHECK_EQ(second.begin()->first, order[1].second);
}

// Over many tiles, of which those without a likely token are passed over: top-k, then top-p of it,
// then min-p, and the inversion in token order, all in double.
TEST_CASE("truncation over many tiles matches double") {
  ThreadPool pool(2);
  const int64_t vocab = 5000;
  Vocabulary v(70, vocab, 24, 1.0f);
  const std::vector<int32_t> banned = {3, 700, 4999};
  std::vector<SampleRow> rows;
  for (const int32_t top_k : {0, 1, 5, 19, 60, 4000}) {
    for (const float top_p : {1.0f, 0.999f, 0.95f, 0.3f}) {
      for (const float min_p : {0.0f, 0.01f, 0.4f}) {
        SampleRow row;
        row.temperature = rows.size() % 2 == 0 ? 1.0f : 0.6f;
        row.top_k = top_k;
        row.top_p = top_p;
        row.min_p = min_p;
        if (rows.size() % 5 == 4) row.banned = banned;
        row.uniform = keyed_uniform(9, 0, static_cast<uint32_t>(rows.size()));
        if (rows.size() < 70) rows.push_back(row);
      }
    }
  }
  std::vector<SampledToken> drawn(rows.size());
  head_sample(v.packed, v.hidden.data(), rows, drawn, pool);
  const Doubles logits = product(v.hidden, v.weight, v.rows, vocab, v.cols);
  for (size_t r = 0; r < rows.size(); ++r) {
    const SampleRow& row = rows[r];
    std::vector<std::pair<double, int32_t>> kept;
    double total = 0.0;
    for (int64_t t = 0; t < vocab; ++t) {
      const double p = std::exp(logits[r * vocab + static_cast<size_t>(t)] / row.temperature);
      total += p;
      if (std::find(row.banned.begin(), row.banned.end(), t) == row.banned.end()) {
        kept.push_back({-p, static_cast<int32_t>(t)});
      }
    }
    std::sort(kept.begin(), kept.end());
    if (row.top_k > 0) kept.resize(std::min<size_t>(kept.size(), row.top_k));
    const auto mass = [&] {
      double sum = 0.0;
      for (const auto& [p, token] : kept) sum -= p;
      return sum;
    };
    const double wanted = row.top_p * mass();
    double sum = 0.0;
    size_t count = 0;
    while (count < kept.size() && (row.top_p == 1.0f || sum < wanted)) sum -= kept[count++].first;
    kept.resize(count);
    const double floor = row.min_p * -kept.front().first;
    std::erase_if(kept, [&](const auto& c) { return -c.first < floor; });
    std::sort(kept.begin(), kept.end(), [](auto a, auto b) { return a.second < b.second; });
    const double of_all = mass() / total, at = row.uniform * mass();
    double below = 0.0;
    size_t token = 0;
    while ((below -= kept[token].first) <= at) ++token;
    CHECK_EQ(drawn[r].token, kept[token].second);
    CHECK(std::abs(drawn[r].kept_mass - of_all) < 1e-5);
    CHECK(std::abs(drawn[r].logprob - std::log(-kept[token].first / total)) < 1e-4);
  }
}

TEST_CASE("penalties change what is drawn, and not the log-probability") {
  ThreadPool pool(1);
  Vocabulary v(1, 300, 12, 1.0f);
  const double temperature = 0.8;
  const Doubles logits = product(v.hidden, v.weight, 1, 300, 12);
  std::vector<Penalty> penalties;
  Doubles changed;  // exponentials, by token
  double model = 0, total = 0;
  for (int i = 0; i < 300; ++i) {
    double z = logits[static_cast<size_t>(i)];
    model += std::exp(z / temperature);
    if (i % 2 == 1) {
      penalties.push_back({i, 1.5f, 0.25f * static_cast<float>(i % 7)});
      z = (z > 0 ? z / 1.5 : z * 1.5) - 0.25 * (i % 7);
    }
    changed.push_back(std::exp(z / temperature));
    total += changed.back();
  }
  const std::vector<int32_t> banned = {10, 11};
  const double left = total - changed[10] - changed[11];
  changed[10] = changed[11] = 0;
  SampleRow row;
  row.temperature = static_cast<float>(temperature);
  row.penalties = penalties;
  row.banned = banned;
  for (int draw = 0; draw < 200; ++draw) {
    row.uniform = (draw + 0.5) / 200;
    SampledToken out;
    head_sample(v.packed, v.hidden.data(), {&row, 1}, {&out, 1}, pool);
    double sum = 0;  // by inversion in token order
    size_t expected = 0;
    while ((sum += changed[expected]) <= row.uniform * left) ++expected;
    CHECK_EQ(out.token, static_cast<int32_t>(expected));
    CHECK(std::abs(out.logprob - (logits[expected] / temperature - std::log(model))) < 1e-5);
    CHECK(std::abs(out.kept_mass - left / total) < 1e-5);
  }
}

TEST_CASE("greedy takes the lowest id on a tie and nan has no token") {
  ThreadPool pool(1);
  const int64_t vocab = 600, cols = 4;
  Floats weight(static_cast<size_t>(vocab * cols), 0.0f);
  weight[300 * 4] = weight[290 * 4] = weight[599 * 4] = 2.0f;
  PackedMatrix packed = PackedMatrix::pack(vocab, cols, weight.data());
  Floats hidden = {1, 0, 0, 0};
  SampleRow row;
  row.temperature = 0.0f;
  SampledToken out;
  head_sample(packed, hidden.data(), {&row, 1}, {&out, 1}, pool);
  CHECK_EQ(out.token, 290);
  hidden[0] = NAN;
  head_sample(packed, hidden.data(), {&row, 1}, {&out, 1}, pool);
  CHECK_EQ(out.token, -1);
  hidden[0] = -INFINITY;  // -inf for the three, NaN (0 * inf) for the rest
  head_sample(packed, hidden.data(), {&row, 1}, {&out, 1}, pool);
  CHECK_EQ(out.token, -1);
}

TEST_CASE("a row that cannot be drawn fails alone") {
  ThreadPool pool(2);
  Vocabulary v(40, 1000, 61, 1.0f);
  std::vector<int32_t> all(1000);
  std::iota(all.begin(), all.end(), 0);
  std::vector<SampleRow> rows(40);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].temperature = i % 5 == 1 ? 0.0f : 0.7f;
    rows[i].uniform = keyed_uniform(3, 0, static_cast<uint32_t>(i));
    if (i % 4 == 1) rows[i].top_k = 40;
    if (i % 4 == 2) rows[i].min_p = 0.1f;
    if (i % 7 == 2) rows[i].banned = std::span(all).first(990);
  }
  std::vector<SampledToken> before(40), after(40);
  head_sample(v.packed, v.hidden.data(), rows, before, pool);
  for (size_t i = 0; i < rows.size(); i += 3) {
    float* hidden = v.hidden.data() + static_cast<int64_t>(i) * v.cols;
    if (i % 4 == 0) hidden[5] = NAN;
    if (i % 4 == 1) hidden[5] = INFINITY;
    if (i % 4 == 2) rows[i].temperature = 1e-38f;
    if (i % 4 == 3) rows[i].banned = all;
  }
  head_sample(v.packed, v.hidden.data(), rows, after, pool);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i % 3 == 0) {
      CHECK_EQ(after[i].token, -1);
      continue;
    }
    CHECK(after[i].token >= 0);
    CHECK_EQ(after[i].token, before[i].token);
    CHECK_EQ(after[i].logprob, before[i].logprob);
    CHECK_EQ(after[i].kept_mass, before[i].kept_mass);
  }
}

TEST_CASE("minus infinity is an ordinary logit") {
  ThreadPool pool(1);
  const int64_t vocab = 300;
  Floats weight(static_cast<size_t>(vocab), 0.0f);
  for (int64_t i = 0; i < vocab; ++i)
    weight[static_cast<size_t>(i)] = i == 7 || i == 270 ? 1.0f : 3e38f;
  PackedMatrix packed = PackedMatrix::pack(vocab, 1, weight.data());
  const Floats hidden = {-3.0f};
  for (uint32_t i = 0; i < 50; ++i) {
    SampleRow row;
    row.uniform = keyed_uniform(1, 0, i);
    if (i % 2 == 1) row.top_p = 0.99f;
    SampledToken out;
    head_sample(packed, hidden.data(), {&row, 1}, {&out, 1}, pool);
    CHECK((out.token == 7 || out.token == 270));
    CHECK(std::abs(out.logprob + std::log(2.0f)) < 1e-6f);
  }
}

TEST_CASE("row parallel visits every row once") {
  ThreadPool pool(2);
  std::vector<int> seen(1000, 0);
  row_parallel(1000, 1000, pool, [&](int64_t row) { ++seen[static_cast<size_t>(row)]; });
  CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
}
