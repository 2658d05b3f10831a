#include "alignpro/ops/embedding.h"

#include "alignpro/ops/row_parallel.h"

namespace alignpro::ops {

void embedding(const PackedMatrix& table, std::span<const int32_t> tokens, float* out,
               ThreadPool& pool) {
  row_parallel(static_cast<int64_t>(tokens.size()), table.cols(), pool, [&](int64_t row) {
    table.read_row(tokens[static_cast<size_t>(row)], out + row * table.cols());
  });
}

}  // namespace alignpro::ops
