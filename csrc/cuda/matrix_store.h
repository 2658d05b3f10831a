#pragma once

// Constant matrices on the device, uploaded row by row through pinned memory.

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <utility>

#include "alignpro/core/parallel.h"
#include "alignpro/ops/ops.h"

namespace alignpro::cuda {

class MatrixStore {
 public:
  // dtype: kF32 or kBF16. The pool, where there is one, converts rows; it may go after finish().
  MatrixStore(DType dtype, ThreadPool* pool, std::unique_ptr<ops::Ops> ops)
      : dtype_(dtype), pool_(pool), ops_(std::move(ops)), staging_(*ops_) {}

  // Writes row r's `cols` values in the store's dtype.
  using WriteRow = std::function<void(int64_t row, std::byte* out)>;
  ops::Matrix add(int64_t rows, int64_t cols, const WriteRow& write);
  // The values rounded to the dtype.
  const void* add(std::span<const float> values);
  const float* add_float32(std::span<const float> values);
  void finish();  // all of it has arrived

 private:
  void upload(void* to, int64_t rows, int64_t row_bytes, const WriteRow& write);
  void* take(int64_t bytes);

  DType dtype_;
  ThreadPool* pool_;
  const std::unique_ptr<ops::Ops> ops_;
  ops::HostBuffer staging_;
  std::deque<ops::Buffer> buffers_;
};

}  // namespace alignpro::cuda
