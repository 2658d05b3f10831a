#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "alignpro/model/config.h"
#include "alignpro/model/model_files.h"

namespace alignpro::model {

// All return a validated config, and throw FileError for what a file asks and alignpro lacks.
ModelConfig read_config(const ModelFiles& files);

// Its parts by format, without the ids that end a text (end_of_text.h).

// config.json of a Hugging Face folder, in the layout of transformers 4 (rope_theta, rope_scaling)
// or 5 (rope_parameters).
ModelConfig read_hf_config(const ModelFiles& files);

// Metadata of a GGUF file; the factors of scaled rope and the untied head are tensors there.
ModelConfig read_gguf_config(const io::GgufFile& file);

// Steps shared by the two readers.

// "llama" -> kLlama; empty for a family that is not supported.
std::optional<Family> family_from_name(std::string_view name);

// Switches that follow from the family alone, such as qkv_bias.
void apply_family(Family family, ModelConfig* config);

// The last of every `interval` layers. `what` begins the error for an interval below 1.
std::vector<int64_t> every_nth_layer(int64_t interval, const ModelConfig& config,
                                     const std::string& what);
// Gemma 3: all other layers than these see the sliding window alone.
void set_global_layers(const std::vector<int64_t>& layers, ModelConfig* config);

// bos_id, or none where it lies outside the vocabulary: configurations of shrunken models keep the
// ids of their parents.
void set_bos(int64_t id, ModelConfig* config);

// The factor on cos and sin where the file gives none: sqrt(1 + ln(scale) / ln(original)), for
// scale = context / original > 1 (LongRoPE, arXiv 2402.13753).
double longrope_attention_factor(double scale, int64_t original_context);
// YaRN's, for `weight` 1 of the logarithm: 0.1 weight ln(factor) + 1.
double yarn_attention_factor(double factor, double weight = 1.0);

}  // namespace alignpro::model
