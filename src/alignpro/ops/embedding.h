#pragma once

#include <cstdint>
#include <span>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::ops {

// out [tokens, table.cols] = rows of the table [vocab, cols]. Tokens must lie in [0, vocab).
void embedding(const PackedMatrix& table, std::span<const int32_t> tokens, float* out,
               ThreadPool& pool);

}  // namespace alignpro::ops
