#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/dtype.h"
#include "alignpro/core/trace.h"
#include "alignpro/ops/attention.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/packed_matrix.h"

// What the ops of a forward compute and move, by count, for trace spans. A function (exp, rsqrt)
// is one operation. Bytes are those an op cannot do without: each operand once.
namespace alignpro::ops {

// W x for all rows and the low-rank update of those with an adapter that has one.
trace::Counts linear_counts(int64_t rows, const PackedMatrix& w, const Epilogue& epilogue,
                            std::span<const LowRankRows> updates);
trace::Counts rms_norm_counts(int64_t rows, int64_t cols);
trace::Counts mix_rows_counts(int64_t sums, int64_t terms, int64_t cols);
trace::Counts rope_counts(int64_t rows, int64_t heads, int64_t rotary_dim);
trace::Counts kv_write_counts(const AttentionShape& shape, int64_t writes, DType kv_dtype);
// Every block of K and V once, however many sequences share it.
trace::Counts attention_counts(const AttentionShape& shape, const AttentionPlan& plan,
                               DType kv_dtype);
trace::Counts swiglu_counts(int64_t rows, int64_t cols);
trace::Counts geglu_counts(int64_t rows, int64_t cols);
trace::Counts embedding_counts(int64_t rows, const PackedMatrix& table);
trace::Counts head_sample_counts(int64_t rows, const PackedMatrix& head);

}  // namespace alignpro::ops
