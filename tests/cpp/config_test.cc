// config.json and generation_config.json; a GGUF's config is in checkpoint_test.

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/model/config_readers.h"
#include "alignpro/model/end_of_text.h"
#include "model_file_builder.h"

using namespace alignpro;
using build::JsonFields;
using build::TempFolder;
using model::ModelConfig;

namespace {

// The tiny config with some fields replaced, added or, where the text is empty, left out.
ModelConfig config_with(const JsonFields& changes, const std::string& generation = "") {
  const TempFolder folder;
  JsonFields fields = build::tiny_config();
  for (const auto& [key, value] : changes) fields[key] = value;
  build::write(folder / "config.json", build::json(fields));
  if (!generation.empty()) build::write(folder / "generation_config.json", generation);
  return model::read_config(folder.path);
}

}  // namespace

TEST_CASE("config eos and bos") {
  CHECK((config_with({{"eos_token_id", "[3, 2, 3]"}}).eos_ids == std::vector<int32_t>{3, 2}));
  CHECK((config_with({}, R"({"eos_token_id": [4, 1]})").eos_ids == std::vector<int32_t>{4, 1, 2}));
  CHECK((config_with({}, R"({"eos_token_id": null})").eos_ids == std::vector<int32_t>{2}));
  CHECK(config_with({{"eos_token_id", "32000"}}).eos_ids.empty());  // no logit reaches it
  CHECK(config_with({{"eos_token_id", "null"}}).eos_ids.empty());
  CHECK_EQ(config_with({{"bos_token_id", "null"}}).bos_id, -1);
  CHECK_THROWS_WITH_AS((void)(config_with({{"eos_token_id", "\"</s>\""}})),
                       doctest::Contains("an integer or a list"), FileError);
}

TEST_CASE("end of text of a folder") {
  const auto ids_of = [](const std::map<std::string, std::string>& files) {
    const TempFolder folder;
    for (const auto& [name, text] : files) build::write(folder / name, text);
    return model::end_of_text_ids(folder.path);
  };
  using Ids = std::vector<int32_t>;
  const std::string added = R"({"added_tokens": [{"id": 7, "content": "</s>", "special": false},
      {"id": 8, "content": "<|im_end|>"}, {"id": 9, "content": "<|IM_END|>", "special": true},
      {"id": 10, "content": "<stop>", "special": true}]})";
  CHECK_EQ(ids_of({}), Ids{});
  CHECK_EQ(ids_of({{"tokenizer.json", added}}), Ids{8});
  // The tokenizer's EOS is a text, or an object with one; by either file, and by a list of ids.
  CHECK_EQ(
      ids_of({{"tokenizer.json", added}, {"tokenizer_config.json", R"({"eos_token": "</s>"})"}}),
      Ids{7, 8});
  CHECK_EQ(ids_of({{"tokenizer.json", added},
                   {"special_tokens_map.json", R"({"eos_token": {"content": "<stop>"}})"},
                   {"generation_config.json", R"({"eos_token_id": [3, 10]})"},
                   {"config.json", R"({"eos_token_id": 4, "vocab_size": 10})"}}),
           Ids{3, 4, 8});
  // Tokens that tokenizer_config.json alone lists, and such as stand in the vocabulary.
  CHECK_EQ(ids_of({{"tokenizer_config.json",
                    R"({"eos_token": "<stop>", "added_tokens_decoder": {
                        "5": {"content": "<stop>"}, "x": {"content": "<|eot_id|>"},
                        "6": {"content": "</s>", "special": true}}})"}}),
           Ids{5, 6});
  CHECK_EQ(ids_of({{"tokenizer.json",
                    R"({"model": {"vocab": {"<|eom_id|>": 2, "</s>": 3, "<|end|>": 1}}})"}}),
           Ids{1, 2});
  CHECK_EQ(ids_of({{"tokenizer.json", R"({"model": {"vocab": [["a", 0.0], ["<|end|>", -1.5]]}})"}}),
           Ids{1});
}

