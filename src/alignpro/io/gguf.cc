#include "alignpro/io/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "alignpro/core/error.h"

namespace alignpro::io {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place");

constexpr uint64_t kMaxKeyBytes = 65535;  // the format's own limit
constexpr uint64_t kMaxTensorName = 256;  // the format says 64; some writers exceed it
constexpr uint32_t kMaxDims = 4;
constexpr int kMaxArrayDepth = 4;
constexpr int64_t kMaxAlignment = 1 << 16;

template <typename T>
T load(const std::byte* source) {
  T value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

// Bytes of a scalar; 0 for strings and arrays.
uint64_t scalar_bytes(GgufType type) {
  constexpr uint8_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kBytes[static_cast<uint32_t>(type)];
}

// Reads forward and never past the end.
class Cursor {
 public:
  Cursor(const std::string& name, std::span<const std::byte> bytes) : name_(name), bytes_(bytes) {}

  [[noreturn]] void fail(std::string_view what) const {
    throw FileError(cat(name_, ": ", what, " (at byte ", at_, " of ", bytes_.size(), ")"));
  }

  uint64_t at() const { return at_; }
  uint64_t remaining() const { return bytes_.size() - at_; }
  std::span<const std::byte> since(uint64_t begin) const {
    return bytes_.subspan(begin, at_ - begin);
  }

  std::span<const std::byte> take(uint64_t count, std::string_view what) {
    if (count > remaining()) {
      fail(cat("truncated: ", what, " needs ", count, " bytes, ", remaining(), " are left"));
    }
    const auto taken = bytes_.subspan(at_, count);
    at_ += count;
    return taken;
  }

  template <typename T>
  T read(std::string_view what) {
    return load<T>(take(sizeof(T), what).data());
  }

  std::string_view text(std::string_view what, uint64_t limit) {
    const auto length = read<uint64_t>(what);
    const auto bytes = take(length, what);
    if (length > limit) {
      fail(cat(what, " of ", length, " bytes is over the limit of ", limit));
    }
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  GgufType type(std::string_view what) {
    const auto number = read<uint32_t>(what);
    if (number > static_cast<uint32_t>(GgufType::kF64)) {
      fail(cat(what, " has unknown metadata type ", number));
    }
    return static_cast<GgufType>(number);
  }

 private:
  const std::string& name_;
  std::span<const std::byte> bytes_;
  uint64_t at_ = 0;
};

// Steps over a value, checking it on the way.
void skip_value(Cursor& in, GgufType type, std::string_view what, int depth) {
  if (type == GgufType::kString) {
    in.text(what, in.remaining());
    return;
  }
  if (type == GgufType::kBool) {
    if (in.read<uint8_t>(what) > 1) in.fail(cat(what, " is a boolean that is neither 0 nor 1"));
    return;
  }
  if (type != GgufType::kArray) {
    in.take(scalar_bytes(type), what);
    return;
  }
  if (depth >= kMaxArrayDepth) in.fail(cat(what, " nests arrays too deeply"));
  const GgufType element = in.type(what);
  const auto count = in.read<uint64_t>(what);
  const uint64_t width = scalar_bytes(element);
  // Divided, not multiplied: the count may be anything. A string or an array has 8 bytes at least.
  if (count > in.remaining() / (width == 0 ? 8 : width)) {
    in.fail(cat("truncated: ", what, " promises ", count, " elements, ", in.remaining(),
                " bytes are left"));
  }
  if (width != 0 && element != GgufType::kBool) {
    in.take(count * width, what);
    return;
  }
  for (uint64_t i = 0; i < count; ++i) skip_value(in, element, what, depth + 1);
}

// ggml's numbering of tensor types; empty where a number was retired or never given.
std::string_view tensor_type_name(uint32_t type) {
  constexpr std::string_view kNames[] = {
      "F32",   "F16",        "Q4_0",       "Q4_1",       "Q4_2",     "Q4_3",     "Q5_0",
      "Q5_1",  "Q8_0",       "Q8_1",       "Q2_K",       "Q3_K",     "Q4_K",     "Q5_K",
      "Q6_K",  "Q8_K",       "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",  "IQ1_S",    "IQ4_NL",
      "IQ3_S", "IQ2_S",      "IQ4_XS",     "I8",         "I16",      "I32",      "I64",
      "F64",   "IQ1_M",      "BF16",       "Q4_0_4_4",   "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",
      "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4",    "NVFP4"};
  return type < std::size(kNames) ? kNames[type] : std::string_view();
}

void check_magic(Cursor& in, std::span<const std::byte> bytes) {
  const std::string_view head(reinterpret_cast<const char*>(bytes.data()),
                              std::min<size_t>(bytes.size(), 16));
  if (!head.starts_with("GGUF")) {
    in.fail(cat("expected a GGUF file, which begins with \"GGUF\"; this one begins with \"",
                printable(head), "\""));
  }
  in.take(4, "the magic");
  const auto version = in.read<uint32_t>("the version");
  if (version == 2 || version == 3) return;
  if (version == 2u << 24 || version == 3u << 24) in.fail("big-endian GGUF is not supported");
  in.fail(cat("GGUF version ", version, " is not supported, 2 and 3 are; convert the model again"));
}

struct TensorEntry {
  std::string name;
  FileTensor tensor;
  uint64_t offset;
  uint64_t bytes;
};

// One row of the tensor table; its data is placed later, when the table's end is known.
TensorEntry read_tensor_entry(Cursor& in, uint64_t alignment) {
  TensorEntry entry;
  entry.name = in.text("a tensor name", kMaxTensorName);
  const std::string label = cat("tensor '", printable(entry.name), "'");
  if (entry.name.empty()) in.fail("a tensor has an empty name");
  const auto dims = in.read<uint32_t>(label);
  if (dims == 0 || dims > kMaxDims) {
    in.fail(cat(label, " has ", dims, " dimensions, expected 1 to ", kMaxDims));
  }
  int64_t values = 1;
  for (uint32_t d = 0; d < dims; ++d) {
    const auto extent = in.read<int64_t>(label);
    if (extent <= 0) {
      in.fail(cat(label, ": dimension ", d, " is ", static_cast<uint64_t>(extent),
                  ", expected 1 or more"));
    }
    if (!multiply(values, extent, &values)) in.fail(cat(label, ": its dimensions overflow"));
    entry.tensor.shape.push_back(extent);
  }
  const auto type = in.read<uint32_t>(label);
  const std::string_view known = tensor_type_name(type);
  const std::optional<DType> dtype = dtype_from_name(known);
  if (!dtype) {
    in.fail(cat(label, " has type ", known.empty() ? "number " + std::to_string(type) : known,
                ", which is not supported; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, "
                "Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL and IQ4_XS are"));
  }
  entry.tensor.dtype = *dtype;
  const int64_t block = block_values(*dtype);
  if (entry.tensor.shape.front() % block != 0) {
    in.fail(cat(label, ": rows of ", entry.tensor.shape.front(), " values are no multiple of ",
                dtype_name(*dtype), "'s block of ", block));
  }
  int64_t bytes = 0;
  if (!multiply(values / block, block_bytes(*dtype), &bytes)) {
    in.fail(cat(label, ": its size overflows"));
  }
  entry.bytes = static_cast<uint64_t>(bytes);
  entry.offset = in.read<uint64_t>(label);
  if (entry.offset % alignment != 0) {
    in.fail(cat(label, ": offset ", entry.offset, " is no multiple of the alignment ", alignment));
  }
  std::ranges::reverse(entry.tensor.shape);
  return entry;
}

void check_disjoint(Cursor& in, const std::vector<TensorEntry>& entries) {
  std::vector<const TensorEntry*> by_offset;
  for (const TensorEntry& entry : entries) by_offset.push_back(&entry);
  std::ranges::sort(by_offset, {}, &TensorEntry::offset);
  for (size_t i = 1; i < by_offset.size(); ++i) {
    const TensorEntry& before = *by_offset[i - 1];
    if (before.offset + before.bytes > by_offset[i]->offset) {
      in.fail(cat("tensors '", printable(before.name), "' and '", printable(by_offset[i]->name),
                  "' overlap"));
    }
  }
}

// A value by one of its readers; `what` finishes the sentence "key 'x' must be ...".
template <typename T, typename Read>
std::optional<T> read(const GgufFile& file, std::string_view key,
                      std::optional<Read> (GgufValue::*reader)() const, std::string_view what) {
  const GgufValue* value = file.find(key);
  if (value == nullptr) return std::nullopt;
  const std::optional<Read> out = (value->*reader)();
  require<FileError>(out.has_value(), file.name(), ": metadata key '", key, "' must be ", what,
                     ", it is of type ", gguf_type_name(value->type()));
  return T(*out);
}

template <typename T>
T given(const GgufFile& file, std::string_view key, std::optional<T> value) {
  require<FileError>(value.has_value(), file.name(), ": metadata key '", key, "' is missing");
  return *std::move(value);
}

}  // namespace

std::string_view gguf_type_name(GgufType type) {
  constexpr std::string_view kNames[] = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                         "int32",  "float32", "bool",   "string", "array",
                                         "uint64", "int64",   "float64"};
  return kNames[static_cast<uint32_t>(type)];
}

std::optional<int64_t> GgufValue::integer() const {
  const std::byte* p = payload_.data();
  switch (type_) {
    case GgufType::kU8:
      return load<uint8_t>(p);
    case GgufType::kI8:
      return load<int8_t>(p);
    case GgufType::kU16:
      return load<uint16_t>(p);
    case GgufType::kI16:
      return load<int16_t>(p);
    case GgufType::kU32:
      return load<uint32_t>(p);
    case GgufType::kI32:
      return load<int32_t>(p);
    case GgufType::kI64:
      return load<int64_t>(p);
    case GgufType::kU64: {
      const auto value = load<int64_t>(p);
      return value >= 0 ? std::optional(value) : std::nullopt;
    }
    default:
      return std::nullopt;
  }
}

std::optional<uint64_t> GgufValue::unsigned_integer() const {
  if (type_ != GgufType::kU64) return std::nullopt;
  return load<uint64_t>(payload_.data());
}

std::optional<double> GgufValue::number() const {
  if (type_ == GgufType::kF32) return load<float>(payload_.data());
  if (type_ == GgufType::kF64) return load<double>(payload_.data());
  const std::optional<int64_t> whole = integer();
  return whole ? std::optional(static_cast<double>(*whole)) : std::nullopt;
}

std::optional<bool> GgufValue::boolean() const {
  if (type_ != GgufType::kBool) return std::nullopt;
  return load<uint8_t>(payload_.data()) != 0;
}

std::optional<std::string_view> GgufValue::string() const {
  if (type_ != GgufType::kString) return std::nullopt;
  return std::string_view(reinterpret_cast<const char*>(payload_.data()) + 8, payload_.size() - 8);
}

GgufType GgufValue::element_type() const {
  require(type_ == GgufType::kArray, "GgufValue: element_type() of a value that is no array");
  return static_cast<GgufType>(load<uint32_t>(payload_.data()));
}

uint64_t GgufValue::size() const {
  require(type_ == GgufType::kArray, "GgufValue: size() of a value that is no array");
  return load<uint64_t>(payload_.data() + 4);
}

void GgufValue::for_each(const std::function<void(const GgufValue&)>& fn) const {
  const GgufType element = element_type();
  const uint64_t count = size();
  static const std::string kSource = "GGUF array";
  Cursor in(kSource, payload_);
  in.take(4 + 8, "the array's header");
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t begin = in.at();
    // Depth was checked when the file was opened.
    skip_value(in, element, "an element", 0);
    fn(GgufValue(element, in.since(begin)));
  }
}

