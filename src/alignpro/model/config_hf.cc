// config.json -> ModelConfig. What transformers would compute from the same file is the reference,
// defaults of absent keys included.

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/io/json.h"
#include "alignpro/io/mapped_file.h"
#include "alignpro/model/config_readers.h"

namespace alignpro::model {
namespace {

using io::Json;

constexpr double kMostPositions = 1e8;  // what validate() takes; beyond it the file lies

// A JSON object with the file's name, for messages. null counts as absent, as in transformers.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(&object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }

  bool has_key(std::string_view key) const { return object_->find(key) != nullptr; }

  const Json* find(std::string_view key) const {
    const Json* value = object_->find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }

  [[noreturn]] void fail(std::string_view key, std::string_view expected) const {
    const Json* value = object_->find(key);
    throw FileError(cat(where_, ": \"", key, "\" must be ", expected, ", it is ",
                        value == nullptr ? "missing" : value->kind()));
  }

  std::optional<int64_t> integer(std::string_view key) const {
    return read<int64_t>(key, &Json::integer, "an integer");
  }
  std::optional<double> number(std::string_view key) const {
    return read<double>(key, &Json::number, "a number");
  }
  std::optional<std::string> string(std::string_view key) const {
    return read<std::string>(key, &Json::string, "a string");
  }
  bool flag(std::string_view key, bool absent = false) const {
    return read<bool>(key, &Json::boolean, "true or false").value_or(absent);
  }
  int64_t required_integer(std::string_view key) const {
    return given(integer(key), key, "an integer");
  }
  double required_number(std::string_view key) const { return given(number(key), key, "a number"); }
  std::vector<double> required_numbers(std::string_view key) const {
    const Json* value = find(key);
    if (value == nullptr || value->array() == nullptr) fail(key, "a list of numbers");
    std::vector<double> out;
    for (const Json& item : *value->array()) {
      if (item.number() == nullptr) fail(key, "a list of numbers");
      out.push_back(*item.number());
    }
    return out;
  }

 private:
  template <typename T>
  std::optional<T> read(std::string_view key, const T* (Json::*reader)() const,
                        std::string_view expected) const {
    const Json* value = find(key);
    if (value == nullptr) return std::nullopt;
    const T* out = (value->*reader)();
    if (out == nullptr) fail(key, expected);
    return *out;
  }
  template <typename T>
  T given(std::optional<T> value, std::string_view key, std::string_view expected) const {
    if (!value) fail(key, expected);
    return *std::move(value);
  }

