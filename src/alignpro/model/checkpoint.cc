#include "alignpro/model/checkpoint.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/io/safetensors.h"
#include "alignpro/model/config_readers.h"

namespace alignpro::model {
namespace {

using io::FileTensor;
using TensorMap = std::map<std::string, FileTensor, std::less<>>;

// What the formats call a tensor; those of a layer after its prefix.
struct Name {
  const char *hf, *gguf;
};
constexpr Name kLayers{"model.layers.", "blk."};  // the layer's number and a dot follow
constexpr Name kEmbedding{"model.embed_tokens", "token_embd"};
constexpr Name kFinalNorm{"model.norm", "output_norm"};
constexpr Name kHead{"lm_head", "output"};
constexpr Name kAttentionNorm{"input_layernorm", "attn_norm"};
constexpr Name kMlpNorm{"post_attention_layernorm", "ffn_norm"};
// Of a family with norms behind attention and MLP.
constexpr Name kAttentionOutputNorm{"post_attention_layernorm", "post_attention_norm"};
constexpr Name kInnerMlpNorm{"pre_feedforward_layernorm", "ffn_norm"};
constexpr Name kMlpOutputNorm{"post_feedforward_layernorm", "post_ffw_norm"};
constexpr Name kQ{"self_attn.q_proj", "attn_q"};
constexpr Name kK{"self_attn.k_proj", "attn_k"};
constexpr Name kV{"self_attn.v_proj", "attn_v"};
constexpr Name kQkv{"self_attn.qkv_proj", "attn_qkv"};
constexpr Name kO{"self_attn.o_proj", "attn_output"};
constexpr Name kGate{"mlp.gate_proj", "ffn_gate"};
constexpr Name kUp{"mlp.up_proj", "ffn_up"};
constexpr Name kGateUp{"mlp.gate_up_proj", "ffn_up"};  // GGUF: under the name of one half
constexpr Name kDown{"mlp.down_proj", "ffn_down"};
constexpr Name kQNorm{"self_attn.q_norm", "attn_q_norm"};
constexpr Name kKNorm{"self_attn.k_norm", "attn_k_norm"};

// Consecutive output rows of a site: one matrix or bias of the file.
struct Piece {
  FileTensor tensor;
  // Where the file interleaves the two halves of each head (llama.cpp's rope pairs lanes 2i and
  // 2i + 1): the head's rows. 0: rows are in order.
  int64_t interleaved_head = 0;

  // The file's row for fused row `row`: half j, lane i is stored at 2i + j.
  int64_t file_row(int64_t row) const {
    if (interleaved_head == 0) return row;
    const int64_t half = interleaved_head / 2;
    const int64_t lane = row % interleaved_head;
    return row - lane + 2 * (lane % half) + lane / half;
  }
};

using Pieces = std::vector<Piece>;

struct Layer {
  Pieces linears[4];    // by LinearSite
  FileTensor norms[6];  // by NormSite; those that the family has
  Pieces qkv_bias;
};

// Finds tensors by name and shape, and knows at the end which were never asked for.
class Finder {
 public:
  Finder(bool gguf, const TensorMap& tensors, std::string source)
      : gguf_(gguf), tensors_(tensors), source_(std::move(source)) {}

  const char* name(const Name& name) const { return gguf_ ? name.gguf : name.hf; }

  const FileTensor& get(const std::string& name, const std::vector<int64_t>& shape) {
    const auto at = tensors_.find(name);
    require<FileError>(at != tensors_.end(), source_, ": tensor '", name, "' of shape ",
                       io::shape_text(shape), " is missing");
    require<FileError>(at->second.shape == shape, source_, ": tensor '", name, "' has shape ",
                       io::shape_text(at->second.shape), ", expected ", io::shape_text(shape));
    used_.insert(name);
    return at->second;
  }

  bool has(const std::string& name) const { return tensors_.contains(name); }

  void ignore(const std::string& name) { used_.insert(name); }

  // A weight without a place would be a model other than the one computed.
  void refuse_leftovers() const {
    for (const auto& [name, tensor] : tensors_) {
      // Buffers that old transformers saved; computed from the config here.
      if (name.ends_with("rotary_emb.inv_freq")) continue;
      require<FileError>(used_.contains(name), source_, ": unknown tensor '", io::printable(name),
                         "' of shape ", io::shape_text(tensor.shape),
                         "; this model has no place for it");
    }
  }

