#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "alignpro/io/gguf.h"
#include "alignpro/io/json.h"

namespace alignpro::model {

// The files of one model, each read once: a GGUF file, or a folder in Hugging Face's layout, whose
// JSON files are parsed when first asked for. Configuration, weights and tokenizer read from one of
// these. A handle: copies share what was parsed, and any number of threads may use them.
class ModelFiles {
 public:
  // Opens a GGUF file, and checks its header; a folder is not looked into. Throws FileError.
  ModelFiles(const std::filesystem::path& path);  // NOLINT: a path stands for its files

  const std::filesystem::path& path() const;

  // Null for a folder.
  const io::GgufFile* gguf() const;

  // The object in one of a folder's JSON files; null where the folder has no such file, and for a
  // GGUF file. Throws FileError where the file holds something else.
  const io::Json* json(std::string_view name) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace alignpro::model
