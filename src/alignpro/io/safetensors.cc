#include "alignpro/io/safetensors.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/io/json.h"

namespace alignpro::io {
namespace {

namespace fs = std::filesystem;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

struct Entry {
  std::string name;
  FileTensor tensor;
  int64_t begin;
  int64_t end;
};

Entry read_entry(const std::string& file, const Json::Member& member, int64_t data_bytes) {
  const std::string label = cat(file, ": tensor '", printable(member.key), "'");
  const auto field = [&](std::string_view key) -> const Json& {
    const Json* value = member.value.find(key);
    if (value == nullptr) throw FileError(cat(label, " has no \"", key, "\""));
    return *value;
  };
  Entry entry{member.key, {}, 0, 0};

  const std::string* dtype = field("dtype").string();
  if (dtype == nullptr) throw FileError(cat(label, ": dtype must be a string"));
  const std::optional<DType> supported = dtype_from_name(*dtype);
  require<FileError>(
      supported.has_value() && block_values(*supported) == 1, label, " has dtype ",
      printable(*dtype),
      ", which is not supported; F32, F16 and BF16 are. Of quantised weights use the "
      "original folder or a GGUF file");
  entry.tensor.dtype = *supported;

  const Json::Array* shape = field("shape").array();
  if (shape == nullptr) throw FileError(cat(label, ": shape must be an array"));
  int64_t bytes = block_bytes(*supported);
  for (const Json& dimension : *shape) {
    const int64_t* extent = dimension.integer();
    require<FileError>(extent != nullptr && *extent >= 1, label,
                       ": dimensions must be integers of 1 or more");
    require<FileError>(multiply(bytes, *extent, &bytes), label, ": its dimensions overflow");
    entry.tensor.shape.push_back(*extent);
  }

  const Json::Array* offsets = field("data_offsets").array();
  const int64_t* begin = offsets && offsets->size() == 2 ? (*offsets)[0].integer() : nullptr;
  const int64_t* end = offsets && offsets->size() == 2 ? (*offsets)[1].integer() : nullptr;
  require<FileError>(begin != nullptr && end != nullptr, label,
                     ": data_offsets must be two integers");
  require<FileError>(*begin >= 0 && *end >= *begin && *end <= data_bytes, label, ": data_offsets [",
                     *begin, ", ", *end, "] do not lie in the file's ", data_bytes,
                     " bytes of data; the file may be truncated");
  require<FileError>(*end - *begin == bytes, label, ": data_offsets span ", *end - *begin,
                     " bytes, shape ", shape_text(entry.tensor.shape), " of ", *dtype, " needs ",
                     bytes);
  entry.begin = *begin;
  entry.end = *end;
  return entry;
}

// A path that cannot be examined counts as missing; the standard library would throw its own class.
bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

// weight_map of the index: tensor -> shard.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const MappedFile file(path);
  const Json root = Json::parse(text_of(file.bytes()), file.name());
  const Json* weight_map = root.find("weight_map");
  require<FileError>(
      weight_map != nullptr && weight_map->object() != nullptr && !weight_map->object()->empty(),
      file.name(), ": expected an object \"weight_map\" of tensor to file name");
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, value] : *weight_map->object()) {
    const std::string* shard = value.string();
    // A bare file name and nothing else: an index must not reach out of its folder.
    require<FileError>(shard != nullptr && !shard->empty() && *shard != "." && *shard != ".." &&
                           shard->find_first_of(std::string_view("/\\\0", 3)) == std::string::npos,
                       file.name(), ": tensor '", printable(tensor), "' maps to '",
                       shard ? printable(*shard) : std::string(value.kind()),
                       "', expected a file name in the same folder");
    shards.emplace(tensor, *shard);
  }
  return shards;
}

// Number and count of "model-00001-of-00002.safetensors"; 0 and 0 for another name.
std::pair<int, int> shard_of(const std::string& name) {
  int number = 0, count = 0, length = 0;
  const int found =
      std::sscanf(name.c_str(), "model-%5d-of-%5d.safetensors%n", &number, &count, &length);
  if (found != 2 || length != static_cast<int>(name.size())) return {0, 0};
  return {number, count};
}

std::vector<std::string> list_safetensors(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  fs::directory_iterator at(folder, error);
  for (; !error && at != fs::directory_iterator(); at.increment(error)) {
    if (at->path().extension() == ".safetensors") names.push_back(at->path().filename());
  }
  if (error) throw FileError(cat(folder.string(), ": cannot be listed: ", error.message()));
  std::ranges::sort(names);
  return names;
}

void require_shards(const fs::path& folder, std::span<const std::string> shards) {
  const int count = shard_of(shards.front()).second;
  for (const std::string& name : shards) {
    require<FileError>(shard_of(name).second == count, folder.string(), ": '", shards.front(),
                       "' and '", name, "' are shards of two builds, and no ", kIndex,
                       " says which one counts; remove one of them");
  }
  for (int number = 1; number <= count; ++number) {
    require<FileError>(
        std::ranges::any_of(
            shards, [&](const std::string& name) { return shard_of(name).first == number; }),
        folder.string(), ": shard ", number, " of ", count, " is missing from the folder");
  }
}

}  // namespace