 private:
  const bool gguf_;
  const TensorMap& tensors_;
  std::string source_;
  std::set<std::string, std::less<>> used_;
};

Layer find_layer(Finder& finder, const ModelConfig& config, int64_t index, bool interleaved) {
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const int64_t head = interleaved ? config.head_dim : 0;
  const std::string prefix = cat(finder.name(kLayers), index, ".");
  const auto matrix = [&](const Name& name, int64_t outputs, int64_t inputs, int64_t heads_of) {
    return Piece{finder.get(cat(prefix, finder.name(name), ".weight"), {outputs, inputs}),
                 heads_of};
  };
  const auto vector = [&](const Name& name, const char* suffix, int64_t size) {
    return finder.get(cat(prefix, finder.name(name), suffix), {size});
  };
  Layer layer;
  const auto linear = [&layer](LinearSite site) -> Pieces& {
    return layer.linears[static_cast<size_t>(site)];
  };
  const auto norm = [&layer](NormSite site) -> FileTensor& {
    return layer.norms[static_cast<size_t>(site)];
  };
  if (config.fused_projections) {
    linear(LinearSite::kQkv) = {matrix(kQkv, config.qkv_size(), hidden, 0)};
    linear(LinearSite::kGateUp) = {matrix(kGateUp, 2 * inner, hidden, 0)};
  } else {
    linear(LinearSite::kQkv) = {matrix(kQ, config.q_size(), hidden, head),
                                matrix(kK, config.kv_size(), hidden, head),
                                matrix(kV, config.kv_size(), hidden, 0)};
    linear(LinearSite::kGateUp) = {matrix(kGate, inner, hidden, 0), matrix(kUp, inner, hidden, 0)};
  }
  linear(LinearSite::kO) = {matrix(kO, hidden, config.q_size(), 0)};
  linear(LinearSite::kDown) = {matrix(kDown, hidden, inner, 0)};
  norm(NormSite::kAttention) = vector(kAttentionNorm, ".weight", hidden);
  norm(NormSite::kMlp) = vector(config.output_norms ? kInnerMlpNorm : kMlpNorm, ".weight", hidden);
  if (config.output_norms) {
    norm(NormSite::kAttentionOutput) = vector(kAttentionOutputNorm, ".weight", hidden);
    norm(NormSite::kMlpOutput) = vector(kMlpOutputNorm, ".weight", hidden);
  }
  if (config.qk_norm) {
    norm(NormSite::kQ) = vector(kQNorm, ".weight", config.head_dim);
    norm(NormSite::kK) = vector(kKNorm, ".weight", config.head_dim);
  }
  if (config.qkv_bias) {
    layer.qkv_bias = {Piece{vector(kQ, ".bias", config.q_size())},
                      Piece{vector(kK, ".bias", config.kv_size())},
                      Piece{vector(kV, ".bias", config.kv_size())}};
  }
  return layer;
}

// Of a folder with an encoder of images the text model's tensors, by the names that they have in a
// folder without.
TensorMap text_tensors(const TensorMap& all) {
  constexpr std::string_view kPart = "language_model.";
  TensorMap text;
  for (const auto& [name, tensor] : all) {
    if (const size_t at = name.find(kPart); at != name.npos) {
      text.emplace(name.substr(0, at) + name.substr(at + kPart.size()), tensor);
    } else if (name.find("vision_tower.") == name.npos &&
               name.find("multi_modal_projector.") == name.npos) {
      text.emplace(name, tensor);
    }
  }
  return text;
}

// Bit for bit; the same values in another type count as others, which changes no result.
bool same_values(const FileTensor& one, const FileTensor& other) {
  return one.dtype == other.dtype && std::ranges::equal(one.data, other.data);
}

std::vector<float> read_vector(const FileTensor& tensor) {
  std::vector<float> out(static_cast<size_t>(tensor.shape[0]));
  dequantize(tensor.dtype, tensor.data.data(), tensor.shape[0], out.data());
  return out;
}

// The rows of pieces stacked one after another.
std::vector<ops::QuantizedRow> rows_of(const Pieces& pieces) {
  std::vector<ops::QuantizedRow> rows;
  for (const Piece& piece : pieces) {
    const FileTensor& tensor = piece.tensor;
    const int64_t size = row_bytes(tensor.dtype, tensor.shape.back());
    for (int64_t row = 0; row < tensor.shape.front(); ++row) {
      rows.push_back({tensor.data.data() + piece.file_row(row) * size, tensor.dtype});
    }
  }
  return rows;
}

class FileCheckpoint final : public Checkpoint {
 public:
  explicit FileCheckpoint(const ModelFiles& files) : files_(files), config_(read_config(files)) {
    const bool gguf = files.gguf() != nullptr;
    if (!gguf) folder_.emplace(files.path());
    TensorMap text;
    if (config_.with_images) text = text_tensors(folder_->tensors());
    Finder finder(gguf,
                  gguf                  ? files.gguf()->tensors()
                  : config_.with_images ? text
                                        : folder_->tensors(),
                  files.path().string());
    const std::string head = cat(finder.name(kHead), ".weight");
    const std::vector<int64_t> table = {config_.vocab_size, config_.hidden_size};
    embedding_ = {Piece{finder.get(cat(finder.name(kEmbedding), ".weight"), table)}};
    final_norm_ = finder.get(cat(finder.name(kFinalNorm), ".weight"), {config_.hidden_size});
    if (config_.tied_head && finder.has(head)) {
      // Some writers leave a copy of the embedding in; another head, as of a merged adapter that
      // trained it, is the model's, whatever the config says.
      config_.tied_head = same_values(finder.get(head, table), embedding_.front().tensor);
    }
    head_ = config_.tied_head ? embedding_ : Pieces{Piece{finder.get(head, table)}};
    // Their converter permutes.
    const bool interleaved =
        gguf && (config_.family == Family::kLlama || config_.family == Family::kSmolLm3);
    for (int64_t l = 0; l < config_.num_layers; ++l) {
      layers_.push_back(find_layer(finder, config_, l, interleaved));
    }
    if (gguf) {
      // Part of the config, which has read them.
      for (const char* name :
           {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}) {
        finder.ignore(name);
      }
    }
    finder.refuse_leftovers();
  }