TEST_CASE("config families") {
  const ModelConfig qwen2 = config_with({{"model_type", "\"qwen2\""}});
  CHECK((qwen2.qkv_bias && !qwen2.qk_norm && qwen2.sliding_window == 0));
  const ModelConfig qwen3 = config_with({{"model_type", "\"qwen3\""}, {"head_dim", "6"}});
  CHECK((qwen3.qk_norm && !qwen3.qkv_bias && qwen3.head_dim == 6));
  CHECK_EQ(config_with({{"model_type", "\"qwen3\""}}).head_dim, 128);
  CHECK(config_with({{"model_type", "\"phi3\""}}).fused_projections);
  const auto smollm3 = [](JsonFields changes) {
    changes.insert({{"model_type", "\"smollm3\""}, {"num_hidden_layers", "9"}});
    return config_with(changes);
  };
  CHECK_EQ(smollm3({}).unrotated_layers, std::vector<int64_t>{3, 7});
  CHECK((smollm3({}).attention_kind(2) == 0 && smollm3({}).attention_kind(3) == 1));
  CHECK((smollm3({}).tied_head && smollm3({}).rope.theta == 2e6));  // the class's defaults
  CHECK_EQ(smollm3({{"no_rope_layer_interval", "5"}}).unrotated_layers, std::vector<int64_t>{4});
  CHECK_EQ(smollm3({{"no_rope_layers", "[1, 0, 1, 1, 1, 1, 0, 1, 1, 0]"}}).unrotated_layers,
           std::vector<int64_t>{1, 6});
  CHECK_THROWS_WITH_AS((void)(smollm3({{"no_rope_layers", "[1, 0]"}})),
                       doctest::Contains("no_rope_layers has 2 entries for 9 layers"), FileError);
  CHECK_THROWS_WITH_AS((void)(smollm3({{"no_rope_layer_interval", "0"}})),
                       doctest::Contains("no_rope_layer_interval is 0, expected 1 or more"),
                       FileError);
  CHECK_THROWS_WITH_AS((void)(smollm3({{"use_sliding_window", "true"}, {"sliding_window", "8"}})),
                       doctest::Contains("mixes layers with and without a sliding window"),
                       FileError);
  CHECK_EQ(config_with({{"num_key_value_heads", "null"}}).num_kv_heads, 2);
  CHECK_THROWS_WITH_AS((void)(config_with({{"model_type", "\"gpt2\""}})),
                       doctest::Contains("model_type 'gpt2'"), FileError);
  CHECK_THROWS_WITH_AS((void)(config_with({{"model_type", ""}})),
                       doctest::Contains("\"model_type\" must be a string"), FileError);
}

