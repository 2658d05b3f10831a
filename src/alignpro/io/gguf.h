#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "alignpro/io/mapped_file.h"

namespace alignpro::io {

// Numbered as in the file.
enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

std::string_view gguf_type_name(GgufType type);

// One metadata value, decoded when asked for: a vocabulary stays in the mapped file, and an array's
// count costs no memory. Walked once by the reader, so decoding cannot run past the file.
class GgufValue {
 public:
  GgufValue(GgufType type, std::span<const std::byte> payload) : type_(type), payload_(payload) {}

  GgufType type() const { return type_; }

  // Empty where the value is of another kind or does not fit: the caller knows the key and says so.
  std::optional<int64_t> integer() const;            // any integer type
  std::optional<uint64_t> unsigned_integer() const;  // uint64 alone, which may exceed int64
  std::optional<double> number() const;              // any integer or float type
  std::optional<bool> boolean() const;
  std::optional<std::string_view> string() const;  // bytes as in the file; lives as long as it

  // Arrays: element type and count, and each element in order.
  GgufType element_type() const;
  uint64_t size() const;
  void for_each(const std::function<void(const GgufValue&)>& fn) const;

 private:
  GgufType type_;
  std::span<const std::byte> payload_;  // strings and arrays: their header included
};

// A GGUF file (versions 2 and 3, little-endian): metadata and tensors.
// The whole header is checked when the file is opened: every count, length, dimension and offset
// against the size of the file, before anything is allocated by it. Constant afterwards.
// Format: github.com/ggml-org/ggml, docs/gguf.md.
class GgufFile {
 public:
  // Throws FileError.
  explicit GgufFile(const std::filesystem::path& path);

  const std::string& name() const { return file_.name(); }

  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  // Dimensions are outermost first here; the file has them innermost first.
  const std::map<std::string, FileTensor, std::less<>>& tensors() const { return tensors_; }

  // A missing key is empty; a key of the wrong type throws FileError naming it.
  std::optional<int64_t> find_integer(std::string_view key) const;
  std::optional<double> find_number(std::string_view key) const;
  std::optional<bool> find_boolean(std::string_view key) const;
  std::optional<std::string> find_string(std::string_view key) const;
  const GgufValue* find(std::string_view key) const;

  // As above; a missing key throws too.
  int64_t integer(std::string_view key) const;
  double number(std::string_view key) const;
  std::string string(std::string_view key) const;

 private:
  MappedFile file_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::map<std::string, FileTensor, std::less<>> tensors_;
};

}  // namespace alignpro::io