  const Json* object_;
  std::string where_;
};

Family read_family(const Fields& fields) {
  const std::optional<std::string> name = fields.string("model_type");
  if (!name) fields.fail("model_type", "a string");
  if (*name == "gemma3_text") return Family::kGemma3;
  const std::optional<Family> family = family_from_name(*name);
  require<FileError>(
      family.has_value() && *family != Family::kGemma3, fields.where(), ": model_type '",
      io::printable(*name),
      "' is not supported; llama, mistral, qwen2, qwen3, phi3, smollm3 and gemma3_text are");
  return *family;
}

// What gemma3_text may ask for and no file of it does: Gemma 2's caps, and attention to both sides.
void refuse_unsupported_gemma(const Fields& fields) {
  for (const char* cap : {"attn_logit_softcapping", "final_logit_softcapping"}) {
    require<FileError>(!fields.number(cap), fields.where(), ": ", cap, " is not supported");
  }
  require<FileError>(!fields.flag("use_bidirectional_attention"), fields.where(),
                     ": use_bidirectional_attention is not supported");
}

void refuse_quantization(const Fields& fields) {
  // Left behind by a 16-bit merge, it says nothing: tensors of these methods have types and names
  // by which they are refused. Of other methods the tensors may look like plain weights.
  constexpr std::array<std::string_view, 4> kVisible = {"bitsandbytes", "gptq", "awq", "fp8"};
  const Json* quantization = fields.find("quantization_config");
  const Json* method = quantization == nullptr ? nullptr : quantization->find("quant_method");
  if (method != nullptr && !method->is_null()) {
    const std::string* name = method->string();
    require<FileError>(name != nullptr && std::ranges::find(kVisible, *name) != kVisible.end(),
                       fields.where(), ": weights quantised by ",
                       name != nullptr ? io::printable(*name) : "quantization_config",
                       " are not supported; use the original folder or a GGUF file");
  }
}

void refuse_unsupported(const Fields& fields, Family family) {
  const bool gemma = family == Family::kGemma3;
  const char* const key = gemma ? "hidden_activation" : "hidden_act";
  const char* const computed = gemma ? "gelu_pytorch_tanh" : "silu";
  const std::string activation = fields.string(key).value_or(computed);
  require<FileError>(activation == computed, fields.where(), ": ", key, " '",
                     io::printable(activation), "' is not supported; ", computed, " is");
  // Qwen2's QKV bias belongs to the family; transformers reads no key for it.
  require<FileError>(family == Family::kQwen2 || !fields.flag("attention_bias"), fields.where(),
                     ": attention_bias is not supported for ", family_name(family));
  require<FileError>(!fields.flag("mlp_bias"), fields.where(), ": mlp_bias is not supported");
  // As files of embedding models have it.
  require<FileError>(fields.flag("is_causal", true), fields.where(),
                     ": attention that is not causal (is_causal) is not supported");
}

int64_t read_head_dim(const Fields& fields, const ModelConfig& config) {
  if (const std::optional<int64_t> explicit_dim = fields.integer("head_dim")) return *explicit_dim;
  if (config.family == Family::kQwen3) return 128;  // the family's default; not derived
  if (config.family == Family::kGemma3) return 256;
  require<FileError>(config.num_heads >= 1 && config.hidden_size % config.num_heads == 0,
                     fields.where(), ": hidden_size ", config.hidden_size,
                     " is no multiple of num_attention_heads ", config.num_heads,
                     ", and there is no head_dim");
  return config.hidden_size / config.num_heads;
}

// Layers that slide and layers that do not cannot be mixed here.
[[noreturn]] void refuse_mixed_windows(const Fields& fields, std::string_view key) {
  throw FileError(cat(fields.where(), ": ", key,
                      " mixes layers with and without a sliding window, which is not supported"));
}

// Whether each layer slides, by layer_types; empty without the list.
std::vector<bool> read_layer_types(const Fields& fields, const ModelConfig& config) {
  const Json* types = fields.find("layer_types");
  if (types == nullptr) return {};
  if (types->array() == nullptr) fields.fail("layer_types", "a list of strings");
  std::vector<bool> slides;
  for (const Json& type : *types->array()) {
    const std::string* name = type.string();
    if (name == nullptr) fields.fail("layer_types", "a list of strings");
    require<FileError>(*name == "full_attention" || *name == "sliding_attention", fields.where(),
                       ": layer type '", io::printable(*name),
                       "' is not supported; full_attention and sliding_attention are");
    slides.push_back(*name == "sliding_attention");
  }
  require<FileError>(std::ssize(slides) == config.num_layers, fields.where(), ": layer_types has ",
                     slides.size(), " entries for ", config.num_layers, " layers");
  return slides;
}

// Gemma 3: all but every sixth layer slides, or as its list says.
void read_local_layers(const Fields& fields, ModelConfig* config) {
  config->sliding_window = fields.integer("sliding_window").value_or(4096);
  const std::vector<bool> slides = read_layer_types(fields, *config);
  if (slides.empty()) {
    return set_global_layers(every_nth_layer(fields.integer("sliding_window_pattern").value_or(6),
                                             *config, fields.where() + ": sliding_window_pattern"),
                             config);
  }
  std::vector<int64_t> global;
  for (size_t layer = 0; layer < slides.size(); ++layer) {
    if (!slides[layer]) global.push_back(static_cast<int64_t>(layer));
  }
  set_global_layers(global, config);
}

int64_t read_sliding_window(const Fields& fields, const ModelConfig& config) {
  const bool qwen = config.family == Family::kQwen2 || config.family == Family::kQwen3;
  const bool smollm = config.family == Family::kSmolLm3;
  int64_t window = fields.integer("sliding_window").value_or(0);
  // Absent is not null: these classes have a window of 4096 unless the file says otherwise.
  if ((qwen || config.family == Family::kMistral) && !fields.has_key("sliding_window")) {
    window = 4096;
  }
  if (config.family == Family::kLlama || ((qwen || smollm) && !fields.flag("use_sliding_window")))
    window = 0;
  if (window < 0) fields.fail("sliding_window", "0 or more");

  if (const std::vector<bool> slides = read_layer_types(fields, config); !slides.empty()) {
    const int64_t sliding = std::ranges::count(slides, true), count = std::ssize(slides);
    if (sliding != 0 && sliding != count) refuse_mixed_windows(fields, "layer_types");
    require<FileError>(sliding != count || window != 0, fields.where(),
                       ": layer_types asks for sliding_attention, but no "
                       "sliding_window is in force");
    // Mistral and Phi-3 ignore the list and slide whenever there is a window.
    if (sliding == 0 && !qwen && !smollm && window != 0)
      refuse_mixed_windows(fields, "layer_types");
    return sliding == 0 ? 0 : window;
  }
  // Without the list, a SmolLM3 that slides does so in its unrotated layers.
  if (smollm && window != 0) refuse_mixed_windows(fields, "use_sliding_window");
  if (!qwen || window == 0) return window;
  // Without the list, Qwen slides in the layers from max_window_layers on.
  const int64_t first = fields.integer("max_window_layers").value_or(28);
  if (first >= config.num_layers) return 0;
  if (first > 0) refuse_mixed_windows(fields, "max_window_layers");
  return window;
}

// SmolLM3: a list of 0 (not rotated) and 1, or every so many-th layer. Bounded by the layers that
// validate() takes, which comes later.
std::vector<int64_t> read_unrotated_layers(const Fields& fields, const ModelConfig& config) {
  if (config.family != Family::kSmolLm3) return {};
  if (fields.find("no_rope_layers") == nullptr) {
    return every_nth_layer(fields.integer("no_rope_layer_interval").value_or(4), config,
                           fields.where() + ": no_rope_layer_interval");
  }
  const std::vector<double> rotated = fields.required_numbers("no_rope_layers");
  const auto count = static_cast<int64_t>(rotated.size());
  require<FileError>(count >= config.num_layers, fields.where(), ": no_rope_layers has ", count,
                     " entries for ", config.num_layers, " layers");
  std::vector<int64_t> layers;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    if (rotated[static_cast<size_t>(layer)] == 0.0) layers.push_back(layer);
  }
  return layers;
}

