#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "alignpro/io/mapped_file.h"

namespace alignpro::io {

// The files of a folder that hold its weights, by name: model.safetensors; else the shards that
// model.safetensors.index.json names; else model-00001-of-N.safetensors and so on; else every
// *.safetensors but a copy in Mistral's own layout (consolidated*) and an adapter
// (adapter_model.safetensors). What stands beside them is left over from another build, and
// transformers does not read it either. Throws FileError where there are none, or not all.
std::vector<std::string> list_weight_files(const std::filesystem::path& folder);

// The weights of a model folder: the tensors of `list_weight_files`.
// Headers are checked when the folder is opened: sizes, dtypes (F32, F16, BF16), and that the
// tensors of a file tile its data without gap or overlap. Constant afterwards.
// Format: github.com/huggingface/safetensors, README.
class SafetensorsFolder {
 public:
  // Throws FileError.
  explicit SafetensorsFolder(const std::filesystem::path& folder);
  // Of these files in the folder alone. Throws FileError.
  SafetensorsFolder(const std::filesystem::path& folder, const std::vector<std::string>& names);

  const std::map<std::string, FileTensor, std::less<>>& tensors() const { return tensors_; }

 private:
  void add_file(const std::filesystem::path& path);

  std::vector<MappedFile> files_;
  std::map<std::string, FileTensor, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> file_of_;  // tensor -> file name
};

}  // namespace alignpro::io
