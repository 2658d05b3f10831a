#pragma once

#include <cstdint>

#include "alignpro/core/dtype.h"

namespace alignpro::ops {

// A view of memory on the device that computes: rows `ld` elements apart. No data: there is none.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t ld = 0;
  DType dtype = DType::kF32;
};

inline char* at(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }

// Rows [begin, end) of a matrix; of one without data, that.
inline Matrix rows_of(const Matrix& m, int64_t begin, int64_t end) {
  if (m.data == nullptr) return m;
  return {at(m.data, begin * m.ld * block_bytes(m.dtype)), end - begin, m.cols, m.ld, m.dtype};
}

// What lies in one allocation, cut off it piece by piece, at multiples of 256 bytes from the base.
// Of a null base only bytes() counts: what cuts an allocation says how large it must be.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    void* piece = base_ == nullptr ? nullptr : at(base_, bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return static_cast<T*>(piece);
  }
  Matrix matrix(int64_t rows, int64_t cols, DType dtype) {
    return {take<char>(rows * cols * block_bytes(dtype)), rows, cols, cols, dtype};
  }
  // What begins behind, of another life.
  Workspace rest() const { return Workspace(base_ == nullptr ? nullptr : at(base_, bytes_)); }
  int64_t bytes() const { return bytes_; }

 private:
  void* base_;
  int64_t bytes_ = 0;
};

}  // namespace alignpro::ops
