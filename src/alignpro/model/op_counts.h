#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "alignpro/core/dtype.h"
#include "alignpro/core/trace.h"
#include "alignpro/model/batch.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/ops/attention.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/packed_matrix.h"

// What the ops of a forward compute and move, by count, for trace spans. A function (exp, rsqrt)
// is one operation. Bytes are those an op cannot do without: each operand once.
namespace alignpro::model {

// By LinearSite.
inline constexpr std::array<const char*, 4> kLinearNames = {"linear qkv", "linear o",
                                                            "linear gate_up", "linear down"};

// W x for all rows and the low-rank update of those with an adapter that has one.
trace::Counts linear_counts(int64_t rows, const ops::PackedMatrix& w, const ops::Epilogue& epilogue,
                            std::span<const AdapterRange> adapters, int64_t layer, LinearSite site);
trace::Counts rms_norm_counts(int64_t rows, int64_t cols);
trace::Counts rope_counts(int64_t rows, int64_t heads, int64_t rotary_dim);
trace::Counts kv_write_counts(const ops::AttentionShape& shape, int64_t writes, DType kv_dtype);
// Every block of K and V once, however many sequences share it.
trace::Counts attention_counts(const ops::AttentionShape& shape, const ops::AttentionPlan& plan,
                               DType kv_dtype);
trace::Counts swiglu_counts(int64_t rows, int64_t cols);
trace::Counts embedding_counts(int64_t rows, const ops::PackedMatrix& table);
trace::Counts head_sample_counts(int64_t rows, const ops::PackedMatrix& head);

}  // namespace alignpro::model
