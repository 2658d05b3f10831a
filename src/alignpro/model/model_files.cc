#include "alignpro/model/model_files.h"

#include <map>
#include <mutex>
#include <optional>
#include <system_error>

#include "alignpro/core/error.h"
#include "alignpro/io/mapped_file.h"

namespace alignpro::model {

struct ModelFiles::State {
  std::filesystem::path path;
  std::optional<io::GgufFile> gguf;
  std::mutex mutex;
  std::map<std::string, std::optional<io::Json>, std::less<>> json;  // empty: no such file
};

ModelFiles::ModelFiles(const std::filesystem::path& path) : state_(std::make_shared<State>()) {
  state_->path = path;
  std::error_code ignored;  // what cannot be examined cannot be opened either, and that says why
  if (std::filesystem::is_directory(path, ignored)) return;
  require<FileError>(path.extension() != ".safetensors", path.string(),
                     ": expected a .gguf file or a folder with config.json and "
                     "*.safetensors; give the folder this file is in");
  state_->gguf.emplace(path);
  const std::string kind = state_->gguf->find_string("general.type").value_or("model");
  require<FileError>(kind == "model", path.string(), ": expected a model, got a file whose ",
                     "general.type is '", io::printable(kind), "'");
}

const std::filesystem::path& ModelFiles::path() const { return state_->path; }

const io::GgufFile* ModelFiles::gguf() const { return state_->gguf ? &*state_->gguf : nullptr; }

const io::Json* ModelFiles::json(std::string_view name) const {
  if (state_->gguf) return nullptr;
  const std::lock_guard lock(state_->mutex);
  auto at = state_->json.find(name);
  if (at == state_->json.end()) {
    const std::filesystem::path path = state_->path / name;
    std::optional<io::Json> root;
    std::error_code ignored;
    if (std::filesystem::exists(path, ignored)) {
      const io::MappedFile file(path);
      const auto bytes = file.bytes();
      root =
          io::Json::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, file.name());
      require<FileError>(root->object() != nullptr, file.name(), ": expected a JSON object, got ",
                         root->kind());
    }
    at = state_->json.emplace(name, std::move(root)).first;
  }
  return at->second ? &*at->second : nullptr;
}

}  // namespace alignpro::model