RopeScaling read_scaling_type(const Fields& fields, Family family) {
  std::optional<std::string> name = fields.string("rope_type");
  if (!name) name = fields.string("type");
  if (!name || *name == "default" || *name == "none") return RopeScaling::kNone;
  if (*name == "linear") return RopeScaling::kLinear;
  if (*name == "llama3") return RopeScaling::kLlama3;
  // Early Phi-3 files say "su" or "yarn" and mean longrope.
  const bool phi_alias = family == Family::kPhi3 && (*name == "su" || *name == "yarn");
  if (*name == "longrope" || phi_alias) return RopeScaling::kLongrope;
  if (*name == "yarn") return RopeScaling::kYarn;
  // Changes nothing up to max_position_embeddings, and no context here is longer.
  if (*name == "dynamic") return RopeScaling::kNone;
  throw FileError(
      cat(fields.where(), ": rope scaling '", io::printable(*name),
          "' is not supported; default, linear, dynamic, llama3, longrope and yarn are"));
}

// The object at a key of another; an empty one where there is none.
Fields inner_fields(const Fields& fields, std::string_view key) {
  static const Json kEmpty{Json::Value(Json::Object())};
  const Json* inner = fields.find(key);
  if (inner != nullptr && inner->object() == nullptr) fields.fail(key, "an object");
  return {inner == nullptr ? kEmpty : *inner, cat(fields.where(), ": ", key)};
}