  const ModelConfig& config() const override { return config_; }

  std::vector<ops::QuantizedRow> linear_rows(int64_t layer, LinearSite site) const override {
    return rows_of(at(layer).linears[static_cast<size_t>(site)]);
  }
  std::vector<ops::QuantizedRow> embedding_rows() const override { return rows_of(embedding_); }
  std::vector<ops::QuantizedRow> head_rows() const override { return rows_of(head_); }

  std::vector<float> read_norm(int64_t layer, NormSite site) const override {
    const FileTensor& tensor = at(layer).norms[static_cast<size_t>(site)];
    require(!tensor.shape.empty(), "read_norm: ", family_name(config_.family), " has no such norm");
    return read_norm_vector(tensor);
  }

  std::vector<float> read_final_norm() const override { return read_norm_vector(final_norm_); }

  std::vector<float> read_qkv_bias(int64_t layer) const override {
    std::vector<float> bias;
    for (const Piece& piece : at(layer).qkv_bias) {
      const std::vector<float> part = read_vector(piece.tensor);
      bias.insert(bias.end(), part.begin(), part.end());
    }
    return bias;
  }

 private:
  // Gemma's folders hold what is to be added to 1; its GGUF files hold the sum.
  std::vector<float> read_norm_vector(const FileTensor& tensor) const {
    std::vector<float> weight = read_vector(tensor);
    if (config_.family == Family::kGemma3 && folder_) {
      for (float& w : weight) w += 1.0f;
    }
    return weight;
  }

  const Layer& at(int64_t layer) const {
    require(layer >= 0 && layer < config_.num_layers, "layer ", layer, " is not within [0, ",
            config_.num_layers, ")");
    return layers_[static_cast<size_t>(layer)];
  }

  // These keep the mapping under every FileTensor alive.
  ModelFiles files_;
  std::optional<io::SafetensorsFolder> folder_;
  ModelConfig config_;
  Pieces embedding_;
  Pieces head_;
  FileTensor final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace

LinearShape linear_shape(const ModelConfig& config, LinearSite site) {
  switch (site) {
    case LinearSite::kQkv:
      return {config.qkv_size(), config.hidden_size};
    case LinearSite::kO:
      return {config.hidden_size, config.q_size()};
    case LinearSite::kGateUp:
      return {2 * config.intermediate_size, config.hidden_size};
    case LinearSite::kDown:
      return {config.hidden_size, config.intermediate_size};
  }
  throw InvalidArgument("linear site: not one of the enumerators");
}

std::unique_ptr<Checkpoint> Checkpoint::open(const ModelFiles& files) {
  return std::make_unique<FileCheckpoint>(files);
}

}  // namespace alignpro::model