std::vector<std::string> list_weight_files(const fs::path& folder) {
  if (is_there(folder / "model.safetensors")) return {"model.safetensors"};
  std::vector<std::string> names;
  if (const fs::path index = folder / kIndex; is_there(index)) {
    for (const auto& [tensor, shard] : read_index(index)) names.push_back(shard);
    std::ranges::sort(names);
    names.erase(std::ranges::unique(names).begin(), names.end());
    for (const std::string& name : names) {
      require<FileError>(is_there(folder / name), index.string(), ": shard '", printable(name),
                         "' is missing from the folder");
    }
    return names;
  }
  names = list_safetensors(folder);
  std::vector<std::string> shards;
  std::ranges::copy_if(names, std::back_inserter(shards),
                       [](const std::string& name) { return shard_of(name).second > 0; });
  if (!shards.empty()) {
    require_shards(folder, shards);
    return shards;
  }
  std::erase_if(names, [](const std::string& name) {
    return name.starts_with("consolidated") || name == "adapter_model.safetensors";
  });
  const bool pickled =
      is_there(folder / "pytorch_model.bin") || is_there(folder / "pytorch_model.bin.index.json");
  require<FileError>(!names.empty(), folder.string(),
                     ": expected model.safetensors or its shards, found none",
                     pickled ? "; pytorch_model.bin is a pickle and is not read, save the model as "
                               "safetensors"
                             : "");
  return names;
}

SafetensorsFolder::SafetensorsFolder(const fs::path& folder,
                                     const std::vector<std::string>& names) {
  for (const std::string& name : names) add_file(folder / name);
}

SafetensorsFolder::SafetensorsFolder(const fs::path& folder)
    : SafetensorsFolder(folder, list_weight_files(folder)) {
  const fs::path index = folder / kIndex;
  if (is_there(folder / "model.safetensors") || !is_there(index)) return;
  for (const auto& [tensor, shard] : read_index(index)) {
    const auto at = file_of_.find(tensor);
    require<FileError>(at != file_of_.end() && at->second == shard, index.string(), ": tensor '",
                       printable(tensor), "' is not in shard '", printable(shard), "'");
  }
}

void SafetensorsFolder::add_file(const fs::path& path) {
  MappedFile file(path);
  const std::string& name = file.name();
  const std::span<const std::byte> bytes = file.bytes();
  uint64_t header_bytes = 0;
  require<FileError>(bytes.size() >= sizeof header_bytes, name, ": truncated: ", bytes.size(),
                     " bytes are no safetensors file");
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  const std::span<const std::byte> rest = bytes.subspan(sizeof header_bytes);
  require<FileError>(!rest.empty() && text_of(rest).front() == '{', name,
                     ": expected a safetensors file, a length and then '{'; this one "
                     "begins with \"",
                     printable(text_of(bytes).substr(0, 16)), "\"");
  require<FileError>(header_bytes <= kMaxHeaderBytes && header_bytes <= rest.size(), name,
                     ": the header claims ", header_bytes, " bytes, ", rest.size(),
                     " are left; the file is truncated or no safetensors file");
  const Json header =
      Json::parse(text_of(rest.first(header_bytes)), name, {.max_bytes = kMaxHeaderBytes});
  const std::span<const std::byte> data = rest.subspan(header_bytes);

  std::vector<Entry> entries;
  for (const Json::Member& member : *header.object()) {
    if (member.key == "__metadata__") continue;
    entries.push_back(read_entry(name, member, static_cast<int64_t>(data.size())));
  }
  std::ranges::sort(entries, {}, &Entry::begin);
  int64_t covered = 0;
  for (const Entry& entry : entries) {
    require<FileError>(entry.begin == covered, name, ": tensor '", printable(entry.name),
                       "' begins at ", entry.begin, " of the data, expected ", covered,
                       ": an overlap or a gap");
    covered = entry.end;
  }
  require<FileError>(static_cast<uint64_t>(covered) == data.size(), name,
                     ": its tensors end at byte ", covered, " of the data, which has ",
                     data.size());

  for (Entry& entry : entries) {
    entry.tensor.data = data.subspan(static_cast<size_t>(entry.begin),
                                     static_cast<size_t>(entry.end - entry.begin));
    const auto [at, added] = file_of_.emplace(entry.name, path.filename().string());
    require<FileError>(added, name, ": tensor '", printable(entry.name), "' is also in '",
                       at->second, "'");
    tensors_.emplace(std::move(entry.name), std::move(entry.tensor));
  }
  files_.push_back(std::move(file));
}

}  // namespace alignpro::io
