#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::ops {

// out [tokens, table.cols] = scale times rows of the table [vocab, cols]. Tokens must lie below
// vocab; rows of those below 0 are left as they are.
void embedding(const PackedMatrix& table, std::span<const int32_t> tokens, float scale, float* out,
               ThreadPool& pool);

// A soft prompt (Lester et al. 2021): rows [m, cols] that stand among embedded tokens, where the
// token -1 - r names row r. Fills those rows of out [tokens, cols]; the others are left.
void soft_rows(const float* soft, int64_t cols, std::span<const int32_t> tokens, float* out);
// d_soft [m, cols] is overwritten: each row by the sum of d_out's rows that named it, in order.
void soft_rows_backward(std::span<const int32_t> tokens, int64_t cols, const float* d_out,
                        int64_t m, float* d_soft);

}  // namespace alignpro::ops
