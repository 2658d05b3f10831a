#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "alignpro/core/dtype.h"

namespace alignpro::io {

// A whole file mapped read-only. Pages come in when touched and are shared with other processes.
// The file must not be shortened while it is mapped: the kernel answers a read past the new end
// with SIGBUS, which no check here can turn into an exception.
class MappedFile {
 public:
  // Throws FileError when the path is missing, unreadable, not a regular file, or empty.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }
  const std::string& name() const { return name_; }  // the path as it was given

 private:
  std::string name_;
  std::span<const std::byte> bytes_;
};

// A tensor lying in a mapped file, row-major, checked to fit. Rows are shape.back() values.
struct FileTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // outermost first; every dimension >= 1
  std::span<const std::byte> data;
};

// "[49152, 576]", for messages.
std::string shape_text(std::span<const int64_t> shape);

// Names, keys and first bytes of a stranger's file, made fit for a one-line message: anything but
// printable ASCII becomes \xNN, and what is longer than `limit` bytes ends in "...".
std::string printable(std::string_view text, size_t limit = 80);

// a * b for sizes out of a file; false when the product does not fit.
inline bool multiply(int64_t a, int64_t b, int64_t* product) {
  return !__builtin_mul_overflow(a, b, product);
}

}  // namespace alignpro::io
