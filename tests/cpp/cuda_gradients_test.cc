// Gradients of csrc/cuda/ops.h as callers see them, on the CPU, beside the CPU's own ops.

#include <algorithm>
#include <cmath>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/ops/linear.h"
#include "alignpro/ops/rms_norm.h"
#include "alignpro/ops/rope.h"
#include "alignpro/ops/swiglu.h"
#include "cuda/ops.h"
#include "host_block.h"
#include "numbers.h"

using namespace alignpro;

namespace {

template <typename T>
cuda::Matrix matrix(Tensor<T>& t, int64_t rows, int64_t cols) {
  return {t.data(), rows, cols, cols, sizeof(T) == 2 ? DType::kBF16 : DType::kF32};
}

Floats some(int64_t count, uint32_t seed, float scale = 1.0f) {
  return normal(static_cast<size_t>(count), seed, scale);
}

// What the engine's float32 op gives for the same stored inputs.
template <typename T>
bool agree(Tensor<T>& got, const Floats& expected) {
  const double budget = sizeof(T) == 2 ? 4e-3 : 4e-6;
  return relative_error(got.floats(), Doubles(expected.begin(), expected.end())) < budget;
}

template <typename T>
void check_rows() {
  const int64_t rows = 5, n = 8 * 19;
  ThreadPool pool(1);
  Tensor<T> gate_up(some(rows * 2 * n, 1, 2.0f)), dh(some(rows * n, 2));
  Tensor<T> d_gate_up(static_cast<size_t>(rows * 2 * n));
  cuda::swiglu_backward(matrix(gate_up, rows, 2 * n), matrix(dh, rows, n),
                        matrix(d_gate_up, rows, 2 * n), nullptr);
  Floats expected(static_cast<size_t>(rows * 2 * n));
  ops::swiglu_backward(rows, n, gate_up.floats().data(), dh.floats().data(), expected.data(), pool);
  CHECK(agree(d_gate_up, expected));
  cuda::geglu_backward(matrix(gate_up, rows, 2 * n), matrix(dh, rows, n),
                       matrix(d_gate_up, rows, 2 * n), nullptr);
  ops::geglu_backward(rows, n, gate_up.floats().data(), dh.floats().data(), expected.data(), pool);
  CHECK(agree(d_gate_up, expected));

  Tensor<T> x(some(rows * n, 3, 3.0f)), weight(some(n, 4)), dy(some(rows * n, 5));
  Tensor<T> dx(some(rows * n, 6, 0.3f));
  Floats sum = dx.floats();
  ops::rms_norm_backward(rows, n, x.floats().data(), n, weight.floats().data(), 1e-3f,
                         dy.floats().data(), n, sum.data(), n, pool);
  cuda::rms_norm_backward(matrix(x, rows, n), weight.data(), 1e-3f, matrix(dy, rows, n),
                          matrix(dx, rows, n), nullptr);
  CHECK(agree(dx, sum));
}

// The heads' norms among qkv, and rows of a table that are read never, once and thrice.
template <typename T>
void check_rows_that_lie_apart() {
  const int64_t rows = 3, heads = 4, kv_heads = 2, d = 24, width = 8 * d, normed = 6;
  ThreadPool pool(1);
  Tensor<T> qkv(some(rows * width, 1, 3.0f)), d_qkv(some(rows * width, 2));
  Tensor<T> q_weight(some(d, 3)), k_weight(some(d, 4));
  const Floats x = qkv.floats(), dy = d_qkv.floats();
  Floats expected = dy;
  for (int64_t row = 0; row < rows; ++row) {
    std::fill_n(expected.data() + row * width, normed * d, 0.0f);
    const auto head_norm = [&](int64_t first, int64_t count, const Floats& weight) {
      const int64_t at = row * width + first * d;
      ops::rms_norm_backward(count, d, x.data() + at, d, weight.data(), 1e-3f, dy.data() + at, d,
                             expected.data() + at, d, pool);
    };
    head_norm(0, heads, q_weight.floats());
    head_norm(heads, kv_heads, k_weight.floats());
  }
  cuda::qk_norm_backward({heads, kv_heads, d, 0, 1.0f}, matrix(qkv, rows, width), q_weight.data(),
                         k_weight.data(), 1e-3f, matrix(d_qkv, rows, width), nullptr);
  CHECK(agree(d_qkv, expected));

  Tensor<float> d_out(some(5 * d, 5));
  Tensor<T> d_table(some(4 * d, 6));
  const std::vector<int32_t> begins = {0, 1, 1, 4, 5}, places = {3, 0, 2, 4, 1};
  cuda::embedding_backward(matrix(d_out, 5, d), begins.data(), places.data(), matrix(d_table, 4, d),
                           nullptr);
  Floats sums(static_cast<size_t>(4 * d));
  for (size_t row = 0; row < 4; ++row) {
    for (int32_t p = begins[row]; p < begins[row + 1]; ++p) {
      for (size_t i = 0; i < static_cast<size_t>(d); ++i) {
        sums[row * d + i] +=
            d_out.data()[static_cast<size_t>(places[static_cast<size_t>(p)]) * d + i];
      }
    }
  }
  CHECK(agree(d_table, sums));
}

template <typename T>
void check_rope() {
  const int64_t rows = 3, heads = 4, kv_heads = 2, d = 24, half = 8, width = 8 * d;
  ThreadPool pool(1);
  Tensor<T> d_qkv(some(rows * width, 1));
  Floats expected = d_qkv.floats();
  const Floats values = expected;
  const std::vector<int32_t> positions = {5, 0, 2};
  Floats cos, sin, row_cos, row_sin;
  for (int64_t i = 0; i < 6 * half; ++i) {
    cos.push_back(std::cos(0.3f * static_cast<float>(i)));
    sin.push_back(std::sin(0.3f * static_cast<float>(i)));
  }
  for (const int32_t p : positions) {
    for (int64_t i = 0; i < half; ++i) {
      row_cos.push_back(cos[static_cast<size_t>(p * half + i)]);
      row_sin.push_back(-sin[static_cast<size_t>(p * half + i)]);
    }
  }
  ops::rope(rows, expected.data(), width, heads + kv_heads, d, 2 * half, row_cos.data(),
            row_sin.data(), pool);
  cuda::rope_backward({heads, kv_heads, d, 0, 1.0f}, matrix(d_qkv, rows, width), 2 * half,
                      cos.data(), sin.data(), positions.data(), nullptr);
  CHECK(agree(d_qkv, expected));
  for (int64_t row = 0; row < rows; ++row) {  // values keep theirs
    const int64_t at = row * width + (heads + kv_heads) * d;
    CHECK(same_bits(d_qkv.floats().data() + at, values.data() + at, kv_heads * d));
  }
}

// rows of one adapter among others: a range of rows, and a module's columns of two.
template <typename T>
void check_linear(int64_t rows, int64_t n, int64_t k, int64_t rank) {
  ThreadPool pool(1);
  const float scale = 0.5f;
  Tensor<T> dy(some(rows * n, 1)), w(some(n * k, 2, 0.2f)), a(some(rank * k, 3, 0.2f));
  Tensor<T> b(some(n * rank, 4, 0.2f)), residual(some(rows * k, 5)), x(some(rows * k, 6));
  Tensor<T> low(some(rows * rank, 7)), d_low(static_cast<size_t>(rows * rank));
  Tensor<T> dx(static_cast<size_t>(rows * k)), low_alone(static_cast<size_t>(rows * rank));
  cuda::LinearBackwardExtras extras{matrix(residual, rows, k), matrix(a, rank, k),
                                    matrix(b, n, rank), matrix(d_low, rows, rank), scale};
  cuda::linear_backward(matrix(dy, rows, n), matrix(w, n, k), extras, matrix(dx, rows, k), nullptr);

  const Floats up = dy.floats(), rest = residual.floats();
  Floats to_low(static_cast<size_t>(rows * rank)), expected(static_cast<size_t>(rows * k));
  const auto packed = ops::PackedMatrix::pack(n, k, w.floats().data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < rank; ++c) {
      double sum = 0;
      for (int64_t o = 0; o < n; ++o) {
        sum += double{up[static_cast<size_t>(r * n + o)]} * to_float(b.data()[o * rank + c]);
      }
      to_low[static_cast<size_t>(r * rank + c)] = static_cast<float>(scale * sum);
    }
  }
  CHECK(agree(d_low, to_low));
  // From the d_low that was stored.
  const Floats quantized_low = d_low.floats();
  ops::linear_backward(rows, {up.data(), n}, packed, expected.data(), k, {.residual = rest.data()},
                       pool);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      double sum = expected[static_cast<size_t>(r * k + c)];
      for (int64_t i = 0; i < rank; ++i) {
        sum += double{quantized_low[static_cast<size_t>(r * rank + i)]} *
               to_float(a.data()[i * k + c]);
      }
      expected[static_cast<size_t>(r * k + c)] = static_cast<float>(sum);
    }
  }
  CHECK(agree(dx, expected));
  extras.d_lora_down = matrix(low_alone, rows, rank);
  extras.residual = {};
  cuda::linear_backward(matrix(dy, rows, n), {}, extras, {}, nullptr);
  CHECK(same_bits(low_alone.floats().data(), quantized_low.data(), quantized_low.size()));

  // The gradients of rows from 1 on, of the module with the last 8 ranks and outputs from 8 on.
  const int64_t live = rows - 1, outputs = n - 8;
  const auto part = [&](Tensor<T>& t, int64_t width, int64_t first, int64_t cols) {
    cuda::Matrix m = matrix(t, live, cols);
    m.data = t.data() + width + first;
    m.ld = width;
    return m;
  };
  Tensor<float> d_a(static_cast<size_t>(8 * k)), d_b(static_cast<size_t>(outputs * 8));
  const cuda::LoraBackwardInput in{part(x, k, 0, k), part(low, rank, rank - 8, 8),
                                   part(dy, n, 8, outputs), part(d_low, rank, rank - 8, 8), scale};
  Tensor<float> workspace(static_cast<size_t>(cuda::lora_backward_bytes(live, k, outputs, 8) / 4));
  cuda::lora_backward(in, matrix(d_a, 8, k), matrix(d_b, outputs, 8), workspace.data(), nullptr);
  const Floats xs = x.floats(), lows = low.floats();
  Floats to_a(static_cast<size_t>(8 * k)), transposed(static_cast<size_t>(8 * outputs));
  ops::matmul(8, k, live, {quantized_low.data() + rank + rank - 8, 1, rank}, xs.data() + k, k,
              to_a.data(), k, {}, pool);
  ops::matmul(8, outputs, live, {lows.data() + rank + rank - 8, 1, rank}, up.data() + n + 8, n,
              transposed.data(), outputs, {.scale = scale}, pool);
  Floats to_b(transposed.size());
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < 8; ++i) {
      to_b[static_cast<size_t>(o * 8 + i)] = transposed[static_cast<size_t>(i * outputs + o)];
    }
  }
  const auto near = [](Tensor<float>& got, const Floats& truth) {
    return relative_error(got.floats(), Doubles(truth.begin(), truth.end())) < 4e-6;
  };
  CHECK(near(d_a, to_a));
  CHECK(near(d_b, to_b));
}

}  // namespace

TEST_CASE("gradients of row ops are the cpus") {
  check_rows<float>();
  check_rows<Bfloat16>();
}

TEST_CASE("gradients of rows that lie apart are the cpus") {
  check_rows_that_lie_apart<float>();
  check_rows_that_lie_apart<Bfloat16>();
}

TEST_CASE("rope turns back") {
  check_rope<float>();
  check_rope<Bfloat16>();
}

TEST_CASE("gradients of linear layers and adapters are the cpus") {
  check_linear<float>(7, 40, 24, 8);
  check_linear<Bfloat16>(135, 48, 136, 16);
  check_linear<float>(1030, 16, 12, 8);  // more than a chunk of rows
}
