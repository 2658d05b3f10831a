#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "alignpro/io/mapped_file.h"

namespace alignpro::io {

// The weights of a model folder: model.safetensors.index.json and the shards that it names, or
// model.safetensors, or, with neither, every *.safetensors there is.
// Headers are checked when the folder is opened: sizes, dtypes (F32, F16, BF16), and that the
// tensors of a file tile its data without gap or overlap. Constant afterwards.
// Format: github.com/huggingface/safetensors, README.
class SafetensorsFolder {
 public:
  // Throws FileError.
  explicit SafetensorsFolder(const std::filesystem::path& folder);

  const std::map<std::string, FileTensor, std::less<>>& tensors() const { return tensors_; }

 private:
  void add_file(const std::filesystem::path& path);

  std::vector<MappedFile> files_;
  std::map<std::string, FileTensor, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> file_of_;  // tensor -> file name
};

}  // namespace alignpro::io