TEST_CASE("config of Gemma 3") {
  const auto gemma = [](JsonFields changes) {
    changes.insert({{"model_type", "\"gemma3_text\""}, {"num_hidden_layers", "7"}});
    return config_with(changes);
  };
  const ModelConfig plain = gemma({});  // the class's defaults, as transformers 4 wrote files
  CHECK((plain.qk_norm && plain.output_norms && plain.gelu && plain.scaled_embedding));
  CHECK((plain.tied_head && plain.head_dim == 256 && plain.query_scalar == 256.0));
  CHECK((plain.sliding_window == 4096 &&
         plain.local_layers == std::vector<int64_t>{0, 1, 2, 3, 4, 6}));
  CHECK((plain.attention_kind(0) == 1 && plain.attention_kind(5) == 0));
  CHECK((plain.rope.theta == 1e6 && plain.local_rope.theta == 1e4));
  const ModelConfig old = gemma({{"rope_theta", "2e6"},
                                 {"rope_local_base_freq", "3e4"},
                                 {"rope_scaling", R"({"rope_type": "linear", "factor": 8.0})"},
                                 {"sliding_window_pattern", "3"}});
  CHECK((old.rope.theta == 2e6 && old.rope.scaling == model::RopeScaling::kLinear &&
         old.rope.factor == 8));
  CHECK((old.local_rope.theta == 3e4 && old.local_rope.scaling == model::RopeScaling::kNone));
  CHECK_EQ(old.local_layers, std::vector<int64_t>{0, 1, 3, 4, 6});
  const ModelConfig by_type =
      gemma({{"num_hidden_layers", "2"},
             {"layer_types", R"(["full_attention", "sliding_attention"])"},
             {"query_pre_attn_scalar", "168"},
             {"rope_parameters", R"({"full_attention": {"rope_type": "linear", "rope_theta": 5e6,
                                                        "factor": 2.0},
                                     "sliding_attention": {"rope_theta": 7e3}})"}});
  CHECK((by_type.rope.theta == 5e6 && by_type.rope.factor == 2.0 && by_type.query_scalar == 168));
  CHECK((by_type.local_rope.theta == 7e3 && by_type.local_layers == std::vector<int64_t>{1}));
  // All layers global: none has the window.
  CHECK((gemma({{"sliding_window_pattern", "1"}}).sliding_window == 0));
  const auto refuses = [&](const char* key, const char* value, const char* message) {
    CHECK_THROWS_WITH_AS((void)(gemma({{key, value}})), doctest::Contains(message), FileError);
  };
  refuses("final_logit_softcapping", "30.0", "final_logit_softcapping is not supported");
  refuses("attn_logit_softcapping", "50.0", "attn_logit_softcapping is not supported");
  refuses("use_bidirectional_attention", "true", "use_bidirectional_attention is not supported");
  refuses("hidden_activation", "\"gelu\"", "hidden_activation 'gelu' is not supported; gelu_py");
  refuses("attention_bias", "true", "attention_bias is not supported for gemma3");
  refuses("sliding_window", "0", "layers of sliding_attention need a sliding_window of 1 or more");
  refuses("query_pre_attn_scalar", "0", "\"query_pre_attn_scalar\" must be a number above 0");
  refuses("rope_local_base_freq", "0", "rope theta is 0, expected a number above 0");
  refuses("model_type", "\"gemma3\"", "text_config: \"model_type\" must be a string");
  const ModelConfig published =
      config_with({{"model_type", "\"gemma3\""},
                   {"text_config",
                    R"({"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34,
                           "intermediate_size": 10240, "sliding_window": 1024,
                           "rope_scaling": {"factor": 8.0, "rope_type": "linear"}})"}});
  CHECK((published.with_images && published.vocab_size == 262208 && published.bos_id == 2));
  CHECK((published.num_heads == 8 && published.num_kv_heads == 4 && published.head_dim == 256));
  CHECK((published.context_length == 131072 && published.local_layers.size() == 29));
  CHECK((published.hidden_size == 2560 && published.rope.factor == 8.0 && published.tied_head));
  refuses("model_type", "\"gemma2\"", "model_type 'gemma2' is not supported; ");
}

TEST_CASE("config sliding windows") {
  const auto window = [](JsonFields changes) { return config_with(changes).sliding_window; };
  const std::string mistral = "\"mistral\"", qwen = "\"qwen2\"";
  CHECK_EQ(window({{"model_type", mistral}}), 4096);  // the class's default: absent is not null
  CHECK_EQ(window({{"model_type", mistral}, {"sliding_window", "null"}}), 0);
  CHECK_EQ(window({{"model_type", mistral}, {"sliding_window", "8"}}), 8);
  CHECK_EQ(window({{"model_type", "\"phi3\""}, {"sliding_window", "8"}}), 8);
  CHECK_EQ(window({{"model_type", qwen}, {"sliding_window", "8"}}), 0);
  const JsonFields sliding = {{"model_type", qwen},
                              {"sliding_window", "8"},
                              {"use_sliding_window", "true"},
                              {"num_hidden_layers", "2"}};
  const auto with = [&](const char* key, const char* value) {
    JsonFields fields = sliding;
    fields[key] = value;
    return window(fields);
  };
  CHECK_EQ(with("max_window_layers", "2"), 0);
  CHECK_EQ(with("max_window_layers", "0"), 8);
  CHECK_THROWS_WITH_AS((void)(with("max_window_layers", "1")),
                       doctest::Contains("max_window_layers mixes layers"), FileError);
  CHECK_EQ(with("layer_types", R"(["sliding_attention", "sliding_attention"])"), 8);
  CHECK_EQ(with("layer_types", R"(["full_attention", "full_attention"])"), 0);
  CHECK_THROWS_WITH_AS((void)(with("layer_types", R"(["full_attention", "sliding_attention"])")),
                       doctest::Contains("layer_types mixes layers"), FileError);
  CHECK_THROWS_WITH_AS((void)(with("layer_types", R"(["full_attention"])")),
                       doctest::Contains("1 entries for 2 layers"), FileError);
  CHECK_THROWS_WITH_AS((void)(with("layer_types", R"(["linear_attention", "full_attention"])")),
                       doctest::Contains("layer type 'linear_attention'"), FileError);
}

TEST_CASE("config rope") {
  CHECK_EQ(config_with({}).rope.theta, 10000.0);
  CHECK_EQ(config_with({{"rope_theta", "5e5"}}).rope.theta, 5e5);
  const model::RopeConfig v5 =
      config_with(
          {{"rope_parameters", R"({"rope_theta": 7.0, "rope_type": "linear", "factor": 2})"}})
          .rope;
  CHECK((v5.scaling == model::RopeScaling::kLinear && v5.theta == 7.0 && v5.factor == 2.0));
  const model::RopeConfig llama3 =
      config_with(
          {{"rope_scaling", R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16})"}})
          .rope;
  CHECK((llama3.scaling == model::RopeScaling::kLlama3 && llama3.original_context == 16));
  const JsonFields phi = {{"model_type", "\"phi3\""},
                          {"hidden_size", "16"},
                          {"partial_rotary_factor", "0.5"},
                          {"original_max_position_embeddings", "16"},
                          {"rope_scaling", R"({"type": "su", "short_factor": [1.0, 2],
                                               "long_factor": [3.0, 4.0]})"}};
  const model::RopeConfig longrope = config_with(phi).rope;
  CHECK((longrope.scaling == model::RopeScaling::kLongrope && longrope.rotary_dim == 4));
  CHECK(std::abs(longrope.attention_factor - std::sqrt(1.5)) < 1e-12);
  CHECK((longrope.long_factors == std::vector<double>{3.0, 4.0}));
  JsonFields wrong = phi;
  wrong["partial_rotary_factor"] = "1.0";
  CHECK_THROWS_WITH_AS((void)(config_with(wrong)),
                       doctest::Contains("short_factor has 2 values, expected 4"), FileError);
  CHECK_THROWS_WITH_AS(
      (void)(config_with({{"rope_scaling", R"({"type": "proportional", "factor": 4.0})"}})),
      doctest::Contains("rope scaling 'proportional' is not supported"), FileError);
  CHECK(config_with({{"rope_scaling", R"({"type": "dynamic", "factor": 4.0})"}}).rope.scaling ==
        model::RopeScaling::kNone);
  CHECK_THROWS_WITH_AS((void)(config_with({{"rope_scaling", R"({"type": "linear"})"}})),
                       doctest::Contains("\"factor\" must be a number, it is missing"), FileError);
  CHECK_THROWS_WITH_AS(
      (void)(config_with({{"rope_scaling", R"({"type": "linear", "factor": 0})"}})),
      doctest::Contains("rope scaling factor is 0"), FileError);
  CHECK_THROWS_WITH_AS((void)(config_with({{"partial_rotary_factor", "0.5"}})),
                       doctest::Contains("partial_rotary_factor"), FileError);
}

TEST_CASE("config yarn") {
  const auto yarn = [](const std::string& more) {
    return config_with(
        {{"rope_scaling",
          R"({"type": "yarn", "original_max_position_embeddings": 32)" + more + "}"}});
  };
  const ModelConfig config = yarn(R"(, "factor": 4.0)");
  CHECK(config.rope.scaling == model::RopeScaling::kYarn);
  CHECK((config.rope.factor == 4.0 && config.rope.original_context == 32));
  CHECK_EQ(config.context_length, 128);  // the tiny config has 64
  CHECK(std::abs(config.rope.attention_factor - (0.1 * std::log(4.0) + 1.0)) < 1e-12);
  CHECK_EQ(yarn(R"(, "factor": 4.0, "attention_factor": 1.5)").rope.attention_factor, 1.5);
  CHECK_EQ(yarn(R"(, "factor": 1.5)").context_length, 64);
  const double ratio = (0.1 * std::log(4.0) + 1.0) / (0.05 * std::log(4.0) + 1.0);
  const ModelConfig deepseek = yarn(R"(, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5)");
  CHECK(std::abs(deepseek.rope.attention_factor - ratio) < 1e-12);
  CHECK_THROWS_WITH_AS((void)(yarn(R"(, "factor": 2.0, "beta_fast": 0.5)")),
                       doctest::Contains("expected beta_fast above beta_slow"), FileError);
}

TEST_CASE("what is left of quantisation in a config says nothing") {
  for (const char* rest : {"{}", "null", R"({"load_in_4bit": false})",
                           R"({"quant_method": "bitsandbytes", "load_in_4bit": true})"}) {
    CHECK_EQ(config_with({{"quantization_config", rest}}).hidden_size, 4);
  }
}

TEST_CASE("config refuses by name") {
  const auto refuses = [](const char* key, const char* value, const char* text) {
    CHECK_THROWS_WITH_AS((void)(config_with({{key, value}})), doctest::Contains(text), FileError);
  };
  refuses("quantization_config", R"({"quant_method": "bitnet"})", "weights quantised by bitnet");
  refuses("hidden_act", "\"gelu\"", "hidden_act 'gelu'");
  refuses("attention_bias", "true", "attention_bias is not supported for llama");
  refuses("mlp_bias", "true", "mlp_bias is not supported");
  refuses("hidden_size", "", "\"hidden_size\" must be an integer, it is missing");
  refuses("hidden_size", "\"4\"", "must be an integer, it is string");
  refuses("hidden_size", "5", "no multiple of num_attention_heads");
  refuses("vocab_size", "99999999999", "vocabulary size is 99999999999");
  refuses("vocab_size", "0", "vocabulary size is 0");
  refuses("num_hidden_layers", "-1", "number of layers is -1");
  refuses("head_dim", "3", "rotary dimension is 3");
  refuses("head_dim", "9223372036854775807", "head dimension is 9223372036854775807");
  refuses("num_attention_heads", "0", "num_attention_heads 0");
  refuses("num_key_value_heads", "3", "key-value heads is 3");
  refuses("rms_norm_eps", "0", "RMSNorm epsilon is 0");
  refuses("rope_theta", "-1", "rope theta is -1");
  refuses("max_position_embeddings", "0", "context length is 0");
}