// One dictionary in transformers 5; before that, scaling apart from theta. Either may be absent.
Fields rope_fields(const Fields& fields) {
  const Json* scaling = fields.find("rope_scaling");
  const bool none = scaling == nullptr || (scaling->object() && scaling->object()->empty());
  return inner_fields(fields, none ? "rope_parameters" : "rope_scaling");
}

// scaling: what the file says of these layers' rope; theta: where it does not say it there.
RopeConfig read_rope(const Fields& fields, const Fields& scaling, double theta,
                     const ModelConfig& config) {
  require<FileError>(
      scaling.find("full_attention") == nullptr && scaling.find("sliding_attention") == nullptr,
      scaling.where(), " differs by layer type, which is not supported");

  RopeConfig rope;
  rope.theta = scaling.number("rope_theta").value_or(theta);
  const double part = scaling.number("partial_rotary_factor")
                          .value_or(fields.number("partial_rotary_factor").value_or(1.0));
  require<FileError>(part > 0 && part <= 1, fields.where(), ": partial_rotary_factor is ", part,
                     ", expected above 0 and at most 1");
  require<FileError>(part == 1.0 || config.family == Family::kPhi3, fields.where(),
                     ": partial_rotary_factor is not supported for ", family_name(config.family));
  rope.rotary_dim = config.head_dim;
  if (part != 1.0) {
    // Bounded first: the product of a lying head_dim might not fit.
    const auto lanes = static_cast<double>(std::min<int64_t>(config.head_dim, 1 << 20));
    rope.rotary_dim = static_cast<int64_t>(lanes * part);
  }

  rope.scaling = read_scaling_type(scaling, config.family);
  if (rope.scaling == RopeScaling::kNone) return rope;

  if (rope.scaling == RopeScaling::kLinear) {
    rope.factor = scaling.required_number("factor");
    return rope;
  }
  // A value beside the dictionary wins over one inside; Phi-3's class always has one beside.
  const int64_t fallback = config.family == Family::kPhi3 ? 4096 : config.context_length;
  std::optional<int64_t> original = fields.integer("original_max_position_embeddings");
  if (!original && config.family != Family::kPhi3) {
    original = scaling.integer("original_max_position_embeddings");
  }
  rope.original_context = original.value_or(fallback);
  if (rope.scaling == RopeScaling::kLlama3) {
    rope.factor = scaling.required_number("factor");
    rope.low_freq_factor = scaling.required_number("low_freq_factor");
    rope.high_freq_factor = scaling.required_number("high_freq_factor");
    return rope;
  }
  if (rope.scaling == RopeScaling::kYarn) {
    rope.factor = scaling.number("factor").value_or(static_cast<double>(config.context_length) /
                                                    static_cast<double>(rope.original_context));
    const double mscale = scaling.number("mscale").value_or(0.0);
    const double mscale_all = scaling.number("mscale_all_dim").value_or(0.0);
    const double inferred = mscale != 0.0 && mscale_all != 0.0
                                ? yarn_attention_factor(rope.factor, mscale) /
                                      yarn_attention_factor(rope.factor, mscale_all)
                                : yarn_attention_factor(rope.factor);
    rope.attention_factor = scaling.number("attention_factor").value_or(inferred);
    rope.beta_fast = scaling.number("beta_fast").value_or(rope.beta_fast);
    rope.beta_slow = scaling.number("beta_slow").value_or(rope.beta_slow);
    rope.whole_lanes = scaling.flag("truncate", true);
    return rope;
  }
  rope.short_factors = scaling.required_numbers("short_factor");
  rope.long_factors = scaling.required_numbers("long_factor");
  const double scale = scaling.number("factor").value_or(
      static_cast<double>(config.context_length) / static_cast<double>(rope.original_context));
  rope.attention_factor = scaling.number("attention_factor")
                              .value_or(longrope_attention_factor(scale, rope.original_context));
  // A context that ends before pre-training's never reaches the long factors.
  rope.original_context = std::min(rope.original_context, config.context_length);
  return rope;
}

