#include "alignpro/ops/op_counts.h"

#include <algorithm>
#include <vector>

namespace alignpro::ops {
namespace {

constexpr int64_t kFloat = sizeof(float);

}  // namespace

trace::Counts linear_counts(int64_t rows, const PackedMatrix& w, const Epilogue& epilogue,
                            std::span<const LowRankRows> updates) {
  trace::Counts counts{.rows = rows,
                       .flops = 2 * rows * w.rows() * w.cols(),
                       .bytes = w.bytes() + rows * (w.cols() + w.rows()) * kFloat};
  if (epilogue.bias != nullptr) counts.bytes += w.rows() * kFloat;
  if (epilogue.residual != nullptr) counts.bytes += rows * w.rows() * kFloat;
  for (const LowRankRows& rows_of : updates) {
    for (const LoraStack::Module& m : rows_of.update->modules) {
      const int64_t weights = m.rank * (w.cols() + m.outputs);
      counts.flops += 2 * (rows_of.row_end - rows_of.row_begin) * weights;
      counts.bytes += weights * kFloat;
    }
  }
  return counts;
}

// Square and add, scale, weigh.
trace::Counts rms_norm_counts(int64_t rows, int64_t cols) {
  return {.rows = rows, .flops = 4 * rows * cols, .bytes = (2 * rows + 1) * cols * kFloat};
}

trace::Counts mix_rows_counts(int64_t sums, int64_t terms, int64_t cols) {
  return {.rows = sums, .flops = 2 * terms * cols, .bytes = (terms + sums) * cols * kFloat};
}

// A pair of lanes turns by four products and two sums.
trace::Counts rope_counts(int64_t rows, int64_t heads, int64_t rotary_dim) {
  return {.rows = rows,
          .flops = 3 * rows * heads * rotary_dim,
          .bytes = rows * (2 * heads + 1) * rotary_dim * kFloat};
}

trace::Counts kv_write_counts(const AttentionShape& shape, int64_t writes, DType kv_dtype) {
  const int64_t elements = 2 * writes * shape.num_kv_heads * shape.head_dim;
  return {.rows = writes, .flops = 0, .bytes = elements * (kFloat + block_bytes(kv_dtype))};
}

trace::Counts attention_counts(const AttentionShape& shape, const AttentionPlan& plan,
                               DType kv_dtype) {
  int64_t pairs = 0;
  for (const auto& token : plan.tokens) {
    pairs += token.position + 1 - shape.first_visible(token.position);
  }
  std::vector<int32_t> blocks;
  for (const auto& run : plan.runs) {
    blocks.insert(blocks.end(), run.blocks + run.first_block, run.blocks + run.end_block);
  }
  std::sort(blocks.begin(), blocks.end());
  const int64_t read = std::unique(blocks.begin(), blocks.end()) - blocks.begin();
  const auto rows = static_cast<int64_t>(plan.tokens.size());
  return {
      .rows = rows,
      .flops = 4 * pairs * shape.num_heads * shape.head_dim,
      .bytes = 2 * read * kKvBlock * shape.num_kv_heads * shape.head_dim * block_bytes(kv_dtype) +
               2 * rows * shape.q_size() * kFloat};
}

// x / (1 + exp(-x)) * y
trace::Counts swiglu_counts(int64_t rows, int64_t cols) {
  return {.rows = rows, .flops = 5 * rows * cols, .bytes = 3 * rows * cols * kFloat};
}

// x / (1 + exp(-x (a + b x x))) * y
trace::Counts geglu_counts(int64_t rows, int64_t cols) {
  return {.rows = rows, .flops = 9 * rows * cols, .bytes = 3 * rows * cols * kFloat};
}

trace::Counts embedding_counts(int64_t rows, const PackedMatrix& table) {
  return {.rows = rows,
          .flops = 0,
          .bytes = rows * (table.bytes() / table.rows() + table.cols() * kFloat)};
}

trace::Counts head_sample_counts(int64_t rows, const PackedMatrix& head) {
  return {.rows = rows,
          .flops = 2 * rows * head.rows() * head.cols(),
          .bytes = head.bytes() + rows * head.cols() * kFloat};
}

}  // namespace alignpro::ops
