#include "matrix_store.h"

#include <algorithm>
#include <cstring>

#include "alignpro/core/dtype.h"

namespace alignpro::cuda {
namespace {

constexpr int64_t kStagingBytes = int64_t{32} << 20;

}  // namespace

ops::Matrix MatrixStore::add(int64_t rows, int64_t cols, const WriteRow& write) {
  const int64_t row_bytes = cols * block_bytes(dtype_);
  void* to = take(rows * row_bytes);
  upload(to, rows, row_bytes, write);
  return {to, rows, cols, cols, dtype_};
}

const void* MatrixStore::add(std::span<const float> values) {
  const auto count = static_cast<int64_t>(values.size());
  return add(1, count,
             [&](int64_t, std::byte* out) { round_values(dtype_, values.data(), count, out); })
      .data;
}

const float* MatrixStore::add_float32(std::span<const float> values) {
  const auto bytes = static_cast<int64_t>(values.size_bytes());
  void* to = take(bytes);
  upload(to, 1, bytes,
         [&](int64_t, std::byte* out) { std::memcpy(out, values.data(), values.size_bytes()); });
  return static_cast<const float*>(to);
}

void MatrixStore::finish() {
  ops_->wait();
  staging_.reset();
  pool_ = nullptr;
}

void* MatrixStore::take(int64_t bytes) {
  return buffers_.emplace_back(*ops_, std::max<int64_t>(bytes, 1)).data();
}

void MatrixStore::upload(void* to, int64_t rows, int64_t row_bytes, const WriteRow& write) {
  if (row_bytes == 0) return;
  const int64_t at_once =
      std::clamp<int64_t>(kStagingBytes / row_bytes, 1, std::max<int64_t>(1, rows));
  for (int64_t first = 0; first < rows; first += at_once) {
    const int64_t live = std::min(at_once, rows - first);
    ops_->wait();  // what was staged before has left
    auto* staged = static_cast<std::byte*>(staging_.reserve(live * row_bytes));
    if (pool_ != nullptr && live > 1) {
      pool_->run(live, [&](int64_t row, int) { write(first + row, staged + row * row_bytes); });
    } else {
      for (int64_t row = 0; row < live; ++row) write(first + row, staged + row * row_bytes);
    }
    ops_->upload(static_cast<std::byte*>(to) + first * row_bytes, staged, live * row_bytes);
  }
}

}  // namespace alignpro::cuda
