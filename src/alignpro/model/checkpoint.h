#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "alignpro/model/config.h"

namespace alignpro::model {

// The four matrix products of a layer. kQkv is [q | k | v] and kGateUp is [gate | up] by output
// rows, whether the file stores them fused or apart.
enum class LinearSite { kQkv, kO, kGateUp, kDown };

enum class NormSite { kAttention, kMlp, kQ, kK };

// A model file as this house sees it: canonical names, float32 rows on demand, one rope convention
// (half-split; the row permutation that llama.cpp's converter applies to q and k is undone here).
// Constant after open(); any number of threads may read.
class Checkpoint {
 public:
  // A .gguf file, or a folder with config.json and *.safetensors (sharded or not).
  // Checks that every tensor the family needs is present with the expected shape and that no
  // unknown weight is left over. Throws FileError.
  static std::unique_ptr<Checkpoint> open(const std::filesystem::path& path);

  virtual ~Checkpoint() = default;

  virtual const ModelConfig& config() const = 0;

  // Rows [begin, end) of an output-major matrix [outputs, inputs], into out [end - begin, inputs].
  virtual void read_linear(int64_t layer, LinearSite site, int64_t begin, int64_t end,
                           float* out) const = 0;
  virtual void read_embedding(int64_t begin, int64_t end, float* out) const = 0;
  // The output head [vocab, hidden]; the embedding where the head is tied.
  virtual void read_head(int64_t begin, int64_t end, float* out) const = 0;

  virtual std::vector<float> read_norm(int64_t layer, NormSite site) const = 0;
  virtual std::vector<float> read_final_norm() const = 0;
  // [qkv_size]; empty when the family has no QKV bias.
  virtual std::vector<float> read_qkv_bias(int64_t layer) const = 0;
};

// Shape [outputs, inputs] of a linear site.
struct LinearShape {
  int64_t outputs;
  int64_t inputs;
};
LinearShape linear_shape(const ModelConfig& config, LinearSite site);

}  // namespace alignpro::model
