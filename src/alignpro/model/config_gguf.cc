// GGUF metadata -> ModelConfig. Keys: github.com/ggml-org/ggml, docs/gguf.md.

#include <algorithm>
#include <array>

#include "alignpro/core/error.h"
#include "alignpro/model/config_readers.h"

namespace alignpro::model {
namespace {

// The name of an architecture's key: "{arch}.{name}".
struct ArchKey {
  std::string prefix;

  std::string operator()(std::string_view name) const { return cat(prefix, ".", name); }
};

// What a llama-like file may ask for and no family here expresses (mixtures of experts, mixed
// windows, soft caps, scaled residuals).
void refuse_unsupported(const io::GgufFile& file, const ArchKey& key, Family family) {
  constexpr std::array<std::string_view, 7> kRefused = {
      "attention.scale", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
      "residual_scale",  "embedding_scale",        "rope.dimension_sections"};
  for (const std::string_view name : kRefused) {
    require<FileError>(file.find(key(name)) == nullptr, file.name(), ": metadata key '", key(name),
                       "' is not supported");
  }
  const std::string pattern = key("attention.sliding_window_pattern");
  require<FileError>(family == Family::kGemma3 || file.find(pattern) == nullptr, file.name(),
                     ": metadata key '", pattern, "' is not supported");
  require<FileError>(file.find_boolean(key("attention.causal")).value_or(true), file.name(),
                     ": attention that is not causal ('", key("attention.causal"),
                     "') is not supported");
  require<FileError>(file.find_integer(key("expert_count")).value_or(0) == 0, file.name(),
                     ": mixtures of experts ('", key("expert_count"), "') are not supported");
  require<FileError>(file.find_integer("split.count").value_or(1) <= 1, file.name(),
                     ": this is one part of a split GGUF; join the parts first "
                     "(llama-gguf-split --merge)");
}

// The factors of scaled rope, stored as a tensor; empty where there is none.
std::vector<double> read_factors(const io::GgufFile& file, std::string_view name,
                                 int64_t rotary_dim) {
  const auto at = file.tensors().find(name);
  if (at == file.tensors().end()) return {};
  const io::FileTensor& tensor = at->second;
  require<FileError>(tensor.shape.size() == 1 && tensor.shape[0] == rotary_dim / 2, file.name(),
                     ": tensor '", name, "' has shape ", io::shape_text(tensor.shape),
                     ", expected [", rotary_dim / 2, "]");
  std::vector<float> values(static_cast<size_t>(tensor.shape[0]));
  dequantize(tensor.dtype, tensor.data.data(), tensor.shape[0], values.data());
  return {values.begin(), values.end()};
}

// Gemma 3's local layers; as llama.cpp reads keys that older writers leave out.
void read_local_layers(const io::GgufFile& file, const ArchKey& key, ModelConfig* config) {
  const std::string pattern = key("attention.sliding_window_pattern");
  set_global_layers(every_nth_layer(file.find_integer(pattern).value_or(6), *config,
                                    cat(file.name(), ": ", pattern)),
                    config);
  config->local_rope.theta = file.find_number(key("rope.freq_base_swa")).value_or(10000.0);
  config->local_rope.rotary_dim = config->rope.rotary_dim;
  // The file has no key for it: the one of 62 layers (27B) goes by its width and heads, not by its
  // head dimension.
  if (config->num_layers == 62 && config->num_heads > 0) {
    config->query_scalar = static_cast<double>(config->hidden_size / config->num_heads);
  }
}

RopeConfig read_rope(const io::GgufFile& file, const ArchKey& key, const ModelConfig& config) {
  RopeConfig rope;
  rope.theta = file.find_number(key("rope.freq_base")).value_or(10000.0);
  rope.rotary_dim = file.find_integer(key("rope.dimension_count")).value_or(config.head_dim);
  require<FileError>(config.family != Family::kLlama || rope.rotary_dim == config.head_dim,
                     file.name(), ": ", key("rope.dimension_count"), " is ", rope.rotary_dim,
                     ", expected the head dimension ", config.head_dim);
  rope.freq_factors = read_factors(file, "rope_freqs.weight", rope.rotary_dim);
  rope.short_factors = read_factors(file, "rope_factors_short.weight", rope.rotary_dim);
  rope.long_factors = read_factors(file, "rope_factors_long.weight", rope.rotary_dim);
  const bool has_long = !rope.short_factors.empty() || !rope.long_factors.empty();

  // A factor without a type is linear: older writers have only "scale_linear" or "factor".
  std::optional<double> factor = file.find_number(key("rope.scaling.factor"));
  if (!factor) factor = file.find_number(key("rope.scale_linear"));
  const bool scaled = factor && *factor != 0.0 && *factor != 1.0;
  const std::string type = file.find_string(key("rope.scaling.type"))
                               .value_or(has_long ? "longrope"
                                         : scaled ? "linear"
                                                  : "none");
  if (type == "linear" && !has_long) {
    rope.scaling = scaled ? RopeScaling::kLinear : RopeScaling::kNone;
    if (scaled) rope.factor = *factor;
  } else if (type == "yarn" && !has_long && scaled) {
    require<FileError>(
        file.find_number(key("rope.scaling.yarn_ext_factor")).value_or(1.0) == 1.0 &&
            file.find_number(key("rope.scaling.yarn_log_multiplier")).value_or(0.0) == 0.0,
        file.name(), ": yarn with yarn_ext_factor or yarn_log_multiplier is not supported");
    rope.scaling = RopeScaling::kYarn;
    rope.factor = *factor;
    rope.original_context = file.find_integer(key("rope.scaling.original_context_length"))
                                .value_or(config.context_length);
    const auto optional = [&](const char* name, double absent) {
      return file.find_number(key(name)).value_or(absent);
    };
    rope.beta_fast = optional("rope.scaling.yarn_beta_fast", rope.beta_fast);
    rope.beta_slow = optional("rope.scaling.yarn_beta_slow", rope.beta_slow);
    rope.attention_factor = optional("rope.scaling.attn_factor", 1.0) *
                            optional("rope.scaling.yarn_attn_factor", 1.0) *
                            yarn_attention_factor(rope.factor);
  } else if (type == "longrope") {
    rope.scaling = RopeScaling::kLongrope;
    rope.original_context = file.integer(key("rope.scaling.original_context_length"));
    const double scale =
        static_cast<double>(config.context_length) / static_cast<double>(rope.original_context);
    rope.attention_factor = file.find_number(key("rope.scaling.attn_factor"))
                                .value_or(longrope_attention_factor(scale, rope.original_context));
    // A context that ends before pre-training's never reaches the long factors.
    rope.original_context = std::min(rope.original_context, config.context_length);
  } else if ((type != "none" && type != "yarn") || has_long) {
    throw FileError(cat(file.name(), ": rope scaling '", io::printable(type), "'",
                        has_long ? " with rope_factors tensors" : "",
                        " is not supported; none, linear, longrope and yarn are"));
  }
  return rope;
}

}  // namespace

ModelConfig read_gguf_config(const io::GgufFile& file) {
  const std::string arch = file.string("general.architecture");
  const std::optional<Family> family = family_from_name(arch);
  // Mistral files say "llama": the two have one graph.
  require<FileError>(family && *family != Family::kMistral, file.name(), ": architecture '",
                     io::printable(arch),
                     "' is not supported; llama, qwen2, qwen3, phi3, smollm3 and gemma3 are");
  const ArchKey key{arch};
  refuse_unsupported(file, key, *family);

  ModelConfig config;
  apply_family(*family, &config);
  const auto embedding = file.tensors().find("token_embd.weight");
  require<FileError>(embedding != file.tensors().end() && embedding->second.shape.size() == 2,
                     file.name(), ": expected a matrix 'token_embd.weight'");
  config.vocab_size = embedding->second.shape[0];
  const int64_t declared = file.find_integer(key("vocab_size")).value_or(config.vocab_size);
  require<FileError>(declared == config.vocab_size, file.name(), ": ", key("vocab_size"), " is ",
                     declared, ", but token_embd.weight has ", config.vocab_size, " rows");
  config.hidden_size = file.integer(key("embedding_length"));
  config.intermediate_size = file.integer(key("feed_forward_length"));
  config.num_layers = file.integer(key("block_count"));
  config.num_heads = file.integer(key("attention.head_count"));
  config.num_kv_heads =
      file.find_integer(key("attention.head_count_kv")).value_or(config.num_heads);
  if (const std::optional<int64_t> key_length = file.find_integer(key("attention.key_length"))) {
    config.head_dim = *key_length;
  } else if (config.num_heads >= 1 && config.hidden_size % config.num_heads == 0) {
    config.head_dim = config.hidden_size / config.num_heads;
  } else {
    throw FileError(cat(file.name(), ": embedding_length ", config.hidden_size,
                        " is no multiple of attention.head_count ", config.num_heads,
                        ", and there is no attention.key_length"));
  }
  const int64_t value_length =
      file.find_integer(key("attention.value_length")).value_or(config.head_dim);
  require<FileError>(value_length == config.head_dim, file.name(), ": attention.value_length ",
                     value_length, " differs from the keys' ", config.head_dim,
                     ", which is not supported");
  config.context_length = file.integer(key("context_length"));
  config.sliding_window = file.find_integer(key("attention.sliding_window")).value_or(0);
  config.rms_eps = file.number(key("attention.layer_norm_rms_epsilon"));
  config.tied_head = !file.tensors().contains("output.weight");
  config.rope = read_rope(file, key, config);
  // The file has no key for it: llama.cpp leaves every fourth layer of a SmolLM3 unrotated.
  if (*family == Family::kSmolLm3) {
    config.unrotated_layers = every_nth_layer(4, config, file.name());
  }
  if (*family == Family::kGemma3) read_local_layers(file, key, &config);
  set_bos(file.find_integer("tokenizer.ggml.bos_token_id").value_or(-1), &config);
  validate(config, file.name());
  return config;
}

}  // namespace alignpro::model
