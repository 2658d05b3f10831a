#pragma once

#include <memory>
#include <vector>

#include "alignpro/model/config.h"
#include "alignpro/model/model_files.h"
#include "alignpro/ops/quantized_matrix.h"

namespace alignpro::model {

// The four matrix products of a layer. kQkv is [q | k | v] and kGateUp is [gate | up] by output
// rows, whether the file stores them fused or apart.
enum class LinearSite { kQkv, kO, kGateUp, kDown };

enum class NormSite { kAttention, kMlp, kQ, kK, kAttentionOutput, kMlpOutput };

// A model file as the model reads it: canonical names, rows as they are stored, one rope convention
// (half-split; the row permutation that llama.cpp's converter applies to q and k is undone here).
// Constant after open(); any number of threads may read.
class Checkpoint {
 public:
  // A .gguf file, or a folder with config.json and *.safetensors (sharded or not).
  // Checks that every tensor the family needs is present with the expected shape and that no
  // unknown weight is left over. Throws FileError.
  static std::unique_ptr<Checkpoint> open(const ModelFiles& files);

  virtual ~Checkpoint() = default;

  virtual const ModelConfig& config() const = 0;

  // The rows of an output-major matrix [outputs, inputs] as they are stored; they live as long as
  // this.
  virtual std::vector<ops::QuantizedRow> linear_rows(int64_t layer, LinearSite site) const = 0;
  virtual std::vector<ops::QuantizedRow> embedding_rows() const = 0;
  // The output head [vocab, hidden]; the embedding where the head is tied.
  virtual std::vector<ops::QuantizedRow> head_rows() const = 0;

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
