#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace alignpro {

// A grow-only float buffer on 64-byte boundaries; contents are not initialised and not kept by
// reserve(). Movable, not copyable.
//
// Large ones are mappings of their own: a buffer that grows gives its pages back at once, where a
// heap would keep the hole (a training step held 0.4 GB in such holes). They ask for huge pages, so
// that weights stream past fewer page-table walks (measured in docs/notes/performance.md).
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
      data_ = allocate(size);
      capacity_ = size;
    }
    return data_;
  }

 private:
  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(float); }

  // Under AddressSanitizer everything comes from the heap, which it watches.
  static bool is_mapped(int64_t size) {
#if defined(__SANITIZE_ADDRESS__)
    (void)size;
    return false;
#else
    return bytes(size) >= size_t{1} << 20;
#endif
  }

  static float* allocate(int64_t size) {
    if (!is_mapped(size)) {
      return static_cast<float*>(::operator new(bytes(size), std::align_val_t{64}));
    }
    void* const at =
        mmap(nullptr, bytes(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(at, bytes(size), MADV_HUGEPAGE);  // a refusal changes nothing but the speed
#endif
    return static_cast<float*>(at);
  }

  void release() {
    if (data_ != nullptr) {
      if (is_mapped(capacity_)) {
        munmap(data_, bytes(capacity_));
      } else {
        ::operator delete(data_, std::align_val_t{64});
      }
    }
    data_ = nullptr;
    capacity_ = 0;
  }

  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace alignpro
