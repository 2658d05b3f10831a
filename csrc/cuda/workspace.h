#pragma once

// What lies in one allocation, cut off it piece by piece. No header of CUDA is named here.

#include <cstdint>

#include "ops.h"

namespace alignpro::cuda {

inline char* at(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }

// Pieces at multiples of 256 bytes from the base. Of a null base only bytes() counts: what cuts an
// allocation says how large it must be.
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

}  // namespace alignpro::cuda
