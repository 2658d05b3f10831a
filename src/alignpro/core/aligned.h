#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace alignpro {

// A grow-only float buffer on 64-byte boundaries; contents are not initialised and not kept by
// reserve(). Movable, not copyable. Large ones ask for huge pages: weights stream past
// fewer page-table walks (measured in docs/performance.md).
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t size) { reserve(size); }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), capacity_(std::exchange(other.capacity_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }
  ~AlignedBuffer() { release(); }

  float* data() { return data_; }
  const float* data() const { return data_; }
  int64_t capacity() const { return capacity_; }

  // At least `size` floats; earlier contents are lost when it grows.
  float* reserve(int64_t size) {
    if (size > capacity_) {
      release();
      data_ = static_cast<float*>(
          ::operator new(static_cast<size_t>(size) * sizeof(float), std::align_val_t{64}));
      capacity_ = size;
      ask_for_huge_pages();
    }
    return data_;
  }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    capacity_ = 0;
  }

  // Of the whole huge pages inside; a refusal changes nothing but the speed.
  void ask_for_huge_pages() {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
    const auto from = reinterpret_cast<uintptr_t>(data_);
    const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end =
        (from + static_cast<uintptr_t>(capacity_) * sizeof(float)) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }

  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace alignpro
