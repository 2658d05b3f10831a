#pragma once

// Constant matrices on the device, uploaded row by row through pinned memory.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "alignpro/core/parallel.h"
#include "runtime.h"

namespace alignpro::cuda {

class MatrixStore {
 public:
  // dtype: kF32 or kBF16. The pool, where there is one, converts rows; it may go after finish().
  MatrixStore(DType dtype, ThreadPool* pool) : dtype_(dtype), pool_(pool) {}

  // Writes row r's `cols` values in the store's dtype.
  using WriteRow = std::function<void(int64_t row, std::byte* out)>;
  Matrix add(int64_t rows, int64_t cols, const WriteRow& write);
  // The values rounded to the dtype.
  const void* add(std::span<const float> values);
  const float* add_float32(std::span<const float> values);
  void finish();  // all of it has arrived

  int64_t bytes() const { return bytes_; }
  DType dtype() const { return dtype_; }
  Stream stream() const { return stream_.get(); }

 private:
  void upload(void* to, int64_t rows, int64_t row_bytes, const WriteRow& write);
  void* take(int64_t bytes);

  DType dtype_;
  ThreadPool* pool_;
  int64_t bytes_ = 0;
  OwnedStream stream_;
  PinnedBuffer staging_;
  std::vector<DeviceBuffer> buffers_;
};

// `count` floats rounded to dtype.
void round_row(DType dtype, const float* values, int64_t count, std::byte* out);

}  // namespace alignpro::cuda
