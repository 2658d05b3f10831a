#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "alignpro/io/gguf.h"
#include "alignpro/model/config.h"

namespace alignpro::model {

// Both return a validated config, and throw FileError for what a file asks and alignpro lacks.

// config.json of a Hugging Face folder, in the layout of transformers 4 (rope_theta, rope_scaling)
// or 5 (rope_parameters), and generation_config.json where there is one.
ModelConfig read_hf_config(const std::filesystem::path& folder);

// Metadata of a GGUF file; the factors of scaled rope and the untied head are tensors there.
ModelConfig read_gguf_config(const io::GgufFile& file);

// Steps shared by the two readers.

// "llama" -> kLlama; empty for a family that is not supported.
std::optional<Family> family_from_name(std::string_view name);

// Fields that follow from the family alone: qkv_bias, qk_norm, fused_projections.
void apply_family(Family family, ModelConfig* config);

// Appends an EOS id unless it is there already. One outside the vocabulary is left out: no logit
// reaches it (configs of shrunken models keep the ids of their parents).
void add_eos(int64_t id, ModelConfig* config);

// bos_id, or none where it lies outside the vocabulary, as above.
void set_bos(int64_t id, ModelConfig* config);

// The factor on cos and sin where the file gives none: sqrt(1 + ln(scale) / ln(original)), for
// scale = context / original > 1 (LongRoPE, arXiv 2402.13753).
double longrope_attention_factor(double scale, int64_t original_context);

}  // namespace alignpro::model
