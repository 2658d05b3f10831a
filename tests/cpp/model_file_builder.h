#pragma once

// Small model files for the tests, written byte by byte so that each lie can be told on purpose.

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace build {

namespace fs = std::filesystem;

struct TempFolder {
  fs::path path;
  TempFolder() {
    static std::atomic<int> count{0};
    path = fs::temp_directory_path() /
           ("alignpro_test_" + std::to_string(::getpid()) + "_" + std::to_string(count++));
    fs::create_directories(path);
  }
  ~TempFolder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  fs::path operator/(const std::string& name) const { return path / name; }
};

inline void write(const fs::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

template <typename T>
std::string raw(T value) {
  std::string out(sizeof value, '\0');
  std::memcpy(out.data(), &value, sizeof value);
  return out;
}

inline std::string floats(const std::vector<float>& values) {
  std::string out;
  for (const float value : values) out += raw(value);
  return out;
}

// GGUF: metadata payloads and tensors as they lie in the file, dimensions innermost first.
struct Gguf {
  struct Tensor {
    std::string name;
    std::vector<uint64_t> dims;
    uint32_t type;
    std::string data;
    int64_t offset = -1;  // -1: the next free aligned place
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  std::vector<std::pair<std::string, std::string>> metadata;  // key, type and payload
  std::vector<Tensor> tensors;
  uint64_t alignment = 32;

  static std::string text(std::string_view value) {
    return raw<uint64_t>(value.size()) + std::string(value);
  }
  Gguf& u32(const std::string& key, uint32_t value) { return set(key, 4, raw(value)); }
  Gguf& f32(const std::string& key, float value) { return set(key, 6, raw(value)); }
  Gguf& string(const std::string& key, std::string_view value) { return set(key, 8, text(value)); }
  // Replaces the key where it is there already.
  Gguf& set(const std::string& key, uint32_t type, const std::string& payload) {
    for (auto& [name, value] : metadata) {
      if (name == key) {
        value = raw(type) + payload;
        return *this;
      }
    }
    metadata.emplace_back(key, raw(type) + payload);
    return *this;
  }
  Tensor& tensor(const std::string& name) {
    for (Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    return tensors.emplace_back(Tensor{name, {}, 0, {}});
  }

  size_t header_bytes() const { return header({}).size(); }

  std::string bytes() const {
    std::string data;
    std::vector<uint64_t> offsets;
    for (const Tensor& t : tensors) {
      data.resize((data.size() + alignment - 1) / alignment * alignment);
      offsets.push_back(t.offset >= 0 ? static_cast<uint64_t>(t.offset) : data.size());
      data += t.data;
    }
    std::string out = header(offsets);
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data;
  }

 private:
  std::string header(const std::vector<uint64_t>& offsets) const {
    std::string out =
        magic + raw(version) + raw<uint64_t>(tensors.size()) + raw<uint64_t>(metadata.size());
    for (const auto& [key, value] : metadata) out += text(key) + value;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = tensors[i];
      out += text(t.name) + raw(static_cast<uint32_t>(t.dims.size()));
      for (const uint64_t dim : t.dims) out += raw(dim);
      out += raw(t.type) + raw(i < offsets.size() ? offsets[i] : uint64_t{0});
    }
    return out;
  }
};

// Safetensors: tensors of float32 in order, and a header that may be replaced.
struct Safetensors {
  struct Tensor {
    std::string name;
    std::vector<int64_t> shape;
    std::vector<float> values;
  };
  std::vector<Tensor> tensors;

  std::string header() const {
    std::string out = "{";
    size_t at = 0;
    for (const Tensor& t : tensors) {
      const size_t end = at + 4 * t.values.size();
      out += (at == 0 ? "\"" : ",\"") + t.name + "\":{\"dtype\":\"F32\",\"shape\":[";
      for (size_t i = 0; i < t.shape.size(); ++i) {
        out += (i == 0 ? "" : ",") + std::to_string(t.shape[i]);
      }
      out += "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(end) + "]}";
      at = end;
    }
    return out + "}";
  }

  std::string bytes() const { return bytes(header()); }
  std::string bytes(const std::string& header_text) const {
    std::string out = raw<uint64_t>(header_text.size()) + header_text;
    for (const Tensor& t : tensors) out += floats(t.values);
    return out;
  }
};

// A flat JSON object: key -> JSON text of its value; an empty text leaves the key out.
using JsonFields = std::map<std::string, std::string>;

inline std::string json(const JsonFields& fields) {
  std::string out = "{";
  for (const auto& [key, value] : fields) {
    if (value.empty()) continue;
    out += (out.size() == 1 ? "\"" : ",\"") + key + "\":" + value;
  }
  return out + "}";
}

// config.json of a llama: hidden 4, 2 heads, 1 key-value head, MLP 3, vocabulary 5, one layer.
inline JsonFields tiny_config() {
  return {{"model_type", "\"llama\""},  {"vocab_size", "5"},
          {"hidden_size", "4"},         {"intermediate_size", "3"},
          {"num_hidden_layers", "1"},   {"num_attention_heads", "2"},
          {"num_key_value_heads", "1"}, {"max_position_embeddings", "64"},
          {"rms_norm_eps", "1e-05"},    {"bos_token_id", "1"},
          {"eos_token_id", "2"}};
}

}  // namespace build
