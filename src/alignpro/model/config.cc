#include "alignpro/model/config.h"

#include <algorithm>
#include <cmath>

#include "alignpro/core/error.h"
#include "alignpro/model/config_readers.h"
#include "alignpro/model/end_of_text.h"

namespace alignpro::model {
namespace {

// Far above every model there is, far below where a product of two could overflow.
constexpr int64_t kMaxVocab = 10'000'000;
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 1000;
constexpr int64_t kMaxContext = 100'000'000;
constexpr int64_t kMaxHeadDim = 4096;

void check_factors(const std::vector<double>& factors, int64_t expected, const char* what,
                   const std::string& source) {
  require<FileError>(static_cast<int64_t>(factors.size()) == expected, source, ": ", what, " has ",
                     factors.size(), " values, expected ", expected,
                     " (half of the rotated lanes of a head)");
  for (const double factor : factors) {
    require<FileError>(std::isfinite(factor) && factor > 0, source, ": ", what, " holds ", factor,
                       ", expected values above 0");
  }
}

void validate_rope(const RopeConfig& rope, const ModelConfig& config, const std::string& source) {
  const auto positive = [&source](double value, const char* what) {
    require<FileError>(std::isfinite(value) && value > 0, source, ": ", what, " is ", value,
                       ", expected a number above 0");
  };
  require<FileError>(
      rope.rotary_dim >= 2 && rope.rotary_dim <= config.head_dim && rope.rotary_dim % 2 == 0,
      source, ": rotary dimension is ", rope.rotary_dim,
      ", expected an even number of 2 to the head dimension ", config.head_dim);
  positive(rope.theta, "rope theta");
  positive(rope.factor, "rope scaling factor");
  positive(rope.attention_factor, "rope attention factor");
  if (rope.scaling == RopeScaling::kLlama3) {
    positive(rope.low_freq_factor, "rope low_freq_factor");
    positive(rope.high_freq_factor, "rope high_freq_factor");
    require<FileError>(rope.high_freq_factor > rope.low_freq_factor, source,
                       ": rope high_freq_factor ", rope.high_freq_factor,
                       " must be above low_freq_factor ", rope.low_freq_factor);
  }
  if (rope.scaling == RopeScaling::kYarn) {
    positive(rope.beta_slow, "rope beta_slow");
    require<FileError>(rope.beta_fast > rope.beta_slow && rope.theta > 1, source,
                       ": yarn: expected beta_fast above beta_slow and a rope theta above 1, got ",
                       rope.beta_fast, ", ", rope.beta_slow, " and ", rope.theta);
  }
  if (rope.scaling == RopeScaling::kLlama3 || rope.scaling == RopeScaling::kLongrope ||
      rope.scaling == RopeScaling::kYarn) {
    require<FileError>(rope.original_context >= 1 && rope.original_context <= kMaxContext, source,
                       ": the context of pre-training is ", rope.original_context,
                       ", expected 1 to ", kMaxContext);
  }
  if (rope.scaling == RopeScaling::kLongrope) {
    check_factors(rope.short_factors, rope.rotary_dim / 2, "rope short_factor", source);
    check_factors(rope.long_factors, rope.rotary_dim / 2, "rope long_factor", source);
  }
  if (!rope.freq_factors.empty()) {
    check_factors(rope.freq_factors, rope.rotary_dim / 2, "rope_freqs.weight", source);
  }
}

}  // namespace

constexpr std::string_view kFamilies[] = {"llama", "mistral", "qwen2", "qwen3",
                                          "phi3",  "smollm3", "gemma3"};

std::string_view family_name(Family family) { return kFamilies[static_cast<size_t>(family)]; }

std::optional<Family> family_from_name(std::string_view name) {
  const auto* at = std::ranges::find(kFamilies, name);
  if (at == std::end(kFamilies)) return std::nullopt;
  return static_cast<Family>(at - kFamilies);
}

void apply_family(Family family, ModelConfig* config) {
  config->family = family;
  config->qkv_bias = family == Family::kQwen2;
  config->qk_norm = family == Family::kQwen3 || family == Family::kGemma3;
  config->fused_projections = family == Family::kPhi3;
  config->output_norms = config->gelu = config->scaled_embedding = family == Family::kGemma3;
}

std::vector<int64_t> every_nth_layer(int64_t interval, const ModelConfig& config,
                                     const std::string& what) {
  require<FileError>(interval >= 1, what, " is ", interval, ", expected 1 or more");
  std::vector<int64_t> layers;
  for (int64_t layer = 0; layer < std::min(config.num_layers, kMaxLayers); ++layer) {
    if ((layer + 1) % interval == 0) layers.push_back(layer);
  }
  return layers;
}

void set_global_layers(const std::vector<int64_t>& layers, ModelConfig* config) {
  config->local_layers.clear();
  for (int64_t layer = 0; layer < std::min(config->num_layers, kMaxLayers); ++layer) {
    if (std::ranges::find(layers, layer) == layers.end()) config->local_layers.push_back(layer);
  }
  if (config->local_layers.empty()) config->sliding_window = 0;
}

void set_bos(int64_t id, ModelConfig* config) {
  config->bos_id = id >= 0 && id < config->vocab_size ? static_cast<int32_t>(id) : -1;
}

double longrope_attention_factor(double scale, int64_t original_context) {
  if (!(scale > 1.0) || original_context < 2) return 1.0;
  return std::sqrt(1.0 + std::log(scale) / std::log(static_cast<double>(original_context)));
}

double yarn_attention_factor(double factor, double weight) {
  return factor > 1.0 ? 0.1 * weight * std::log(factor) + 1.0 : 1.0;
}

ModelConfig read_config(const ModelFiles& files) {
  ModelConfig config =
      files.gguf() != nullptr ? read_gguf_config(*files.gguf()) : read_hf_config(files);
  config.eos_ids = end_of_text_ids(files);
  return config;
}

void validate(const ModelConfig& config, const std::string& source) {
  const auto within = [&source](int64_t value, int64_t limit, const char* what) {
    require<FileError>(value >= 1 && value <= limit, source, ": ", what, " is ", value,
                       ", expected 1 to ", limit);
  };
  within(config.vocab_size, kMaxVocab, "the vocabulary size");
  within(config.hidden_size, kMaxWidth, "the hidden size");
  within(config.intermediate_size, kMaxWidth, "the intermediate size");
  within(config.num_layers, kMaxLayers, "the number of layers");
  within(config.num_heads, kMaxWidth, "the number of attention heads");
  within(config.num_kv_heads, config.num_heads, "the number of key-value heads");
  within(config.head_dim, kMaxHeadDim, "the head dimension");
  within(config.q_size(), kMaxWidth, "heads times head dimension");
  within(config.context_length, kMaxContext, "the context length");
  require<FileError>(config.num_heads % config.num_kv_heads == 0, source, ": ", config.num_heads,
                     " attention heads are no multiple of ", config.num_kv_heads,
                     " key-value heads");
  require<FileError>(config.sliding_window >= 0 && config.sliding_window <= kMaxContext, source,
                     ": the sliding window is ", config.sliding_window, ", expected 0 to ",
                     kMaxContext);
  require<FileError>(std::isfinite(config.rms_eps) && config.rms_eps > 0 && config.rms_eps < 1,
                     source, ": the RMSNorm epsilon is ", config.rms_eps,
                     ", expected a number between 0 and 1");
  const auto in_vocabulary = [&config](int64_t id) { return id >= 0 && id < config.vocab_size; };
  require<FileError>(config.bos_id == -1 || in_vocabulary(config.bos_id), source, ": the BOS id ",
                     config.bos_id, " is outside the vocabulary of ", config.vocab_size);
  validate_rope(config.rope, config, source);
  if (config.local_layers.empty()) return;
  validate_rope(config.local_rope, config, source);
  require<FileError>(config.sliding_window >= 1, source,
                     ": layers of sliding_attention need a sliding_window of 1 or more");
}

int64_t choose_context(const ModelConfig& config, int64_t wanted) {
  require(wanted >= 0, "context_length: expected a positive number of positions, got ", wanted);
  require(wanted <= config.context_length, "context_length: the model was made for ",
          config.context_length, " positions, ", wanted, " were asked for");
  if (wanted > 0) return wanted;
  return config.rope.scaling == RopeScaling::kLongrope ? config.rope.original_context
                                                       : config.context_length;
}

}  // namespace alignpro::model