void read_ropes(const Fields& fields, ModelConfig* config) {
  const Fields scaling = rope_fields(fields);
  const double theta = fields.number("rope_theta")
                           .value_or(config->family == Family::kSmolLm3  ? 2e6
                                     : config->family == Family::kGemma3 ? 1e6
                                                                         : 10000.0);
  if (config->family != Family::kGemma3) {
    config->rope = read_rope(fields, scaling, theta, *config);
    return;
  }
  // By layer type in transformers 5; before that, local layers had a theta alone.
  const bool by_type = scaling.has_key("full_attention") || scaling.has_key("sliding_attention");
  config->rope = read_rope(fields, by_type ? inner_fields(scaling, "full_attention") : scaling,
                           theta, *config);
  const double local = fields.number("rope_local_base_freq").value_or(10000.0);
  config->local_rope =
      read_rope(fields, inner_fields(scaling, "sliding_attention"), local, *config);
}

}  // namespace

ModelConfig read_hf_config(const ModelFiles& files) {
  const std::string path = (files.path() / "config.json").string();
  const Json* root = files.json("config.json");
  require<FileError>(root != nullptr, path,
                     ": no such file; a model folder holds config.json, *.safetensors and "
                     "tokenizer.json");
  const Fields file(*root, path);
  refuse_quantization(file);

  ModelConfig config;
  config.with_images = file.string("model_type") == "gemma3";
  const Fields fields = config.with_images ? inner_fields(file, "text_config") : file;
  apply_family(read_family(fields), &config);
  refuse_unsupported(fields, config.family);
  // Published files with an encoder of images leave out what Gemma's class has by itself.
  const bool gemma = config.family == Family::kGemma3;
  const auto size = [&](const char* key, int64_t of_gemma) {
    return gemma ? fields.integer(key).value_or(of_gemma) : fields.required_integer(key);
  };
  config.vocab_size = size("vocab_size", 262208);
  config.hidden_size = fields.required_integer("hidden_size");
  config.intermediate_size = fields.required_integer("intermediate_size");
  config.num_layers = fields.required_integer("num_hidden_layers");
  config.num_heads = size("num_attention_heads", 8);
  config.num_kv_heads =
      fields.integer("num_key_value_heads").value_or(gemma ? 4 : config.num_heads);
  config.head_dim = read_head_dim(fields, config);
  config.context_length = size("max_position_embeddings", 131072);
  if (gemma) {
    refuse_unsupported_gemma(fields);
    read_local_layers(fields, &config);
    config.query_scalar = fields.number("query_pre_attn_scalar").value_or(256.0);
    if (!(config.query_scalar > 0.0)) fields.fail("query_pre_attn_scalar", "a number above 0");
  } else {
    config.sliding_window = read_sliding_window(fields, config);
  }
  config.rms_eps =
      fields.number("rms_norm_eps").value_or(config.family == Family::kPhi3 ? 1e-5 : 1e-6);
  config.tied_head = fields.flag(
      "tie_word_embeddings", config.family == Family::kSmolLm3 || config.family == Family::kGemma3);
  config.unrotated_layers = read_unrotated_layers(fields, config);
  read_ropes(fields, &config);
  if (config.rope.scaling == RopeScaling::kYarn) {
    // Qwen's pages add rope_scaling alone and leave max_position_embeddings at pre-training's.
    const double stretched = config.rope.factor * static_cast<double>(config.rope.original_context);
    if (stretched < kMostPositions) {
      config.context_length =
          std::max(config.context_length, static_cast<int64_t>(std::lround(stretched)));
    }
  }
  set_bos(fields.integer("bos_token_id").value_or(gemma ? 2 : -1), &config);
  validate(config, path);
  return config;
}

}  // namespace alignpro::model