GgufFile::GgufFile(const std::filesystem::path& path) : file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  Cursor in(name(), bytes);
  check_magic(in, bytes);
  const auto tensor_count = in.read<uint64_t>("the tensor count");
  const auto key_count = in.read<uint64_t>("the metadata count");
  // The shortest entries possible are 13 and 33 bytes long.
  if (key_count > in.remaining() / 13) in.fail(cat(key_count, " metadata keys cannot fit"));
  if (tensor_count > in.remaining() / 33) in.fail(cat(tensor_count, " tensors cannot fit"));

  for (uint64_t i = 0; i < key_count; ++i) {
    std::string key(in.text("a metadata key", kMaxKeyBytes));
    const std::string label = cat("metadata key '", printable(key), "'");
    const GgufType type = in.type(label);
    const uint64_t begin = in.at();
    skip_value(in, type, label, 0);
    if (!metadata_.emplace(std::move(key), GgufValue(type, in.since(begin))).second) {
      in.fail(cat(label, " appears twice"));
    }
  }

  const int64_t alignment = find_integer("general.alignment").value_or(32);
  if (alignment < 1 || alignment > kMaxAlignment || (alignment & (alignment - 1)) != 0) {
    in.fail(
        cat("general.alignment is ", alignment, ", expected a power of two up to ", kMaxAlignment));
  }
  const auto align = static_cast<uint64_t>(alignment);

  std::vector<TensorEntry> entries;
  for (uint64_t i = 0; i < tensor_count; ++i) entries.push_back(read_tensor_entry(in, align));

  const uint64_t data_begin = (in.at() + align - 1) / align * align;
  const uint64_t data_bytes = data_begin < bytes.size() ? bytes.size() - data_begin : 0;
  for (const TensorEntry& entry : entries) {
    if (entry.offset > data_bytes || entry.bytes > data_bytes - entry.offset) {
      in.fail(cat("truncated: tensor '", printable(entry.name), "' needs ", entry.bytes,
                  " bytes at offset ", entry.offset, " of the data, which has ", data_bytes));
    }
  }
  check_disjoint(in, entries);
  for (TensorEntry& entry : entries) {
    entry.tensor.data = bytes.subspan(data_begin + entry.offset, entry.bytes);
    if (!tensors_.emplace(entry.name, std::move(entry.tensor)).second) {
      in.fail(cat("tensor '", printable(entry.name), "' appears twice"));
    }
  }
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto at = metadata_.find(key);
  return at == metadata_.end() ? nullptr : &at->second;
}

std::optional<int64_t> GgufFile::find_integer(std::string_view key) const {
  return read<int64_t>(*this, key, &GgufValue::integer, "an integer below 2^63");
}
std::optional<double> GgufFile::find_number(std::string_view key) const {
  return read<double>(*this, key, &GgufValue::number, "a number");
}
std::optional<bool> GgufFile::find_boolean(std::string_view key) const {
  return read<bool>(*this, key, &GgufValue::boolean, "a boolean");
}
std::optional<std::string> GgufFile::find_string(std::string_view key) const {
  return read<std::string>(*this, key, &GgufValue::string, "a string");
}
int64_t GgufFile::integer(std::string_view key) const {
  return given(*this, key, find_integer(key));
}
double GgufFile::number(std::string_view key) const { return given(*this, key, find_number(key)); }
std::string GgufFile::string(std::string_view key) const {
  return given(*this, key, find_string(key));
}

}  // namespace alignpro::io
